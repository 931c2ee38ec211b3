"""RMIA: robust membership inference.

Zarifzadeh, Liu, Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024 (arXiv 2312.03262). Not published for
diffusion models: the likelihood stand-in below is ours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffmia_exp.attacks.base import Attack, HostedAttack
from diffmia_exp.errors import ConfigError, number
from diffmia_exp.signals import Signals


class RMIA(HostedAttack):
    """How many population images does the image beat, when both are compared with what they are without the target?

    score = share of public z with LR(x, z) >= gamma,  LR(x, z) = (p(x | target) / p(x)) / (p(z | target) / p(z))

    p(x) averages references with and without x (online); offline only the latter exist, and a log p_out(x) stands in for log p_in(x).

    Likelihood stand-in: p(x | model) = exp(s / tau), s the host's score. With the loss as host, s is minus a sum of squared errors,
    that is, up to weights, the evidence lower bound, for which exp(ELBO) would be the likelihood. In those units, though, one model
    differs from the next by tens of nats, and any gamma would do. tau is the standard deviation of s among references without the
    image, pooled over the pool's images: a log ratio of 1 is what retraining alone does, and gamma = 2, the published default, is
    log(2) = .69 of it. The published offline correction, p_in = a p_out + (1 - a), lies between p_out and the best possible p = 1; here
    p is far from 1, and it is taken between log p_out and log 1 = 0 (s <= 0). The published a = .3 does not carry over; the default is
    no correction, and attack.select=shadow chooses among others.

    Ties (x beats all z, or none) are broken by the log ratio itself, weighted below one z.

    Args:
        host: an attack on a single model; several timesteps are averaged.
        online: whether references trained on x are used.
        gamma: how much more likely x must become than z.
        a: offline only, in [0, 1]; 1 = no correction, what training on an image does is left out.
    """

    min_shadows = 2
    min_public = 32
    judging = ("online", "gamma", "a")

    def __init__(self, host: Attack, online: bool = True, gamma: float = 2.0, a: float = 1.0) -> None:
        super().__init__(host)
        if not isinstance(online, bool):
            raise ConfigError("online", online, "must be true or false")
        self.online = self.needs_inside = online
        self.gamma = number("gamma", gamma, above=0)
        self.a = number("a", a, least=0, most=1)

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        s, shadows = signals.target.mean(1), signals.shadows.mean(2)
        without = ~signals.keep & signals.pool
        inside, outside = (v.mean(1) for v in signals.inside_and_outside())
        tau = np.sqrt((np.where(without, shadows - outside, 0) ** 2).sum() / max(without.sum() - without.any(0).sum(), 1))
        log_out = outside / tau
        log_in = inside / tau if self.online else self.a * log_out
        log_p = np.logaddexp(log_in, log_out) - np.log(2)
        log_p = np.where(signals.public, shadows.mean(0) / tau, log_p)  # no reference was trained on a public image
        log_ratio = s / tau - log_p
        population = np.sort(log_ratio[signals.public])
        beaten = np.searchsorted(population, log_ratio - np.log(self.gamma), side="right") / len(population)
        return beaten + np.tanh(log_ratio / 100) / (4 * len(population))
