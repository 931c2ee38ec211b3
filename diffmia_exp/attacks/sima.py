"""SimA: score-based membership inference with a single query.

Rao, Qu, Moyer, "Score-based Membership Inference on Diffusion Models", 2025 (arXiv 2509.25003).
"""

from __future__ import annotations

from torch import Tensor

from diffmia_exp.attacks.base import ResidualAttack
from diffmia_exp.errors import number, whole
from diffmia_exp.threat_models import GrayBox


class SimA(ResidualAttack):
    """The norm of the prediction on the clean image: it points towards nearby training images, and is small on them.

    score = -||eps_t(x_0)||_p^p, x_0 neither noised nor scaled

    Args:
        t: timestep index (the paper's useful range is 10 to 300).
        p: exponent of the norm.
    """

    access = GrayBox

    def __init__(self, t: int = 100, p: float = 4) -> None:
        self.t = whole("t", t, least=0)
        self.p = number("p", p, above=0)

    def nfe(self, T: int) -> int:
        whole("t", self.t, most=T - 1)
        return 1

    def residuals(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        return access.eps(x, self.t)[:, None]
