"""What attacks judge: the signals of target and shadow models on the same images, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffmia_exp.data import Ids

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Signals:
    """Signals of one target and K shadows on n images. Who is a member of the target is not in here.

    Args:
        sample_id: int64 [n].
        target: float64 [n, F].
        shadows: float64 [K, n, F].
        keep: bool [K, n], the images each shadow was trained on.
        pool: bool [K, n], the images these were drawn from.
        public: bool [n], images known to be in no model's pool.
    """

    sample_id: Ids
    target: Floats
    shadows: Floats
    keep: Mask
    pool: Mask
    public: Mask

    def playing(self, k: int) -> Signals:
        """The same with shadow k as the target, and the others as its shadows."""
        others = np.arange(len(self.keep)) != k
        return Signals(self.sample_id, self.shadows[k], self.shadows[others], self.keep[others], self.pool[others], self.public)

    def take(self, images: NDArray[np.integer] | Mask) -> Signals:
        """The same on some of the images."""
        at = images
        return Signals(self.sample_id[at], self.target[at], self.shadows[:, at], self.keep[:, at], self.pool[:, at], self.public[at])

    def examples(self) -> tuple[Floats, Mask]:
        """What a classifier can be trained on: the shadows' signals on their own pools [m, F], and whether each is a member's [m]."""
        return self.shadows[self.pool], self.keep[self.pool]

    def inside_and_outside(self) -> tuple[Floats, Floats]:
        """Mean signals [n, F] of the shadows that were trained on an image, and of those that were not.

        An image that all (or none) of the shadows were trained on lacks one of the two; it is taken to lie as far from the other as
        it does on average over the images that have both.
        """
        k, rest = self.keep[..., None], ~self.keep[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            inside = np.where(k, self.shadows, 0).sum(0) / k.sum(0)
            outside = np.where(rest, self.shadows, 0).sum(0) / rest.sum(0)
        gap = np.nanmean(inside - outside, axis=0) if self.mixed.any() else np.zeros(self.target.shape[1])
        return np.where(np.isnan(inside), outside + gap, inside), np.where(np.isnan(outside), inside - gap, outside)

    @property
    def mixed(self) -> Mask:
        """Images [n] that some shadows were trained on and some were not."""
        mask: Mask = np.logical_and(self.keep.any(0), ~self.keep.all(0))
        return mask
