"""Noise aggregation.

Li, Chen, Fan, "Noise Aggregation Analysis Driven by Small-Noise Injection: Efficient Membership Inference for Diffusion Models",
2025 (arXiv 2510.21783).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmia_exp.attacks.base import Attack
from diffmia_exp.errors import ConfigError, whole
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.threat_models import GrayBox


class NoiseAggregation(Attack):
    """The noises predicted at consecutive timesteps lie closer together on members.

    score = -mean over pairs i < j of ||eps_{t_i}(x_{t_i}) - eps_{t_j}(x_{t_j})||_2^2,  t_i = t - i * stride, i = 0 .. k-1

    x_{t_0} is x_0 with a little noise, injected once; from there deterministic DDIM steps lead down (the paper predicts noise at
    consecutive timesteps iteratively; which sampler it steps with could not be verified).

    Args:
        t: timestep of the injected noise.
        stride: distance of the timesteps.
        k: predicted noises.
        seed: of the injected noise.
    """

    access = GrayBox

    def __init__(self, t: int = 80, stride: int = 10, k: int = 5, seed: int = 0) -> None:
        self.t = whole("t", t, least=1)
        self.stride = whole("stride", stride, least=1)
        self.k = whole("k", k, least=2)
        self.seed = whole("seed", seed, least=0)
        if (k - 1) * stride > t:
            raise ConfigError("k", k, f"takes {(k - 1) * stride} timesteps, t={t} leaves fewer; lower k or stride")

    def nfe(self, T: int) -> int:
        whole("t", self.t, most=T - 1)
        return self.k

    def score(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        schedule, t = access.schedule, self.t
        x_t = schedule.q_sample(x, t, gaussian(derive(self.seed, "score"), sample_id, tuple(x.shape[1:])))
        predicted = [access.eps(x_t, t)]
        while len(predicted) < self.k:
            x_t = schedule.ddim(x_t, t, t - self.stride, predicted[-1])
            t -= self.stride
            predicted.append(access.eps(x_t, t))
        eps = torch.stack(predicted, 1).flatten(2)
        # Over all pairs, the mean squared distance is 2k / (k - 1) times the mean squared distance to the centre.
        spread = (eps - eps.mean(1, keepdim=True)).square().sum(2).mean(1)
        return -2 * self.k / (self.k - 1) * spread
