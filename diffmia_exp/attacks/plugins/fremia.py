"""FreMIA: a frequency filter for error maps.

"Unveiling Impact of Frequency Components on Membership Inference Attacks for Diffusion Models", 2025 (arXiv 2505.20955).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmia_exp.attacks.base import Attack, HostedAttack, ResidualAttack
from diffmia_exp.errors import ConfigError, number
from diffmia_exp.threat_models import GrayBox


class FreMIA(HostedAttack):
    """The host's score on low-pass filtered error maps: high frequencies are hard to denoise, members or not.

    score = the host's, with F^-1(m F(residual)) for its residual; m = 1 where |frequency| <= radius * N / 2 on both axes, else scale

    The filter is linear, so that filtering both terms of an error, as the paper does, is filtering their difference.

    Args:
        host: an attack whose score is the size of an error map.
        radius: half the side of the square of frequencies that pass, as a share of the highest; the published 5 at 32 pixels is 5/16.
        scale: factor of the others.

    Raises:
        ConfigError: if the host has no error map.
    """

    relays = False

    def __init__(self, host: Attack, radius: float = 5 / 16, scale: float = 0.2) -> None:
        if not isinstance(host, ResidualAttack) or host.min_shadows:
            must = "has no error map that could be filtered; wrap loss, multi_loss, secmi, pia, pian or sima"
            raise ConfigError("host", type(host).__name__, must)
        super().__init__(host)
        self.host: ResidualAttack = host
        self.radius = number("radius", radius, above=0, most=1)
        self.scale = number("scale", scale, least=0, most=1)

    def signal(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        return self.score(access, x, sample_id)[:, None]

    def score(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        residuals = self.host.residuals(access, x, sample_id)
        mask = self.scale + (1 - self.scale) * self.passes(residuals).to(residuals)
        return self.host.reduce(torch.fft.ifft2(torch.fft.fft2(residuals) * mask).real)

    def passes(self, maps: Tensor) -> Tensor:
        """Which frequencies pass, bool [H, W], in the order of `fft2`."""
        rows, columns = (torch.fft.fftfreq(n, device=maps.device).abs() * 2 <= self.radius + 1e-9 for n in maps.shape[-2:])
        return rows[:, None] & columns[None, :]
