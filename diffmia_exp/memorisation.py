"""Extraction: are generated images copies of training images?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffmia_exp.config import Plain
from diffmia_exp.data import Ids, Images, Pixels

NEIGHBOURS = 50
THRESHOLD = 0.5
"""Carlini et al. 2023, section 5.1: alpha = 0.5, n = 50."""

NN_THRESHOLD = 1 / 3
"""Of the ratio of the nearest to the second nearest neighbour's distance (Gu et al. 2023)."""

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
PAIRS = 16
BLOCK = 1024

Floats = NDArray[np.float64]


def nearest(queries: Pixels, references: Pixels, k: int) -> tuple[Floats, Ids]:
    """The k references closest to each query.

    Args:
        queries: uint8 [q, C, H, W].
        references: uint8 [n, C, H, W]; compared in blocks, so that memory does not grow with n.
        k: at most n.

    Returns:
        l2 distances of pixels in [0, 1], ascending, [q, k]; and which references these are, [q, k].
    """
    x = torch.from_numpy(queries).flatten(1).double() / 255
    distance, index = torch.empty(len(x), 0, dtype=torch.float64), torch.empty(len(x), 0, dtype=torch.int64)
    for start in range(0, len(references), BLOCK):
        block = torch.from_numpy(references[start : start + BLOCK]).flatten(1).double() / 255
        # Without matrix products, which lose the small distances of copies.
        found = torch.cdist(x, block, compute_mode="donot_use_mm_for_euclid_dist")
        distance = torch.cat([distance, found], dim=1)
        index = torch.cat([index, torch.arange(start, start + len(block)).expand(len(x), -1)], dim=1)
        order = distance.argsort(dim=1, stable=True)[:, :k]
        distance, index = distance.gather(1, order), index.gather(1, order)
    return distance.numpy(), index.numpy()


def ratios(distance: Floats) -> tuple[Floats, Floats]:
    """How much closer the nearest neighbour is than the others; small for a copy.

    Args:
        distance: ascending distances to the k nearest training images, [q, k].

    Returns:
        the distance to the nearest relative to the mean over the k nearest (Carlini et al. 2023, "Extracting Training Data from
        Diffusion Models", section 5.1, without the factor alpha, which is in the threshold), [q]; and relative to the second nearest
        (NN1 / NN2), [q]. 0 where all neighbours coincide with the image, 1 where there is but one.
    """
    first = distance[:, 0]
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(first / distance.mean(1)), np.nan_to_num(first / distance[:, :2][:, -1])


def compare(generated: Pixels, training: Images, held_out: Images) -> tuple[Plain, dict[str, NDArray[Any]]]:
    """Near-copies of training images among generated ones, and, as a control, of images that the model has never seen.

    Args:
        generated: uint8 [g, C, H, W].
        training: the model's members.
        held_out: other images of the same kind.

    Returns:
        `n_generated`; `near_copies`, those whose ratio is below `threshold`; quantiles of NN1 / NN2, `nn_ratio`; how many of these are
        below 1/3, `nn_ratio_below_third`; the same three `.._of_held_out`; `seconds`. And the PAIRS generated images with the smallest
        ratios beside the training images they come closest to: `generated`, `training`, `sample_id`, `ratio`.
    """
    started = time.monotonic()
    facts: Plain = {"n_generated": len(generated)}
    pairs: dict[str, NDArray[Any]] = {}
    for images, of in ((training, ""), (held_out, "_of_held_out")):
        distance, index = nearest(generated, images.pixels, min(NEIGHBOURS, len(images)))
        ratio, nn_ratio = ratios(distance)
        facts |= {f"near_copies{of}": int((ratio < THRESHOLD).sum()), f"nn_ratio_below_third{of}": int((nn_ratio < NN_THRESHOLD).sum())}
        facts[f"nn_ratio{of}"] = {f"{q:g}": float(np.quantile(nn_ratio, q)) for q in QUANTILES}
        if images is training:
            closest = np.argsort(ratio, kind="stable")[:PAIRS]
            nearest_to = index[closest, 0]
            pairs = {"generated": generated[closest], "training": images.pixels[nearest_to]}
            pairs |= {"sample_id": images.sample_id[nearest_to], "ratio": ratio[closest]}
    return facts | {"threshold": THRESHOLD, "seconds": round(time.monotonic() - started, 3)}, pairs
