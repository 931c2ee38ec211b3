"""LiRA: likelihood ratio attack.

Carlini, Chien, Nasr, Song, Terzis, Tramer, "Membership Inference Attacks From First Principles", S&P 2022 (arXiv 2112.03570);
on diffusion models: Carlini et al., "Extracting Training Data from Diffusion Models", 2023 (arXiv 2301.13188).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from diffmia_exp.attacks.base import Attack, HostedAttack
from diffmia_exp.errors import ConfigError, choice
from diffmia_exp.signals import Signals

VARIANCES = ("fixed", "per_image")


class LiRA(HostedAttack):
    """Was the target's signal drawn like those of shadows trained on the image, or like those of the others?

    online:  score = sum over signals of log N(s; mu_in, sigma_in^2) - log N(s; mu_out, sigma_out^2)
    offline: score = sum over signals of log Phi((s - mu_out) / sigma_out), from the shadows without the image alone

    mu and sigma are those of the image over the shadows; with variance = fixed sigma is one number per signal, pooled over all
    images, which few shadows need. Where an image lacks one kind of shadow its mean is imputed (`Signals.inside_and_outside`).

    Args:
        host: an attack on a single model; each of its signals (timesteps of `multi_loss`) contributes a factor.
        online: whether shadows trained on the image are used.
        variance: `fixed` or `per_image`; of an image with fewer than two shadows of a kind the latter takes the pooled one.
    """

    judging = ("online", "variance")

    def __init__(self, host: Attack, online: bool = True, variance: str = "fixed") -> None:
        super().__init__(host)
        if not isinstance(online, bool):
            raise ConfigError("online", online, "must be true or false")
        self.online = online
        self.variance = choice("variance", variance, VARIANCES)
        self.needs_inside = online
        self.min_shadows = 2 if variance == "fixed" else 4

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        inside, outside = signals.inside_and_outside()
        without = ~signals.keep[..., None]
        sigma_out = self._sigma(signals.shadows, outside, without)
        if not self.online:
            return norm.logcdf((signals.target - outside) / sigma_out).sum(1)
        sigma_in = self._sigma(signals.shadows, inside, ~without)
        return (norm.logpdf(signals.target, inside, sigma_in) - norm.logpdf(signals.target, outside, sigma_out)).sum(1)

    def _sigma(self, shadows: NDArray[np.float64], mean: NDArray[np.float64], among: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Standard deviation round the mean, unbiased, [n, F]."""
        square = np.where(among, (shadows - mean) ** 2, 0).sum(0)
        count = among.sum(0)
        pooled = np.sqrt(square.sum(0) / max(np.maximum(count - 1, 0).sum(), 1))
        if self.variance == "fixed":
            return np.broadcast_to(pooled, mean.shape)
        # An image with fewer than two shadows of a kind has no variance of its own.
        return np.where(count > 1, np.sqrt(square / np.maximum(count - 1, 1)), pooled)
