"""The tasks of a SLURM job that trains one model on several devices: the first leads, the others take part in its trainings.

Only the first task (rank 0) asks the store, claims, writes and scores. It tells the others which model it begins to train, and
whether from a checkpoint, over a TCP connection that ends when it ends; so none of them waits for a rank that is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from diffmia_exp.errors import UserError

PORT = 10_000
"""Added to the port of the training's own connection."""


def count() -> int:
    """Tasks of this SLURM job step; 1 where this is none, or a shell in an allocation."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def rank() -> int:
    """Which of them this process is."""
    return int(os.environ["SLURM_PROCID"]) if count() > 1 else 0


class Ranks:
    """The connection between the tasks of one job step; of a single task, nothing."""

    def __init__(self) -> None:
        self._store: Any = None
        self._orders = 0

    def _connect(self) -> None:
        from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        here = SLURMEnvironment(auto_requeue=False)
        try:
            self._store = TCPStore(here.main_address, here.main_port + PORT, count(), rank() == 0, timeout=timedelta(minutes=5))
        except RuntimeError as e:
            raise UserError(f"task {rank()}: no connection to the first task of the job ({str(e).splitlines()[0]})") from None
        self._store.set_timeout(timedelta(days=365))

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """What the first task does; the others are let go in the end."""
        if count() == 1:
            yield
            return
        self._connect()
        try:
            yield
        finally:
            self._tell(None)
            with contextlib.suppress(RuntimeError):  # of those that died
                self._store.wait([f"gone-{other}" for other in range(1, count())], timedelta(seconds=5))
            self._store = None

    def call(self, index: int, resume: bool) -> None:
        """Have the others take part in the training of model `index`."""
        self._tell({"index": index, "resume": resume})

    def _tell(self, order: dict[str, Any] | None) -> None:
        if self._store is not None:
            self._store.set(f"order-{self._orders}", json.dumps(order))
            self._orders += 1

    def orders(self) -> Iterator[tuple[int, bool]]:
        """The trainings to take part in: model and whether from a checkpoint. Ends with the first task.

        Raises:
            UserError: if the first task died.
        """
        self._connect()
        while True:
            try:
                order = json.loads(self._store.get(f"order-{self._orders}"))
            except RuntimeError as e:
                raise UserError(f"task {rank()}: the first task of the job is gone ({str(e).splitlines()[0]})") from None
            self._orders += 1
            if order is None:
                self._store.set(f"gone-{rank()}", "")
                return
            yield order["index"], order["resume"]
