"""A random-weight UNet, images, and a slow, independent way to ask the net: one image at a time, in float64, with numpy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from diffmia_exp.attacks.base import Attack
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.noise import derive, gaussian

T = 1000
BETAS = np.linspace(1e-4, 0.02, T)
A = np.array([np.prod(1 - BETAS[: t + 1]) for t in range(T)])  # alphas_cumprod, by its definition


@dataclass
class Lab:
    """A target in both precisions and what the references need."""

    net: dict[torch.dtype, torch.nn.Module]
    x: torch.Tensor
    ids: torch.Tensor

    def diffusion(self, dtype: torch.dtype = torch.float64) -> Diffusion:
        return Diffusion(self.net[dtype], linear(T), image_shape=(1, 8, 8))

    def eps(self, x_t: np.ndarray, t: int) -> np.ndarray:
        """The float64 net at one image [C, H, W]."""
        with torch.no_grad():
            return self.net[torch.float64](torch.from_numpy(x_t)[None], t).sample[0].numpy()

    def noise(self, n: int, draw: int, seed: int = 0) -> np.ndarray:
        """The noise that belongs to image n."""
        return gaussian(derive(seed, "score"), self.ids[n : n + 1], (1, 8, 8), draw)[0].numpy()

    def check(self, attack: Attack, reference: Callable[[np.ndarray, int], float]) -> None:
        """The attack's scores equal reference(image, its number): to 1e-9 in float64, to 1e-5 in float32."""
        expected = np.array([reference(image.numpy(), n) for n, image in enumerate(self.x)])
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            score: Any = attack.score(attack.access(self.diffusion(dtype)), self.x, self.ids)
            assert score.dtype == torch.float64
            np.testing.assert_allclose(score.numpy(), expected, rtol=tolerance, atol=0)


def random_net(seed: int, channels: tuple[int, ...] = (16, 32), n_classes: int | None = None) -> UNet2DModel:
    torch.manual_seed(seed)
    blocks = len(channels)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * blocks,
        up_block_types=("UpBlock2D",) * blocks,
        norm_num_groups=8,
        add_attention=False,
        num_class_embeds=None if n_classes is None else n_classes + 1,
    )
    return net.eval()


@pytest.fixture(scope="session")
def lab() -> Lab:
    net = random_net(0)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (6, 1, 8, 8), generator=generator)
    pixels[0, 0, 0] = torch.tensor([0, 0, 255, 255, 1, 254, 128, 127])  # both edges of the discretised decoder
    ids = torch.tensor([7, 0, 123456789, 3, 2**40 + 5, 11])
    return Lab({torch.float32: net, torch.float64: copy.deepcopy(net).double()}, pixels.double() / 127.5 - 1, ids)
