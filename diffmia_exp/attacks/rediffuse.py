"""ReDiffuse: an image is varied several times; the mean of a member's variations comes back to it.

Li, Dong, He, Zhang, "Towards Black-Box Membership Inference Attack for Diffusion Models" (arXiv 2405.20771).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmia_exp.attacks.base import Attack
from diffmia_exp.errors import ConfigError, choice, number, whole
from diffmia_exp.heads import judged_by
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import VariationAPI

DISTANCES = ("l2", "ssim", "head")


class ReDiffuse(Attack):
    """How far the mean of an image's variations lies from it.

    l2: score = -||m - x||_2^2, m = mean over variations of vary(x);  ssim: score = SSIM(m, x) (Wang et al. 2004, uniform window,
    K = 0.01 and 0.03, edges reflected, mean over pixels and channels);  head: score = a classifier's probability of membership at
    the map |m - x|, learned from shadow models.

    The paper noises to t = 200 of T = 1000 and returns in DDIM strides of 100; a service takes a strength instead. Strength 0.2
    means the 200th timestep, whose index is 199 when counted from 0 as everywhere in this project, and 2 steps go 199 -> 99 ->
    clean: one index below t = 200, were the paper's t counted from 0. The service clips each variation to [-1, 1].

    Args:
        strength: how far towards noise, in (0, 1].
        steps: DDIM steps back.
        n_variations: variations per image, asked for in one call.
        distance: `l2`, `ssim` or `head` (which needs a shadow model).
        window: side of SSIM's window, odd.
        head: classifier with scikit-learn's interface; None for `cnn_head.ResNetHead` on maps of one channel.
        seed: of the service's noises.
    """

    access = VariationAPI
    compares = False
    judging: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(
        self,
        strength: float = 0.2,
        steps: int = 2,
        n_variations: int = 10,
        distance: str = "l2",
        window: int = 7,
        head: Any = None,
        seed: int = 0,
    ) -> None:
        self.strength = number("strength", strength, above=0, most=1)
        self.steps = whole("steps", steps, least=1)
        self.n_variations = whole("n_variations", n_variations, least=1)
        self.distance = choice("distance", distance, DISTANCES)
        self.window = whole("window", window, least=3)
        if window % 2 == 0:
            raise ConfigError("window", window, "must be odd")
        self.head = head
        self.min_shadows = int(distance == "head")
        self.seed = whole("seed", seed, least=0)

    def check(self, image_shape: tuple[int, ...]) -> None:
        if self.distance == "ssim":
            check_window(self.window, image_shape)

    def check_variations(self, most: int) -> None:
        if self.n_variations > most:
            raise ConfigError(
                "n_variations", self.n_variations, f"must be at most {most}, the variations of an image that the service gives"
            )

    def nfe(self, T: int) -> int:
        whole("steps", self.steps, most=max(round(self.strength * T), 1))
        return self.n_variations * self.steps

    def mean_variation(self, access: VariationAPI, x: Tensor, sample_id: Tensor) -> Tensor:
        """The mean [B, C, H, W] of each image's variations."""
        n = self.n_variations
        draw = torch.arange(n, device=x.device).repeat(len(x))
        varied = access.vary(x.repeat_interleave(n, 0), sample_id.repeat_interleave(n), self.strength, self.steps, self.seed, draw)
        return varied.reshape(len(x), n, *x.shape[1:]).mean(1)

    def signal(self, access: VariationAPI, x: Tensor, sample_id: Tensor) -> Tensor:
        if self.distance != "head":
            return self.score(access, x, sample_id)[:, None]
        return (self.mean_variation(access, x, sample_id) - x).abs().flatten(1)

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        if self.distance != "head":
            return super().judge(signals)
        if self.head is not None:
            return judged_by(self.head, signals)
        from diffmia_exp.cnn_head import ResNetHead

        return judged_by(ResNetHead(), signals)

    def score(self, access: VariationAPI, x: Tensor, sample_id: Tensor) -> Tensor:
        if self.distance == "head":
            return super().score(access, x, sample_id)
        mean = self.mean_variation(access, x, sample_id)
        return ssim(mean, x, self.window) if self.distance == "ssim" else -(mean - x).square().flatten(1).sum(1)


def ssim(a: Tensor, b: Tensor, window: int) -> Tensor:
    """Structural similarity [B] of images [B, C, H, W] in [-1, 1].

    Raises:
        ConfigError: if the window, of which half is reflected at the edges, is too large for the images.
    """
    check_window(window, tuple(a.shape[1:]))
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds to import

    of = structural_similarity_index_measure
    values: Any = of(a, b, gaussian_kernel=False, kernel_size=window, reduction="none", data_range=(-1.0, 1.0))
    return values


def check_window(window: int, image_shape: tuple[int, ...]) -> None:
    """Refuse a window that is too large for images (C, H, W)."""
    side = min(image_shape[1:])
    if window // 2 >= side:
        raise ConfigError("window", window, f"must be below {2 * side} for images of {image_shape[1]}x{image_shape[2]}")
