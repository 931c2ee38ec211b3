"""Deduplication: Kandpal, Wallace, Raffel, "Deduplicating training data mitigates privacy risks", 2022 (arXiv 2202.06539)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csgraph

from diffmia_exp.data import Images
from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import number

BLOCK = 1024  # images on either side of a block of distances


class Deduplication(Defense):
    """Of training images that are copies of each other, one is kept: that of the lowest sample id.

    Two images are copies where d(x, y) = sqrt(mean((x - y)^2)) <= distance over pixels in [0, 1] (Carlini et al. 2023, arXiv
    2301.13188, section 4.1), and so are those between which a chain of copies leads. It is exact: squared differences of 8-bit pixels
    are whole numbers.

    Args:
        distance: up to which images are copies; 0 for equal pixels.
    """

    def __init__(self, distance: float = 0.0) -> None:
        self.distance = number("distance", distance, least=0, most=1)
        self._kept: dict[str, NDArray[np.bool_]] = {}

    def kept(self, members: Images) -> NDArray[np.bool_]:
        """See `Defense`."""
        key = members.fingerprint
        if key not in self._kept:
            self._kept[key] = first_of_each(clusters(members, self.distance), members.sample_id)
        return self._kept[key]


def clusters(images: Images, distance: float) -> NDArray[np.int64]:
    """A number [n] for each image, equal for copies."""
    if distance == 0:
        return np.unique(np.array([h.hex() for h in images.hashes()]), return_inverse=True)[1].astype(np.int64)
    n, pixels = len(images), images.pixels.reshape(len(images), -1)
    most = distance**2 * 255**2 * pixels.shape[1]
    label = np.arange(n)
    for start in range(0, n, BLOCK):
        rows = pixels[start : start + BLOCK].astype(np.float64)
        for beside in range(start, n, BLOCK):
            columns = pixels[beside : beside + BLOCK].astype(np.float64)
            squares = (rows**2).sum(1)[:, None] + (columns**2).sum(1) - 2 * rows @ columns.T  # whole numbers, below 2**53
            i, j = np.nonzero(squares <= most)
            # Joined with what is known so far, so that no list of all pairs is held.
            i, j = np.concatenate([np.arange(n), i + start]), np.concatenate([label, j + beside])
            found = csgraph.connected_components(coo_array((np.ones(len(i), bool), (i, j)), (n, n)), directed=False)[1]
            label = np.unique(found, return_index=True)[1][found]
    return label


def first_of_each(cluster: NDArray[np.int64], sample_id: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The image of the lowest sample id of each cluster (the first one of those that share it), bool [n]."""
    order = np.argsort(sample_id, kind="stable")
    kept = np.zeros(len(cluster), bool)
    kept[order[np.unique(cluster[order], return_index=True)[1]]] = True
    return kept
