"""A network of two layers that learns images by heart within seconds, and what trains it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffmia_exp import lit
from diffmia_exp.data import Pixels
from diffmia_exp.defenses.base import Defense
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.lit import LitDiffusion
from diffmia_exp.recipe import Recipe, TrainerOptions


class Toy(nn.Module):
    """8 x 8 grey images [B, 1, 8, 8] and timesteps [B] to predictions."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(65, width), nn.Linear(width, 64)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        seen = torch.cat([x.flatten(1), t[:, None].to(x) / 1000], 1)
        return self.last(self.dropout(torch.relu(self.first(seen)))).reshape(x.shape)


def canaries(n: int, seed: int = 0) -> Pixels:
    """Images of independent pixels: nothing can be known of one but by heart."""
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 8, 8)).astype(np.uint8)


def made(net: nn.Module, pixels: Pixels, recipe: Recipe, defense: Defense, seed: int = 0, alphas_cumprod: Tensor | None = None) -> Any:
    """The Lightning module of a defence, as `lit.train` makes it."""
    schedule = linear(1000) if alphas_cumprod is None else alphas_cumprod
    return defense.lit(None)(Diffusion(net, schedule), pixels, recipe, seed, 0, defense)  # type: ignore[arg-type]


def trained(
    folder: Path,
    net: nn.Module,
    pixels: Pixels,
    recipe: Recipe,
    defense: Defense,
    seed: int = 0,
    alphas_cumprod: Tensor | None = None,
    options: TrainerOptions | None = None,
) -> Path:
    """The folder that `lit.train` leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    schedule = linear(1000) if alphas_cumprod is None else alphas_cumprod
    options = options or TrainerOptions(accelerator="cpu", checkpoint_every=2)
    lit.train(folder, Diffusion(net, schedule), pixels, recipe, options, seed, made=partial(defense.lit(None), defense=defense))  # type: ignore[arg-type]
    return folder


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, module: type[LitDiffusion]) -> None:
    """Have the next training end at a step with an error."""
    before = module.training_step

    def training_step(self: LitDiffusion, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == step:
            raise KeyboardInterrupt
        return before(self, batch, batch_idx)

    monkeypatch.setattr(module, "training_step", training_step)
