"""How a model is trained, and where: plain settings, checked without importing Lightning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from diffmia_exp.errors import ConfigError, choice, flag, number, whole

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
STRATEGIES = ("auto", "ddp", "ddp_spawn", "fsdp")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; all of it is part of the store key.

    Args:
        steps: optimiser steps.
        batch_size: images per step, over all devices together.
        optimizer: `adam` or `adamw`.
        lr: learning rate after the warm-up; not scaled with batch size or devices.
        weight_decay: of the optimiser.
        warmup_steps: steps over which the learning rate rises linearly.
        grad_clip: largest norm of the gradient; 0 for no clipping.
        flip: mirror each training image with probability 1/2.
        ema_decay: of the weight average; None for an average over the last twentieth of the run, 1 - 20 / steps, at most .9999. While
            the run is young the decay is (1 + step) / (10 + step), so that the average forgets the initialisation.
        snapshots: steps after which the weights are kept as well, so that attacks can be run along training.
        label_dropout: of a conditional model: the probability that an image is trained on under the null label, so that the model also
            learns to do without (Ho & Salimans 2022, algorithm 1).
    """

    steps: int
    batch_size: int
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 0
    grad_clip: float = 1.0
    flip: bool = False
    ema_decay: float | None = None
    snapshots: list[int] = field(default_factory=list)
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        whole("steps", self.steps, least=1)
        whole("batch_size", self.batch_size, least=1)
        choice("optimizer", self.optimizer, OPTIMIZERS)
        number("lr", self.lr, above=0)
        number("weight_decay", self.weight_decay, least=0)
        whole("warmup_steps", self.warmup_steps, least=0)
        number("grad_clip", self.grad_clip, least=0)
        flag("flip", self.flip)
        if self.ema_decay is not None:
            number("ema_decay", self.ema_decay, least=0, most=1)
        if not isinstance(self.snapshots, list):
            raise ConfigError("snapshots", self.snapshots, "must be a list of steps, as [100,200]")
        for step in self.snapshots:
            whole("snapshots", step, least=1, most=self.steps)
        number("label_dropout", self.label_dropout, least=0, most=1)

    def ema_decay_at(self, step: int) -> float:
        """The decay that the average uses after `step` optimiser steps."""
        final = max(0.0, min(0.9999, 1 - 20 / self.steps)) if self.ema_decay is None else self.ema_decay
        return min(final, (1 + step) / (10 + step))


@dataclass(frozen=True)
class TrainerOptions:
    """Where and how training runs. Only `precision` changes the weights by more than rounding, and is part of the store key.

    Args:
        accelerator, devices, num_nodes, precision: as in `pytorch_lightning.Trainer`.
        strategy: `auto`, `ddp`, `ddp_spawn` or `fsdp`. With several devices `auto` is `ddp` where SLURM started a task for each, and
            `ddp_spawn`, which starts its own processes, elsewhere. With `fsdp` each of SLURM's tasks holds a part of the weights.
        checkpoint_every: steps between two checkpoints to resume from.
        log_every: steps between two logged losses.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    checkpoint_every: int = 100
    log_every: int = 20

    def __post_init__(self) -> None:
        choice("accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ConfigError("accelerator", "gpu", "no GPU is usable here; use trainer=cpu")
        if self.devices != "auto":
            whole("devices", self.devices, least=1)
        whole("num_nodes", self.num_nodes, least=1)
        choice("strategy", self.strategy, STRATEGIES)
        choice("precision", self.precision, ("32-true", "bf16-mixed", "16-mixed"))
        whole("checkpoint_every", self.checkpoint_every, least=1)
        whole("log_every", self.log_every, least=1)

    @property
    def world(self) -> int | None:
        """Processes that train a model together; None where Lightning counts the devices."""
        return self.devices * self.num_nodes if isinstance(self.devices, int) else None

    def alone(self) -> TrainerOptions:
        """The same on one device."""
        return replace(self, devices=1, num_nodes=1, strategy="auto")

    def check_launch(self, tasks: int) -> None:
        """Refuse what cannot be launched from here.

        Args:
            tasks: that SLURM started for this job.

        Raises:
            ConfigError: naming the way out.
        """
        if tasks > 1:
            if self.world != tasks:
                must = f"must make up the job's {tasks} tasks, one a device (trainer.devices times trainer.num_nodes)"
                raise ConfigError("devices", self.devices, must)
            if self.strategy == "ddp_spawn":
                raise ConfigError("strategy", "ddp_spawn", f"would start processes beside the job's {tasks} tasks; use auto")
        elif self.num_nodes > 1:
            raise ConfigError("num_nodes", self.num_nodes, "needs a SLURM task for every device; add cluster=slurm")
        elif self.strategy in ("ddp", "fsdp") and self.devices != 1:
            must = "would start this command, and with it the whole grid, once more for each device; use auto, or cluster=slurm"
            raise ConfigError("strategy", self.strategy, must)
