"""What a training leaves in its folder while it goes on and when it ends: checkpoints to resume from, snapshots, weights."""

from __future__ import annotations

import errno
import logging
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from diffmia_exp.lit import LitDiffusion

log = logging.getLogger(__name__)

CHECKPOINT = "last.ckpt"

State = dict[str, Tensor]
"""A network's state dict."""


class KeepWeights(pl.Callback):
    """Checkpoints to resume from, snapshots, and the final weights, all below one folder.

    Args:
        folder: the store's.
        every: steps between two checkpoints.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every

    @property
    def checkpoint(self) -> Path:
        """Where training resumes from."""
        return self.folder / CHECKPOINT

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        module, step = cast("LitDiffusion", module), trainer.global_step
        if step in module.recipe.snapshots:
            weights = module.current()
            if trainer.is_global_zero:
                save_weights(weights, self.folder, f"step{step:07d}-")
        if step % self.every == 0 and not module.over(step):
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint, so that it is whole or as it was; all ranks together."""
        if not self.folder.is_dir():  # Lightning would make it anew, in what is left of a lost file system
            raise OSError(errno.ESTALE, "the folder has vanished", str(self.folder))
        unfinished = self.checkpoint.with_suffix(f".{os.getpid()}.tmp")  # of this process alone, should another think it is its turn
        trainer.save_checkpoint(unfinished)
        if trainer.is_global_zero:
            os.replace(unfinished, self.checkpoint)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module = cast("LitDiffusion", module)
        if module.over(trainer.global_step):
            weights = module.outcome()
            if trainer.is_global_zero:
                save_weights(weights, self.folder)


def save_weights(weights: dict[str, State], folder: Path, prefix: str = "") -> None:
    """Weights as safetensors, by their names."""
    for name, state in weights.items():
        path = folder / f"{prefix}{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def resumable(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from. A damaged one is removed, with a warning."""
    path = folder / CHECKPOINT
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as content:
            damaged = content.testzip() is not None  # torch itself does not look at the checksums
    except zipfile.BadZipFile:
        damaged = True
    if damaged:
        log.warning("%s: the checkpoint is damaged; training begins anew", path)
        path.unlink()
    return not damaged
