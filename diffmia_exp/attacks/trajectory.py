"""Trajectory statistics: the attack of the paper this project implements.

Zhu, Chen, Grossklags, Fritz, "Data Forensics in Diffusion Models: A Systematic Analysis of Membership Privacy", 2023
(arXiv 2302.07801). Quantities as in Ho et al. 2020 (section 3) and Nichol & Dhariwal 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmia_exp.attacks.base import Attack
from diffmia_exp.diffusion import Schedule
from diffmia_exp.errors import ConfigError, choice, whole
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import GrayBox

QUANTITIES = ("vb", "mse", "xstart_mse", "total_bpd", "prior_bpd")
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda v: v.mean(1),
    "median": lambda v: v.quantile(0.5, dim=1),
    "max": lambda v: v.amax(1),
    "min": lambda v: v.amin(1),
    "sum": lambda v: v.sum(1),
}


class Trajectory(Attack):
    """Errors along the whole diffusion trajectory, reduced to one number.

    For each t in 0, stride, 2 stride, .. < T one fresh noise eps gives x_t and, with x0_hat clipped to [-1, 1],

        mse_t        = mean((eps_t(x_t) - eps)^2)
        xstart_mse_t = mean((x0_hat - x_0)^2)
        vb_t         = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per dimension; at t = 0 the discretised decoder NLL

    The signal keeps the timesteps apart. To judge, the values of an image are sorted in descending order, sliced [start:end] and
    reduced; score = -statistic. Two quantities are one number an image: total_bpd = stride * sum_t vb_t + prior_bpd, the (strided)
    variational bound, and prior_bpd = KL(q(x_T | x_0) || N(0, I)), which holds no information about the model and serves as a
    control.

    The paper's targets learn sigma; here the reverse variance is fixed to beta_t (posterior variance of t = 1 at t = 0), the
    "fixed large" choice of Ho et al. It reports xstart_mse with the median for gray-box access and takes every timestep; the
    stride bounds the cost.

    Args:
        quantity: `vb`, `mse`, `xstart_mse`, `total_bpd` or `prior_bpd`.
        statistic: `mean`, `median`, `max`, `min` or `sum`.
        start, end: slice of the descending values, as in Python.
        stride: distance of the timesteps used.
        seed: of the noises.
    """

    access = GrayBox
    judging = ("statistic", "start", "end")

    def __init__(
        self,
        quantity: str = "xstart_mse",
        statistic: str = "median",
        start: int = 0,
        end: int | None = None,
        stride: int = 1,
        seed: int = 0,
    ) -> None:
        self.quantity = choice("quantity", quantity, QUANTITIES)
        self.statistic = choice("statistic", statistic, STATISTICS)
        self.start = whole("start", start)
        self.end = end if end is None else whole("end", end)
        self.stride = whole("stride", stride, least=1)
        self.seed = whole("seed", seed, least=0)

    def nfe(self, T: int) -> int:
        whole("stride", self.stride, most=T)
        steps = len(range(0, T, self.stride))
        if not range(steps)[self.start : self.end]:
            raise ConfigError("start", self.start, f"leaves nothing of {steps} timesteps with end={self.end}")
        return 0 if self.quantity == "prior_bpd" else steps

    def signal(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        schedule = access.schedule
        if self.quantity == "prior_bpd":
            return -prior_bpd(schedule, x)[:, None]
        seed = derive(self.seed, "score")
        values = torch.empty(len(x), len(range(0, schedule.T, self.stride)), dtype=torch.float64, device=x.device)
        for i, t in enumerate(range(0, schedule.T, self.stride)):
            eps = gaussian(seed, sample_id, tuple(x.shape[1:]), t)
            x_t = schedule.q_sample(x, t, eps)
            eps_hat = access.eps(x_t, t)
            x0_hat = schedule.x0_from_eps(x_t, t, eps_hat).clamp(-1, 1)
            if self.quantity == "mse":
                error = (eps_hat - eps).square()
            elif self.quantity == "xstart_mse":
                error = (x0_hat - x).square()
            else:
                error = vb(schedule, x, x_t, x0_hat, t)
            values[:, i] = error.flatten(1).mean(1)
        if self.quantity == "total_bpd":
            return -(self.stride * values.sum(1) + prior_bpd(schedule, x))[:, None]
        return -values

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        reduced: NDArray[np.float64] = self.reduce(torch.from_numpy(signals.target)).numpy()
        return reduced

    def score(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        return self.reduce(self.signal(access, x, sample_id))

    def reduce(self, signal: Tensor) -> Tensor:
        """Scores [B] of signals [B, timesteps], or [B, 1] where the quantity is one number."""
        if self.quantity in ("total_bpd", "prior_bpd"):
            return signal[:, 0]
        ordered = (-signal).sort(dim=1, descending=True).values[:, self.start : self.end]
        return -STATISTICS[self.statistic](ordered)


def vb(schedule: Schedule, x0: Tensor, x_t: Tensor, x0_hat: Tensor, t: int) -> Tensor:
    """The variational-bound term L_t in bits, per dimension [B, C, H, W] (Ho et al. 2020, equations 5 to 8).

    With the reverse variance sigma_t^2 = beta_t and both means given by q(x_{t-1} | x_t, x_0) at x_0 and at x0_hat.
    """
    alphas_cumprod = schedule.alphas_cumprod
    a_t = alphas_cumprod[t]
    if t == 0:
        # The posterior mean at t = 0 is x0_hat itself; its variance is that of the smallest posterior that is not 0.
        variance = posterior_variance(alphas_cumprod, 1) if schedule.T > 1 else 1 - a_t
        return discretised_nll(x0, x0_hat, variance.sqrt()) / math.log(2)
    a_before = alphas_cumprod[t - 1]
    beta = 1 - a_t / a_before
    posterior = posterior_variance(alphas_cumprod, t)
    gap = a_before.sqrt() * beta / (1 - a_t) * (x0_hat - x0)  # the means differ in their x_0 term alone
    return 0.5 * (torch.log(beta / posterior) + posterior / beta - 1 + gap.square() / beta) / math.log(2)


def posterior_variance(alphas_cumprod: Tensor, t: int) -> Tensor:
    """Variance of q(x_{t-1} | x_t, x_0), t >= 1 (Ho et al. 2020, equation 7)."""
    a_t, a_before = alphas_cumprod[t], alphas_cumprod[t - 1]
    return (1 - a_before) / (1 - a_t) * (1 - a_t / a_before)


def discretised_nll(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """-log P of the 8-bit pixel x under N(mean, sigma^2) integrated over its bin, in nats (Ho et al. 2020, equation 13)."""
    upper, lower = (x - mean + 1 / 255) / sigma, (x - mean - 1 / 255) / sigma
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    log_survival = torch.special.log_ndtr(-lower)
    # log(Phi(b) - Phi(a)), taken in the tail where it keeps its digits.
    mirrored = (upper + lower) > 0
    high = torch.where(mirrored, torch.special.log_ndtr(-lower), log_upper)
    low = torch.where(mirrored, torch.special.log_ndtr(-upper), log_lower)
    inside = high + torch.log(-torch.expm1(torch.clamp(low - high, max=-1e-300)))
    return -torch.where(x < -0.999, log_upper, torch.where(x > 0.999, log_survival, inside))


def prior_bpd(schedule: Schedule, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, [B]."""
    a = schedule.alphas_cumprod[-1]
    kl = 0.5 * (-torch.log(1 - a) + (1 - a) - 1 + a * x0.square())
    return kl.flatten(1).mean(1) / math.log(2)
