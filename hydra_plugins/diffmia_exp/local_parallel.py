"""hydra/launcher=local_parallel: several cells at a time on this machine, each in a process of its own, each on a GPU of its own.

A cell's process sees its GPU alone, from before CUDA starts; one that is killed takes no other with it.
"""

import logging
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from diffmia_exp import grid
from diffmia_exp.errors import UserError

log = logging.getLogger(__name__)

WITHOUT_GPU = 2
"""Processes where there is no GPU and nothing was said."""


@dataclass
class LocalParallelConf:
    """Settings of the launcher."""

    _target_: str = "hydra_plugins.diffmia_exp.local_parallel.LocalParallel"
    processes: int | None = None


ConfigStore.instance().store(group="hydra/launcher", name="local_parallel", node=LocalParallelConf, provider="diffmia_exp")


class LocalParallel(Launcher):
    """Starts the next cell when one ends.

    Args:
        processes: cells at a time; None for one a GPU.
    """

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all cells; a cell that was killed counts as failed."""
        setup_globals()
        gpus = _gpus()
        places = list(range(self.processes or len(gpus) or WITHOUT_GPU))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(places))))
        folder = Path(str(self.config.hydra.sweep.dir))
        context = multiprocessing.get_context("fork")  # this process holds no torch, and has one thread
        waiting = list(enumerate(job_overrides, initial_job_idx))
        running: dict[Any, tuple[int, int, Any, Connection]] = {}  # by the sentinel of the process
        returns: dict[int, JobReturn] = {}
        log.info("%d cells, %d at a time; their output is in %s/<n>/output.log", len(waiting), len(places), folder)
        try:
            while waiting or running:
                while waiting and places:
                    number, overrides = waiting.pop(0)
                    place = places.pop(0)
                    receiver, sender = context.Pipe(duplex=False)
                    gpu = gpus[place % len(gpus)] if gpus else None
                    process = context.Process(target=self._cell, args=(number, list(overrides), gpu, folder / str(number), sender))
                    process.start()
                    sender.close()
                    running[process.sentinel] = number, place, process, receiver
                    returns[number] = JobReturn(overrides=list(overrides))
                for sentinel in wait(list(running)):
                    number, place, process, receiver = running.pop(sentinel)
                    places.append(place)
                    process.join()
                    _settle(returns[number], folder / str(number), process.exitcode, receiver)
        finally:
            for _, _, process, _ in running.values():
                process.terminate()
            for _, _, process, _ in running.values():
                process.join()
        return [returns[number] for number in sorted(returns)]

    def _cell(self, number: int, overrides: list[str], gpu: str | None, folder: Path, answer: Connection) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        output = os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for stream in (1, 2):
            os.dup2(output, stream)
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
        done = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        answer.send((done.status, done._return_value if done.status == JobStatus.COMPLETED else str(done._return_value)))


def _settle(result: JobReturn, folder: Path, exit_code: int, receiver: Connection) -> None:
    """What became of a cell, from what its process sent, or from how it ended."""
    try:
        result.status, value = receiver.recv()
    except EOFError:
        result.status = JobStatus.FAILED
        value = f"its process was killed by signal {-exit_code}" if exit_code < 0 else f"its process ended with exit status {exit_code}"
        if exit_code == -9:
            value += " (out of memory?)"
        grid.ended(folder, status="failed", overrides=" ".join(result.overrides or []), error=value)
    result.return_value = value if result.status == JobStatus.COMPLETED else UserError(value)
    log.info("cell %s: %s", folder.name, "ended" if result.status == JobStatus.COMPLETED else value)


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; asked without starting CUDA."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu not in ("", "-1")]
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
    return [str(n) for n in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]
