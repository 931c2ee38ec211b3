"""Loss attack.

Matsumoto, Miura, Yanai, "Membership Inference Attacks against Diffusion Models", 2023 (arXiv 2302.03262);
Hu & Pang, "Membership Inference of Diffusion Models", 2023 (arXiv 2301.09956).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmia_exp.attacks.base import ResidualAttack
from diffmia_exp.errors import whole
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.threat_models import GrayBox


class Loss(ResidualAttack):
    """The training loss at one timestep (Ho et al. 2020, equation 14 at one t): members are denoised better.

    score = -mean over noises of ||eps - eps_t(x_t)||_2^2, x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps

    Args:
        t: timestep index.
        n_noises: noises per image.
        seed: of the noises.
    """

    access = GrayBox

    def __init__(self, t: int = 200, n_noises: int = 1, seed: int = 0) -> None:
        self.t = whole("t", t, least=0)
        self.n_noises = whole("n_noises", n_noises, least=1)
        self.seed = whole("seed", seed, least=0)

    def nfe(self, T: int) -> int:
        whole("t", self.t, most=T - 1)
        return self.n_noises

    def residuals(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        maps = []
        for draw in range(self.n_noises):
            eps = gaussian(derive(self.seed, "score"), sample_id, tuple(x.shape[1:]), draw)
            maps.append(eps - access.eps(access.schedule.q_sample(x, self.t, eps), self.t))
        return torch.stack(maps, 1)
