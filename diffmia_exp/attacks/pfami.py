"""PFAMI: probabilistic fluctuation.

Fu, Wang, Gao, Liu, Li, Jiang, "A Probabilistic Fluctuation based Membership Inference Attack for Diffusion Models", 2023
(arXiv 2308.12143).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmia_exp.attacks.base import Attack
from diffmia_exp.errors import choice, number, whole
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.threat_models import GrayBox


class PFAMI(Attack):
    """A member sits at a peak of the model's likelihood: its crops are denoised worse than it is.

    score = mean over crops of L(crop) - L(x_0), or of (L(crop) - L(x_0)) / L(x_0); L = mean over t of mean((eps - eps_t(x_t))^2)

    The crops are centre crops enlarged to the image's size, with bilinear interpolation and without rounding to whole pixels. An image
    and its crops share the noise of a timestep.

    Args:
        statistic: `absolute` or `relative` (as the official code has it).
        crops: number of crops.
        largest, smallest: sides of the first and the last crop, as a share of the image's.
        timesteps: number of timesteps, t = 0, stride, 2 stride, ..
        stride: distance of the timesteps.
        pairs: `every` crop at every timestep, as the formula reads, (crops + 1) * timesteps evaluations; or at each timestep a `single`
            one, 2 * timesteps evaluations, the smallest crop at t = 0, the next larger at the next, and so on again.
        seed: of the noises.
    """

    access = GrayBox

    def __init__(
        self,
        statistic: str = "relative",
        crops: int = 10,
        largest: float = 0.95,
        smallest: float = 0.7,
        timesteps: int = 10,
        stride: int = 50,
        pairs: str = "single",
        seed: int = 0,
    ) -> None:
        self.statistic = choice("statistic", statistic, ("absolute", "relative"))
        self.crops = whole("crops", crops, least=1)
        self.largest = number("largest", largest, above=0, most=1)
        self.smallest = number("smallest", smallest, above=0, most=largest)
        self.timesteps = whole("timesteps", timesteps, least=1)
        self.stride = whole("stride", stride, least=1)
        self.pairs = choice("pairs", pairs, ("single", "every"))
        self.seed = whole("seed", seed, least=0)

    def nfe(self, T: int) -> int:
        whole("timesteps", self.timesteps, most=(T - 1) // self.stride + 1)
        return self.timesteps * (1 + (self.crops if self.pairs == "every" else 1))

    def score(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        sides = torch.linspace(self.largest, self.smallest, self.crops, dtype=torch.float64).tolist()
        whole_image, fluctuation = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
        for i in range(self.timesteps):
            noise = gaussian(derive(self.seed, "score"), sample_id, tuple(x.shape[1:]), i)
            chosen = sides if self.pairs == "every" else [sides[-1 - i % self.crops]]
            loss = self._loss(access, x, i * self.stride, noise)
            for side in chosen:
                fluctuation += (self._loss(access, centre_crop(x, side), i * self.stride, noise) - loss) / len(chosen)
            whole_image += loss
        return fluctuation / (whole_image if self.statistic == "relative" else self.timesteps)

    @staticmethod
    def _loss(access: GrayBox, x: Tensor, t: int, noise: Tensor) -> Tensor:
        return (noise - access.eps(access.schedule.q_sample(x, t, noise), t)).square().flatten(1).mean(1)


def centre_crop(x: Tensor, side: float) -> Tensor:
    """The middle of images [B, C, H, W], `side` of their height and width, enlarged to H x W (bilinear)."""
    affine = torch.tensor([[side, 0, 0], [0, side, 0]], dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(affine, list(x.shape), align_corners=False), align_corners=False, padding_mode="border")
