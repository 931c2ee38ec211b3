"""Output perturbation: the service adds noise to what it returns (Jia et al. 2019, MemGuard, arXiv 1909.10594, did so to scores)."""

from __future__ import annotations

from torch import Tensor

from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import number
from diffmia_exp.noise import gaussian


class OutputPerturbation(Defense):
    """Generated images and variations x are returned as clip(x + sigma * z, -1, 1), z standard normal, drawn anew for each answer.

    Gaussian noise on images, instead of MemGuard's optimised noise on a classifier's scores. Nothing is trained. Attacks that ask the
    model itself (gray- and white-box) do not meet it.

    Args:
        sigma: standard deviation, where black is -1 and white 1.
    """

    trains = False
    answers = True

    def __init__(self, sigma: float = 0.1) -> None:
        self.sigma = number("sigma", sigma, above=0)

    def answered(self, x: Tensor, seed: int, sample_id: Tensor, draw: int | Tensor) -> Tensor:
        """See `Defense`."""
        return (x + self.sigma * gaussian(seed, sample_id, tuple(x.shape[1:]), draw).to(x)).clamp(-1, 1)
