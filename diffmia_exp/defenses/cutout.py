"""Cutout: DeVries & Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017 (arXiv 1708.04552)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import number


class Cutout(Defense):
    """A square of each training image is grey: x[c, i, j] = 0 where |i - u| and |j - v| are below half its side.

    The centre (u, v) is drawn anew at every step, any pixel with the same probability, so that parts of a square may lie outside the
    image (section 3.2). Duan et al. 2023 (arXiv 2302.01316) report its effect on attacks on diffusion models.

    Args:
        side: of the square, as a share of the image's shorter side; a pixel at least.
    """

    def __init__(self, side: float = 0.5) -> None:
        self.side = number("side", side, above=0, most=1)

    def augmented(self, x0: Tensor, g: torch.Generator) -> Tensor:
        """See `Defense`."""
        b, _, h, w = x0.shape
        side = max(1, round(self.side * min(h, w)))
        covered = [_covered(length, torch.randint(length, (b,), generator=g), side) for length in (h, w)]
        square = covered[0][:, None, :, None] & covered[1][:, None, None, :]
        return x0.masked_fill(square.to(x0.device), 0)


def _covered(length: int, centre: Tensor, side: int) -> Tensor:
    """Which of so many pixels [B, length] lie in the `side` pixels round each centre [B]."""
    first = (centre - side // 2)[:, None]
    pixel = torch.arange(length)
    return (pixel >= first) & (pixel < first + side)
