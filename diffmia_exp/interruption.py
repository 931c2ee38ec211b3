"""What a training does when it is told to stop: keep a checkpoint, then let the signal do what it did before."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytorch_lightning as pl

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""What schedulers send before they kill: SLURM at a time-out (submitit asks for USR2) or a preemption (TERM, then USR2); and Ctrl-C."""

AGREE_EVERY = 10
"""Steps between two questions whether any of several ranks was told to stop; all must write the checkpoint at the same step."""


class Interruption(pl.Callback):
    """Saves on SIGTERM, SIGUSR1, SIGUSR2 and SIGINT once the step at hand is done, then hands the signal on.

    The handler that was there before decides what follows: submitit's requeues the job, or lets SIGTERM pass and training goes on;
    the default one ends the process. A KeyboardInterrupt is raised there too, where it cannot be lost in some destructor or callback of
    a library; one that is asked for twice is raised at once.

    Args:
        save: writes a checkpoint; on all ranks at once.
    """

    def __init__(self, save: Callable[[pl.Trainer], None]) -> None:
        self.save = save
        self.before: dict[int, Any] = {}
        self.received: list[int] = []

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        # Here, before Lightning puts in its own, which ends a training that submitit wants to go on, or blocks where ranks disagree.
        if threading.current_thread() is threading.main_thread():
            self.before = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for signum in self.before:
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in self.received:
            self._restore()
            raise KeyboardInterrupt
        self.received.append(signum)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step >= trainer.max_steps or trainer.should_stop or not self._due(trainer):
            return  # the last step is not saved: its weights are, in a moment
        self.save(trainer)
        self._hand_on()

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1:
            return bool(self.received)
        if trainer.global_step % AGREE_EVERY:
            return False
        return trainer.strategy.reduce_boolean_decision(bool(self.received), all=False)

    def _hand_on(self) -> None:
        while self.received:
            signum = self.received.pop(0)
            before = self.before[signum]
            if callable(before):
                before(signum, None)
            elif before != signal.SIG_IGN:
                self._restore()
                os.kill(os.getpid(), signum)

    def _restore(self) -> None:
        for signum, before in self.before.items():
            signal.signal(signum, before)
        self.before = {}

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._hand_on()
        self._restore()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()
