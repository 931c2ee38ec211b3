"""Loss at several timesteps and noises.

Matsumoto et al. 2023 (arXiv 2302.03262) and Carlini et al., "Extracting Training Data from Diffusion Models", 2023
(arXiv 2301.13188), who find t = 50 to 300 useful.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmia_exp.attacks.base import ResidualAttack
from diffmia_exp.errors import ConfigError, whole
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import GrayBox


class MultiLoss(ResidualAttack):
    """The training loss, averaged over timesteps; the signal keeps the timesteps apart, for attacks that weigh them (`lira`).

    score = -mean over t and noises of ||eps - eps_t(x_t)||_2^2, x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps

    Args:
        t: timestep indices.
        n_noises: noises per image and timestep.
        seed: of the noises.
    """

    access = GrayBox

    def __init__(self, t: tuple[int, ...] | list[int] = (50, 100, 150, 200, 250, 300), n_noises: int = 1, seed: int = 0) -> None:
        if not isinstance(t, list | tuple) or not t:
            raise ConfigError("t", t, "must be a list of timesteps, as [50,100]")
        self.t = [whole("t", step, least=0) for step in t]
        self.n_noises = whole("n_noises", n_noises, least=1)
        self.seed = whole("seed", seed, least=0)

    def nfe(self, T: int) -> int:
        for step in self.t:
            whole("t", step, most=T - 1)
        return len(self.t) * self.n_noises

    def residuals(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        draws = len(self.t) * self.n_noises
        which = torch.arange(draws, device=x.device).repeat(len(x))
        eps = gaussian(derive(self.seed, "score"), sample_id.repeat_interleave(draws), tuple(x.shape[1:]), which)
        maps = eps.unflatten(0, (len(x), draws))  # each noise gives way to its residual
        for k in range(draws):
            t = self.t[k // self.n_noises]
            maps[:, k] -= access.eps(access.schedule.q_sample(x, t, maps[:, k]), t)
        return maps

    def signal(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        maps = self.residuals(access, x, sample_id).unflatten(1, (len(self.t), self.n_noises))
        return -maps.square().flatten(3).sum(3).mean(2)

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        return signals.target.mean(1)
