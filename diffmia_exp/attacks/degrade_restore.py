"""Degrade, restore, compare: a model restores the images it was trained on from less.

"Model Will Tell: Training Membership Inference for Diffusion Models", 2024 (arXiv 2403.08487), the DRC framework.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffmia_exp.attacks.base import Attack
from diffmia_exp.errors import ConfigError, choice, number, whole
from diffmia_exp.features import Features, chosen
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.threat_models import VariationAPI


class DegradeRestore(Attack):
    """How far an image lies from what the variation service makes of its degraded copy.

    score = -||f(vary(degraded x)) - f(x)||_2^2 with features f

    The paper's framework, on the variation API alone: its own degradations and its guided restoration are not reproduced here. The
    service knows nothing of how the image was degraded; it noises it to strength * T and denoises it. Noise it can remove, blur it
    hardly can: on a UNet that had learned 16 digits of 8 x 8 by heart, `noise` as below told them from 64 others (AUC 1.0); for
    `blur`, at 12 settings of strength, steps and factor, the 95% interval of the AUC never lay above 1/2.

    Args:
        degrade: `noise` (Gaussian, clipped to [-1, 1]) or `blur` (means of factor x factor pixels, interpolated back).
        factor: of `blur`.
        interpolation: of `blur`, `nearest` or `bilinear`.
        sigma: standard deviation of `noise`.
        strength: of the service, in (0, 1].
        steps: DDIM steps back.
        features: a `diffmia_exp.features` class; None for the pixels.
        seed: of all noises.
    """

    access = VariationAPI

    def __init__(
        self,
        degrade: str = "noise",
        factor: int = 2,
        interpolation: str = "bilinear",
        sigma: float = 0.5,
        strength: float = 0.2,
        steps: int = 2,
        features: Features | None = None,
        seed: int = 0,
    ) -> None:
        self.degrade = choice("degrade", degrade, ("blur", "noise"))
        self.factor = whole("factor", factor, least=2)
        self.interpolation = choice("interpolation", interpolation, ("nearest", "bilinear"))
        self.sigma = number("sigma", sigma, above=0)
        self.strength = number("strength", strength, above=0, most=1)
        self.steps = whole("steps", steps, least=1)
        self.features = chosen(features)
        self.seed = whole("seed", seed, least=0)

    def nfe(self, T: int) -> int:
        whole("steps", self.steps, most=max(round(self.strength * T), 1))
        return self.steps

    def degraded(self, x: Tensor, sample_id: Tensor) -> Tensor:
        """The degraded images [B, C, H, W]."""
        if self.degrade == "noise":
            return (x + self.sigma * gaussian(derive(self.seed, "score"), sample_id, tuple(x.shape[1:]))).clamp(-1, 1)
        # Windows at the lower and right edge may be cut off; those are means of fewer pixels.
        small = F.avg_pool2d(x, self.factor, ceil_mode=True)
        return F.interpolate(small, size=x.shape[2:], mode=self.interpolation)

    def check(self, image_shape: tuple[int, ...]) -> None:
        self.features.check(image_shape)
        if self.degrade == "blur" and self.factor > min(image_shape[1:]):
            raise ConfigError("factor", self.factor, f"must be at most {min(image_shape[1:])}, the side of the images")

    def score(self, access: VariationAPI, x: Tensor, sample_id: Tensor) -> Tensor:
        restored = access.vary(self.degraded(x, sample_id), sample_id, self.strength, self.steps, self.seed)
        return -(self.features(restored) - self.features(x)).square().sum(1)
