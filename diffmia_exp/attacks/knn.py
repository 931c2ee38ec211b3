"""Nearest generated images: what a model generates lies closer to what it was trained on.

Chen, Yu, Zhang, Fritz, "GAN-Leaks: A Taxonomy of Membership Inference Attacks against Generative Models", CCS 2020
(arXiv 1909.03935), the full black-box attack.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmia_exp.attacks.base import Attack, Lab
from diffmia_exp.errors import whole
from diffmia_exp.features import Features, chosen
from diffmia_exp.threat_models import SamplesOnly

ENTRIES = 2**22  # of a distance matrix that are held at once


class SampleAttack(Attack):
    """An attack that draws generated images once per model and then asks it nothing more."""

    access = SamplesOnly

    def __init__(self, n_samples: int, steps: int, sample_seed: int, features: Features | None) -> None:
        self.n_samples = whole("n_samples", n_samples, least=2)
        self.steps = whole("steps", steps, least=1)
        self.sample_seed = whole("sample_seed", sample_seed, least=0)
        self.features = chosen(features)
        self._drawn: Tensor | None = None

    def nfe(self, T: int) -> int:
        whole("steps", self.steps, most=T)
        return 0

    def nfe_once(self, T: int) -> int:
        return self.n_samples * self.steps

    def check(self, image_shape: tuple[int, ...]) -> None:
        self.features.check(image_shape)

    def prepare(self, access: SamplesOnly, lab: Lab) -> None:
        self._drawn = self.features(access.sample(self.n_samples, self.steps, self.sample_seed))

    @property
    def drawn(self) -> Tensor:
        """Features of the generated images, float64 [n_samples, D].

        Raises:
            RuntimeError: before `prepare`.
        """
        if self._drawn is None:
            raise RuntimeError(f"{type(self).__name__}.prepare must be called first: it draws the generated images")
        return self._drawn


class KNN(SampleAttack):
    """The distance to the nearest generated images.

    score = -mean over the k nearest generated images g of ||f(x) - f(g)||_2 with features f. (The paper takes the nearest one, k = 1.)

    Args:
        k: neighbours.
        n_samples: generated images per model.
        steps: sampling steps.
        sample_seed: of the generated images.
        features: a `diffmia_exp.features` class; None for the pixels.
    """

    def __init__(self, k: int = 5, n_samples: int = 2048, steps: int = 50, sample_seed: int = 0, features: Features | None = None) -> None:
        super().__init__(n_samples, steps, sample_seed, features)
        self.k = whole("k", k, least=1, most=n_samples)

    def score(self, access: SamplesOnly, x: Tensor, sample_id: Tensor) -> Tensor:
        return by_distances(self.features(x), self.drawn, lambda d: -d.topk(self.k, largest=False).values.mean(1))


def by_distances(x: Tensor, samples: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` [b, n] -> [b] applied to the Euclidean distances of x [B, D] to samples [n, D], some rows at a time: [B].

    They are computed from differences, not from squares and products, which lose digits and depend on the batch.
    """
    rows = max(1, ENTRIES // len(samples))
    return torch.cat([reduce(torch.cdist(some, samples, compute_mode="donot_use_mm_for_euclid_dist")) for some in x.split(rows)])
