"""Monte-Carlo attack: how many generated images fall near a candidate.

Hilprecht, Haerterich, Bernau, "Monte Carlo and Reconstruction Membership Inference Attacks against Generative Models",
PoPETs 2019 (arXiv 1906.03006).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmia_exp.attacks.base import Lab
from diffmia_exp.attacks.knn import SampleAttack, by_distances
from diffmia_exp.errors import choice, number
from diffmia_exp.features import Features
from diffmia_exp.threat_models import SamplesOnly

FLOOR = 1e-6


class MonteCarlo(SampleAttack):
    """The share of generated images in a ball around the candidate.

    With d_i the distance of f(x) to f(g_i) and r the radius: count: score = (1/n) sum_i [d_i <= r];
    log: score = (1/n) sum_i [d_i <= r] (-log(d_i / r)), which weighs near ones more; d_i / r is at least 1e-6.

    Two things differ from the paper. Its radius is the median over the candidates of the distance to the nearest generated image; a
    score would then depend on which other images are audited. Here r = radius_scale * the quantile of the distances of generated
    images to their nearest other one. And distances under the logarithm are in units of r: a generated image within the ball never
    counts against the candidate, as it would with -log d where d > 1.

    Args:
        quantile: of the nearest-neighbour distances among the generated images, in [0, 1].
        radius_scale: what it is multiplied by.
        weight: `count` or `log`.
        n_samples: generated images per model.
        steps: sampling steps.
        sample_seed: of the generated images.
        features: a `diffmia_exp.features` class; None for the pixels.
    """

    def __init__(
        self,
        quantile: float = 0.5,
        radius_scale: float = 1.0,
        weight: str = "count",
        n_samples: int = 2048,
        steps: int = 50,
        sample_seed: int = 0,
        features: Features | None = None,
    ) -> None:
        super().__init__(n_samples, steps, sample_seed, features)
        self.quantile = number("quantile", quantile, least=0, most=1)
        self.radius_scale = number("radius_scale", radius_scale, above=0)
        self.weight = choice("weight", weight, ("count", "log"))

    def prepare(self, access: SamplesOnly, lab: Lab) -> None:
        super().prepare(access, lab)
        nearest = by_distances(self.drawn, self.drawn, lambda d: d.topk(2, largest=False).values[:, 1])  # the nearest is itself
        radius = self.radius_scale * torch.quantile(nearest, self.quantile)
        self.radius = radius.clamp(min=1e-12)  # generated images that are all equal

    def score(self, access: SamplesOnly, x: Tensor, sample_id: Tensor) -> Tensor:
        return by_distances(self.features(x), self.drawn, self._share)

    def _share(self, distances: Tensor) -> Tensor:
        relative = distances / self.radius
        if self.weight == "count":
            return (relative <= 1).double().mean(1)
        return -relative.clamp(FLOOR, 1).log().mean(1)  # 0 outside the ball
