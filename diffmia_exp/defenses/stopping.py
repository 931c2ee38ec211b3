"""The training that `EarlyStopping` stops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffmia_exp.checkpoints import State
from diffmia_exp.config import Plain
from diffmia_exp.data import Images
from diffmia_exp.diffusion import Diffusion, given
from diffmia_exp.errors import UserError
from diffmia_exp.lit import LitDiffusion
from diffmia_exp.noise import derive, gaussian, generator

if TYPE_CHECKING:
    from diffmia_exp.defenses.early_stopping import EarlyStopping


class StoppedEarly(LitDiffusion):
    """A `LitDiffusion` that watches the loss on images it is not trained on.

    Args:
        args, kwargs: as in `LitDiffusion`.
        public: the images.
        stopping: when to stop.
    """

    def __init__(self, *args: Any, public: Images, stopping: EarlyStopping, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stopping = stopping
        t, noise = validation_draws(self.seed, public, self.diffusion.T, stopping.draws)
        pixels = torch.from_numpy(public.pixels).repeat_interleave(stopping.draws, 0)
        labels = torch.zeros(len(public)) if public.labels is None else torch.from_numpy(public.labels)  # zeros: which nobody heeds
        # No buffers: neither checkpointed nor broadcast over ranks.
        self._validated = pixels, t, noise, labels.long().repeat_interleave(stopping.draws)
        self.best: dict[str, State] = {}
        self.best_step, self.failures, self.stopped_at = 0, 0, 0
        self.lowest = float("inf")

    def get_extra_state(self) -> Plain:
        """What a checkpoint holds beside the weights, so that a resumed training stops where an undisturbed one does."""
        return {name: getattr(self, name) for name in ("best", "best_step", "failures", "stopped_at", "lowest")}

    def set_extra_state(self, state: Plain) -> None:
        """See `get_extra_state`."""
        for name, value in state.items():
            setattr(self, name, value)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, and where one is due a measurement: before a checkpoint is saved, which is to hold its outcome."""
        step = self.global_step + 1
        super().optimizer_step(*args, **kwargs)
        if step % self.stopping.every and step != self.recipe.steps:
            return
        loss = self.trainer.strategy.broadcast(self.validation_loss())  # ranks must agree
        if not self.best and not math.isfinite(loss):
            raise UserError(f"the loss on public images is not finite after {step} steps; lower training.lr")
        if loss < self.lowest - self.stopping.min_delta:
            self.lowest, self.best_step, self.failures = loss, step, 0
            self.best = {name: {k: v.detach().cpu().clone() for k, v in state.items()} for name, state in self.current().items()}
        else:
            self.failures += 1
        if self.failures >= self.stopping.patience and step < self.recipe.steps:
            self.stopped_at = step
            self.trainer.should_stop = True

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean denoising loss of the averaged weights over all images and draws, in eval mode."""
        averaged = Diffusion(self.ema.eval(), self.diffusion.alphas_cumprod, self.diffusion.prediction)
        size, losses = self.recipe.batch_size, []
        for pixels, t, noise, labels in zip(*(values.split(size) for values in self._validated), strict=True):
            x0 = pixels.to(self.device).float() / 127.5 - 1
            with given(labels.to(self.device)):
                losses.append(averaged.loss(x0, t.to(self.device), noise.to(self.device)))
        self.ema.train()
        return float(torch.cat(losses).double().mean())

    def over(self, step: int) -> bool:
        """See `LitDiffusion`."""
        return bool(self.stopped_at) or super().over(step)

    def outcome_step(self) -> int:
        """See `LitDiffusion`."""
        return self.best_step

    def outcome(self) -> dict[str, State]:
        """See `LitDiffusion`."""
        return self.best

    def facts(self) -> Plain:
        """See `LitDiffusion`."""
        return {"stopped_at": self.stopped_at or self.recipe.steps, "best_step": self.best_step, "validation_loss": self.lowest}


def validation_draws(seed: int, images: Images, T: int, draws: int) -> tuple[Tensor, Tensor]:
    """Timesteps int64 [n * draws] and noises [n * draws, C, H, W], those of an image one after another.

    Of an image's timesteps one lies in each of `draws` equal parts of 0 .. T - 1; in each part, those of the n images are evenly spread.
    """
    n = len(images)
    order = generator(seed, "public", 1).permuted(np.tile(np.arange(n), (draws, 1)), axis=1)
    part = (np.arange(draws)[:, None] + (order + 0.5) / n) / draws
    t = torch.from_numpy((part * T).astype(np.int64).T.reshape(-1).copy())
    ids = torch.from_numpy(images.sample_id).repeat_interleave(draws)
    noise = gaussian(derive(seed, "public", 1), ids, images.pixels.shape[1:], torch.arange(draws).repeat(n))
    return t, noise.float()
