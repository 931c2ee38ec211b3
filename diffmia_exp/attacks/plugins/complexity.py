"""Complexity calibration: simple images score high, members or not.

Score calibration by image complexity, 2026 (arXiv 2603.13421).
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmia_exp.attacks.base import Attack, HostedAttack
from diffmia_exp.errors import ConfigError, choice
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import SamplesOnly


class Complexity(HostedAttack):
    """The host's score with an image's complexity divided or regressed out.

    divide:  score = s(x) / c(x)
    regress: score = s(x) - (alpha + beta c(x)), least squares over public non-members

    c(x) is the length of the image's 8-bit pixels, compressed by zlib at level 9, in bytes per pixel.

    Args:
        host: an attack on a single model. To divide, its scores must all have one sign, as errors do.
        method: `divide` or `regress`.

    Raises:
        ConfigError: if the host judges shadows' signals.
    """

    relays = False
    judging = ("method",)

    def __init__(self, host: Attack, method: str = "divide") -> None:
        if host.min_shadows or host.min_public or isinstance(host, HostedAttack):
            must = "judges other models' signals, and has no score of its own to calibrate; wrap an attack on a single model"
            raise ConfigError("host", type(host).__name__, must)
        super().__init__(host)
        self.method = choice("method", method, ("divide", "regress"))
        self.min_public = 64 if method == "regress" else 0

    def signal(self, access: SamplesOnly, x: Tensor, sample_id: Tensor) -> Tensor:
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
        lengths = [len(zlib.compress(image.tobytes(), 9)) / image.size for image in pixels]  # no library compresses images in batches
        return torch.stack([self.host.score(access, x, sample_id), torch.tensor(lengths, dtype=torch.float64, device=x.device)], 1)

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        s, c = signals.target.T
        if self.method == "divide":
            return s / c
        beta, alpha = np.polyfit(c[signals.public], s[signals.public], 1)
        return s - (alpha + beta * c)
