"""Training a diffusion model with Lightning: what a model's weights depend on, and nothing else.

Batch indices, timesteps, noise, flips and dropped labels are pure functions of (seed, model index, step). A run that was killed goes
on from its last checkpoint and ends with the same bits, and a run on more devices sees the same draws.
"""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment  # type: ignore[attr-defined]
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils.data import DataLoader

from diffmia_exp import ranks, sharding
from diffmia_exp.checkpoints import KeepWeights, State, resumable
from diffmia_exp.claims import write_atomic
from diffmia_exp.config import Plain
from diffmia_exp.data import Ids, Pixels
from diffmia_exp.defenses.base import Defense
from diffmia_exp.diffusion import Diffusion, given
from diffmia_exp.errors import ConfigError
from diffmia_exp.interruption import Interruption
from diffmia_exp.noise import derive, generator
from diffmia_exp.progress import Bar
from diffmia_exp.recipe import OPTIMIZERS, Recipe, TrainerOptions

log = logging.getLogger(__name__)


def on_device(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, copied without waiting; from pageable memory a copy to a GPU waits for all that the GPU has to do."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


class LitDiffusion(pl.LightningModule):
    """A `Diffusion`, its optimiser and its weight average.

    Args:
        diffusion: trained in place.
        pixels: uint8 [n, C, H, W], the members.
        recipe: see `Recipe`.
        seed, model_index: what every draw is a function of.
        defense: what augments the batches.
        labels: int64 [n], the members' classes, for a conditional model.
    """

    parallel: bool = True
    """Whether several devices may train it together."""

    def __init__(
        self,
        diffusion: Diffusion,
        pixels: Pixels,
        recipe: Recipe,
        seed: int,
        model_index: int,
        defense: Defense | None = None,
        labels: Ids | None = None,
    ) -> None:
        super().__init__()
        self.defense = defense or Defense()
        self.diffusion = diffusion
        self.ema = copy.deepcopy(diffusion.net).requires_grad_(False)
        self.recipe, self.seed, self.model_index = recipe, seed, model_index
        self._pixels = torch.from_numpy(pixels)  # no buffer: neither checkpointed nor broadcast over ranks
        self._labels = None if labels is None else torch.from_numpy(labels)
        self._orders: dict[int, Tensor] = {}

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for net in (self.diffusion.net, self.ema):
                sharding.shard(net, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        self._pixels = self._pixels.to(self.device)

    def train_dataloader(self) -> DataLoader[int]:
        # The batches are drawn by `draws`; Lightning only needs something to count.
        return DataLoader(range(self.recipe.steps), batch_size=None)  # type: ignore[arg-type]

    def draws(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the whole batch of `step` consists of.

        Returns:
            indices of the members int64 [B], timesteps int64 [B], noise [B, C, H, W], flips bool [B], on the CPU.
        """
        n, b = len(self._pixels), self.recipe.batch_size
        position = torch.arange(step * b, (step + 1) * b)
        epochs = position // n
        orders = {e: self._order(e) for e in range(int(epochs[0]), int(epochs[-1]) + 1)}
        index = torch.cat([order[position[epochs == e] % n] for e, order in orders.items()])
        g = torch.Generator().manual_seed(derive(self.seed, "step", self.model_index, step))
        t = torch.randint(self.diffusion.T, (b,), generator=g)
        noise = torch.randn((b, *self._pixels.shape[1:]), generator=g)
        return index, t, noise, torch.rand(b, generator=g) < 0.5

    def labels(self, step: int, index: Tensor) -> Tensor | None:
        """What the batch of `step`, members `index` [B], is trained under: labels int64 [B], some dropped; None without labels."""
        if self._labels is None:
            return None
        g = torch.Generator().manual_seed(derive(self.seed, "step", self.model_index, step, 2))
        dropped = torch.rand(self.recipe.batch_size, generator=g) < self.recipe.label_dropout
        return torch.where(dropped, torch.tensor(self.diffusion.n_classes), self._labels[index])

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            order = generator(self.seed, "order", self.model_index, epoch).permutation(len(self._pixels))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: torch.from_numpy(order)}
        return self._orders[epoch]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step, rank, world = self.global_step, self.global_rank, self.trainer.world_size
        torch.manual_seed(derive(self.seed, "step", self.model_index, step, rank, 1))  # for dropout
        mine = slice(rank * self.recipe.batch_size // world, (rank + 1) * self.recipe.batch_size // world)
        draws = self.draws(step)
        labels = self.labels(step, draws[0])
        index, t, noise, flips = (on_device(d, self.device) for d in draws)
        x0 = self._pixels[index].float() / 127.5 - 1
        if self.recipe.flip:
            x0 = torch.where(flips[:, None, None, None], x0.flip(-1), x0)
        g = torch.Generator().manual_seed(derive(self.seed, "augment", self.model_index, step))
        x0 = self.defense.augmented(x0, g)  # the whole batch on every rank, so that all see the same draws
        with given(None if labels is None else labels[mine]):
            return self.loss(x0[mine], t[mine], noise[mine], index[mine]).mean()

    def loss(self, x0: Tensor, t: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """What is minimised, per image [B], at the images [B, C, H, W] of these indices among the members."""
        return self.diffusion.loss(x0, t, noise)

    def over(self, step: int) -> bool:
        """Whether the training is over after so many steps; the same on every rank."""
        return step >= self.recipe.steps

    def outcome_step(self) -> int:
        """The step whose weights are the outcome."""
        return self.recipe.steps

    def outcome(self) -> dict[str, State]:
        """The weights that are the outcome, `raw` and `ema`; asked of all ranks together."""
        return self.current()

    def current(self) -> dict[str, State]:
        """The weights as they are now, `raw` and `ema`; asked of all ranks together."""
        whole = torch.nn.Module.state_dict if self.device_mesh is None else sharding.whole
        return {"raw": whole(self.diffusion.net), "ema": whole(self.ema)}

    def facts(self) -> Plain:
        """What `training.json` is to say of the defence, once the training is over."""
        return {}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.global_step + 1
        super().optimizer_step(*args, **kwargs)
        # Here, not at the end of the batch: there the callbacks come first, and would keep an average that lacks this step.
        self.average(step)

    def average(self, step: int) -> None:
        """Take the weights after `step` optimiser steps into the average."""
        averages: list[Tensor] = [*self.ema.parameters()]
        weights: list[Tensor] = [*self.diffusion.net.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - self.ema_decay(step))
            for average, now in zip(self.ema.buffers(), self.diffusion.net.buffers(), strict=True):
                average.copy_(now)

    def ema_decay(self, step: int) -> float:
        """The decay of the average after `step` optimiser steps."""
        return self.recipe.ema_decay_at(step)

    def optimizer(self) -> torch.optim.Optimizer:
        """What the recipe asks for."""
        r = self.recipe
        # Lightning refuses to clip before a fused step in mixed precision, whether gradients are scaled or not.
        fused = self.trainer.precision == "32-true" and self.device.type in ("cpu", "cuda")
        return OPTIMIZERS[r.optimizer](self.diffusion.net.parameters(), lr=r.lr, weight_decay=r.weight_decay, fused=fused)  # type: ignore[call-arg]

    def configure_optimizers(self) -> Any:
        optimizer, r = self.optimizer(), self.recipe
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, r.warmup_steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class Progress(pl.Callback):
    """What is trained, how far it is, the smoothed loss, the time left. The loss also goes to the logger."""

    def __init__(self, label: str, every: int, folder: Path | None = None) -> None:
        self.label, self.every, self.folder = label, every, folder
        self.smooth: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, LitDiffusion)
        self.epochs_per_step = module.recipe.batch_size / len(module._pixels)
        folder = self.folder if trainer.is_global_zero else None
        self.bar = Bar(self.label, module.recipe.steps, "step", folder, trainer.global_step, hidden=not trainer.is_global_zero)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].detach()
        self.smooth = loss if self.smooth is None else torch.lerp(self.smooth, loss, 0.05)
        self.bar.update()
        if trainer.global_step % self.every == 0:
            epoch = trainer.global_step * self.epochs_per_step
            self.bar.bar.set_postfix_str(f"epoch {epoch:.0f}, loss {float(self.smooth):.4f}", refresh=False)
            if trainer.logger is not None:
                trainer.logger.log_metrics({"train/loss": float(self.smooth), "train/epoch": epoch}, step=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.bar.close()


def _end(children: list[Any]) -> None:
    """Have the processes that ddp_spawn started save and end before this one gives its claim back."""
    for child in children:
        child.terminate()
    for child in children:
        child.join(60)
        child.kill()


def train(
    folder: Path,
    diffusion: Diffusion,
    pixels: Pixels,
    recipe: Recipe,
    options: TrainerOptions,
    seed: int,
    model_index: int = 0,
    label: str = "training",
    logger: Logger | None = None,
    resume: bool | None = None,
    made: Callable[..., LitDiffusion] = LitDiffusion,
) -> None:
    """Train into `folder`, from its `last.ckpt` if there is one.

    Leaves `raw.safetensors`, `ema.safetensors`, both once more for each snapshot as `step<step>-...`, and last `training.json`.

    Args:
        folder: where to; on every rank.
        diffusion: trained in place.
        pixels: uint8 [n, C, H, W], the members.
        recipe, options: how, and on what.
        seed, model_index: what every draw is a function of.
        label: for the progress bar.
        logger: for the loss.
        resume: whether from a checkpoint; None to look. Ranks must agree.
        made: what makes the module of all this, with a defence and with labels where there are any.

    Raises:
        ConfigError: if the devices are not there, or the batch does not divide over them.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    if (folder / "training.json").exists():  # killed when all was done but the last rename
        return
    keep = KeepWeights(folder, options.checkpoint_every)
    resume = resumable(folder) if resume is None else resume
    if resume:
        log.info("%s: going on from the checkpoint of a run that was cut off", label)
    joined = options.world == ranks.count() > 1
    strategy: str | Strategy = options.strategy
    if options.world == 1:
        strategy = "auto"
    elif strategy == "auto":
        strategy = "ddp" if joined else "ddp_spawn"
    elif strategy == "fsdp":
        strategy = sharding.strategy(ranks.count())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that srun is there and not used
        try:
            trainer = pl.Trainer(
                accelerator=options.accelerator,
                devices=options.devices,
                num_nodes=options.num_nodes,
                strategy=strategy,
                # Named, so that variables of an allocation never make Lightning wait for ranks; submitit does the requeuing.
                plugins=[SLURMEnvironment(auto_requeue=False) if joined else LightningEnvironment()],
                precision=options.precision,  # type: ignore[arg-type]
                max_steps=recipe.steps,
                max_epochs=-1,
                gradient_clip_val=recipe.grad_clip or None,
                logger=logger if logger is not None else False,
                callbacks=[keep, Progress(label, options.log_every, folder), Interruption(keep.save)],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=options.log_every,
                default_root_dir=folder,
            )
        except (MisconfigurationException, RuntimeError) as e:
            raise ConfigError("trainer.devices", options.devices, f"cannot be had ({' '.join(str(e).split())})") from e
    if recipe.batch_size % trainer.world_size:
        raise ConfigError("training.batch_size", recipe.batch_size, f"must divide over {trainer.world_size} devices")
    n = trainer.world_size
    log.info(
        "%s: %d images a step (%d on each of %d devices), learning rate %g, never scaled: the same training on any number of devices",
        *(label, recipe.batch_size, recipe.batch_size // n, n, recipe.lr),
    )
    module = made(diffusion, pixels, recipe, seed, model_index)
    if n > 1 and not module.parallel:
        raise ConfigError("trainer.devices", options.devices, f"must be 1 with this defence; there are {n} devices")
    started = time.monotonic()
    others = multiprocessing.active_children()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
            trainer.fit(module, ckpt_path=keep.checkpoint if resume else None)
    except BaseException:
        _end([child for child in multiprocessing.active_children() if child not in others])
        raise
    if not trainer.is_global_zero:
        return
    steps = module.outcome_step()
    facts = {
        "steps": steps,
        "epochs": steps * recipe.batch_size / len(pixels),
        "n_members": len(pixels),
        "seconds": round(time.monotonic() - started, 3),
        "resumed": resume,
        "parameters": sum(p.numel() for p in diffusion.net.parameters()),
        "recipe": asdict(recipe),
    }
    facts |= {"defense": told} if (told := module.facts()) else {}
    write_atomic(folder / "training.json", json.dumps(facts, indent=1))
    keep.checkpoint.unlink(missing_ok=True)
    log.info("%s: %d steps, %.0f epochs of %d images, %.0f s", label, steps, facts["epochs"], len(pixels), facts["seconds"])
