"""One task of a training whose losses and averaged weights are kept: python -m tests.cluster.losses FILE STEPS DEVICES NODES [STRATEGY]."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmia_exp import lit, ranks
from diffmia_exp.data import digits
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.recipe import Recipe, TrainerOptions
from tests.attacks.conftest import random_net


def main(file: Path, steps: int, devices: int, nodes: int, strategy: str = "auto") -> None:
    losses: list[float] = []

    class Recorded(lit.Progress):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, module, outputs, *rest)
            losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))  # of the whole batch

    lit.Progress = Recorded  # type: ignore[misc]
    torch.set_num_threads(1)
    options = TrainerOptions(accelerator="cpu", devices=devices, num_nodes=nodes, strategy=strategy, checkpoint_every=50)
    recipe = Recipe(steps=steps, batch_size=16, lr=1e-3, warmup_steps=20)
    with tempfile.TemporaryDirectory() as folder:
        lit.train(Path(folder), Diffusion(random_net(0).train(), linear(1000)), digits().take(np.arange(64)), recipe, options, seed=0)
        if ranks.rank() == 0:
            np.save(file, np.array(losses))
            shutil.copy(Path(folder) / "ema.safetensors", file.with_suffix(".safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), *sys.argv[5:])
