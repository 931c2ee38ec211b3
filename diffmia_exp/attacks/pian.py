"""PIAN: PIA with the proximal noise normalised.

Kong et al., ICLR 2024 (arXiv 2305.18355), where it stands beside PIA.
"""

from __future__ import annotations

import math

from torch import Tensor

from diffmia_exp.attacks.pia import PIA


class PIAN(PIA):
    """PIA with eps_0 rescaled per image to the mean absolute value of standard normal noise.

    eps_0 = sqrt(2 / pi) eps_0(x_0) / mean|eps_0(x_0)|, since E|z| = sqrt(2 / pi) = 0.798 for z ~ N(0, 1). Otherwise as PIA.
    (Released code has used sqrt(pi / 2) in its place, a mean absolute value of 1.25, which is not what normalising means.)
    """

    def noise(self, eps_0: Tensor) -> Tensor:
        return math.sqrt(2 / math.pi) * eps_0 / eps_0.abs().mean(dim=(1, 2, 3), keepdim=True)
