"""PIA: proximal initialisation attack.

Kong, Duan, Ma, Shen, Zhu, Shi, Xu, "An Efficient Membership Inference Attack for the Diffusion Model by Proximal
Initialization", ICLR 2024 (arXiv 2305.18355).
"""

from __future__ import annotations

from torch import Tensor

from diffmia_exp.attacks.base import ResidualAttack
from diffmia_exp.errors import number, whole
from diffmia_exp.threat_models import GrayBox


class PIA(ResidualAttack):
    """The model's own prediction at t = 0 serves as the noise; members bring it back (the paper's R_{t,p}).

    score = -||eps_0 - eps_t(sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps_0)||_p^p,  eps_0 = eps_0(x_0)

    Args:
        t: timestep index.
        p: exponent of the norm.
    """

    access = GrayBox

    def __init__(self, t: int = 200, p: float = 4) -> None:
        self.t = whole("t", t, least=1)
        self.p = number("p", p, above=0)

    def nfe(self, T: int) -> int:
        whole("t", self.t, most=T - 1)
        return 2

    def noise(self, eps_0: Tensor) -> Tensor:
        """What stands in for the noise, given the prediction eps_0(x_0)."""
        return eps_0

    def residuals(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        eps_0 = self.noise(access.eps(x, 0))
        x_t = access.schedule.q_sample(x, self.t, eps_0)
        return (eps_0 - access.eps(x_t, self.t))[:, None]
