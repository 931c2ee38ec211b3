"""SecMI: step-wise error comparing membership inference.

Duan, Kong, Wang, Shi, Xu, "Are Diffusion Models Vulnerable to Membership Inference Attacks?", ICML 2023 (arXiv 2302.01316).
"""

from __future__ import annotations

from torch import Tensor

from diffmia_exp.attacks.base import ResidualAttack
from diffmia_exp.errors import ConfigError, whole
from diffmia_exp.threat_models import GrayBox


class SecMI(ResidualAttack):
    """SecMI-stat: the t-error, how far one deterministic step up and one back end from where they began (the paper's t-error).

    x~_s, s = t - stride, is reached from x_0 (taken as the state at index 0) by DDIM inversion in strides;
    score = -||psi(phi(x~_s, s), t) - x~_s||_2^2, phi one DDIM step from s up to t, psi one from t down to s (Song et al., DDIM,
    2021, equation 12 with sigma = 0).

    Args:
        t: t_SEC, the upper end of the compared step; the error compared is that at t - stride.
        stride: k, length of a DDIM step; divides t.

    The step up and the step down share x~_s, so the gap equals
    (sqrt(1 - a_s) - sqrt(a_s (1 - a_t) / a_t)) (eps_t(x_t) - eps_s(x~_s)) with a = alphas_cumprod: computed in this form, it
    does not lose its digits in a difference of two nearly equal images.
    """

    access = GrayBox

    def __init__(self, t: int = 100, stride: int = 10) -> None:
        self.t = whole("t", t, least=1)
        self.stride = whole("stride", stride, least=1)
        if t % stride:
            raise ConfigError("stride", stride, f"must divide t={t}")

    def nfe(self, T: int) -> int:
        whole("t", self.t, most=T - 1)
        return self.t // self.stride + 1

    def residuals(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        schedule, t, s = access.schedule, self.t, self.t - self.stride
        for now in range(0, s, self.stride):
            x = schedule.ddim(x, now, now + self.stride, access.eps(x, now))
        eps_up = access.eps(x, s)
        x_t = schedule.ddim(x, s, t, eps_up)
        eps_down = access.eps(x_t, t)
        (a_s, s_s), (a_t, s_t) = schedule.coefficients(s, x), schedule.coefficients(t, x)
        return ((s_s - a_s * s_t / a_t) * (eps_down - eps_up))[:, None]
