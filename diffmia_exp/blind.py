"""A model-blind classifier: can members be told from non-members by the images alone? In a sound split they cannot."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn import functional

from diffmia_exp.data import Pixels

BLOCKS = 5
"""Blocks of the progressive validation: each but the first is classified by what the blocks before it taught."""

LEAST = 5
"""Images of each class without which there is nothing to learn."""

SIDE = 8
"""Larger images are averaged down to this many pixels a side."""

Mask = NDArray[np.bool_]


def classify(pixels: Pixels, is_member: Mask, kind: str, seed: int) -> tuple[Mask, NDArray[np.float64]]:
    """Progressive validation (Blum, Kalai & Langford 1999) of a classifier of members.

    The images are dealt into BLOCKS blocks, members and non-members evenly; block k is scored by a classifier trained on the blocks
    before it. If membership was drawn at random, the AUC of each block is 1/2 in expectation whatever came before, so the errors of
    blocks are uncorrelated and the usual interval is right. Cross-validation instead uses each pair of images in both directions,
    which correlates its folds; the same interval then misses 1/2 about three times too often (docs/controls.md).

    Args:
        pixels: uint8 [n, C, H, W].
        is_member: bool [n], at least LEAST of each class.
        kind: `classical` (the mean of a logistic regression and gradient-boosted trees) or `network` (a small multilayer perceptron).
        seed: of the blocks and of the classifier.

    Returns:
        which images were scored, bool [n] (all but the first block's), and their scores [m], higher = member: an image's rank within
        its block, from 0 to 1, so that the AUC over all of them is that within the blocks.
    """
    from sklearn.exceptions import ConvergenceWarning  # a second to import
    from sklearn.model_selection import StratifiedKFold

    described = features(pixels)
    dealt = StratifiedKFold(BLOCKS, shuffle=True, random_state=seed % 2**32).split(described, is_member)
    blocks = [block for _, block in dealt]
    score = np.full(len(pixels), np.nan)
    for k in range(1, BLOCKS):
        before = np.concatenate(blocks[:k])
        with warnings.catch_warnings(category=ConvergenceWarning, action="ignore"):  # the network is trained for a fixed time
            model = _classifier(kind, seed % 2**32).fit(described[before], is_member[before])
        ranks = stats.rankdata(model.predict_proba(described[blocks[k]])[:, 1])
        score[blocks[k]] = (ranks - 0.5) / len(ranks)
    tested = np.isfinite(score)
    return tested, score[tested]


def _classifier(kind: str, seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier, VotingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "network":
        return make_pipeline(StandardScaler(), MLPClassifier((64,), alpha=1.0, max_iter=30, random_state=seed))
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    trees = HistGradientBoostingClassifier(max_iter=30, max_leaf_nodes=8, min_samples_leaf=5, early_stopping=False, random_state=seed)
    return VotingClassifier([("linear", linear), ("trees", trees)], voting="soft")


def features(pixels: Pixels) -> NDArray[np.float32]:
    """What the classifier sees of each image, float32 [n, F].

    The pixels (averaged down to SIDE a side), and of each channel mean, standard deviation, skewness, kurtosis, five quantiles, the
    shares of black and of white pixels, and the mean size of horizontal and vertical differences and of the Laplacian.
    """
    return np.concatenate([_features(torch.from_numpy(pixels[at : at + 1024])).numpy() for at in range(0, len(pixels), 1024)])


def _features(pixels: Tensor) -> Tensor:
    h, w = pixels.shape[2:]
    x = pixels.float() / 255
    thumbnail = functional.adaptive_avg_pool2d(x, (min(h, SIDE), min(w, SIDE)))
    flat = x.flatten(2)
    mean, std = flat.mean(2), flat.std(2, correction=0)
    z = (flat - mean[..., None]) / std.clamp(min=1e-6)[..., None]
    at = [round(q * (h * w - 1)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    columns = [mean, std, (z * z * z).mean(2), (z * z * z * z).mean(2), *flat.sort(2).values[..., at].unbind(2)]
    columns += [(flat == 0).float().mean(2), (flat == 1).float().mean(2)]
    p = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    up, down, left, right = p[..., :-2, 1:-1], p[..., 2:, 1:-1], p[..., 1:-1, :-2], p[..., 1:-1, 2:]
    columns += [edge.abs().mean((2, 3)) for edge in (right - x, down - x, up + down + left + right - 4 * x)]
    return torch.cat([thumbnail.flatten(1), *columns], dim=1)
