"""hydra/launcher=slurm: the cells as one SLURM array, through submitit.

Unlike hydra-submitit-launcher's own, it waits for every task, also after one that failed, and asks SLURM's queue rather than its
accounting, which not every cluster has: a task that left the queue without a result is lost, and its cell fails with a reason.
"""

import importlib.util
import logging
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus

from diffmia_exp import grid
from diffmia_exp.errors import UserError

log = logging.getLogger(__name__)

POLL = 2.0
"""Seconds between two questions to the queue."""

GRACE = 10.0
"""Seconds for which a task that left the queue may still have its result on the way, through a network file system."""

if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is not None:
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

    @dataclass
    class SlurmConf(SlurmQueueConf):
        """Settings of the launcher: those of hydra-submitit-launcher."""

        _target_: str = "hydra_plugins.diffmia_exp.slurm.Slurm"
        additional_parameters: dict[str, Any] = field(default_factory=dict)

    ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmConf, provider="diffmia_exp")

    class Slurm(SlurmLauncher):
        """Submits an array and waits for all of it."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Run all cells as tasks of one array; a task that is lost counts as failed."""
            import submitit

            assert self.config is not None
            settings = dict(self.params)
            logs, timeouts = settings.pop("submitit_folder"), settings.pop("max_num_timeout")
            # A rank that fails takes the others of its job with it, instead of leaving them to wait.
            settings["setup"] = ["export SLURM_KILL_BAD_EXIT=1", *(settings.get("setup") or [])]
            plain = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout")
            executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=timeouts)
            executor.update_parameters(**{key if key in plain else f"slurm_{key}": value for key, value in settings.items()})
            folder = Path(str(self.config.hydra.sweep.dir))
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            tasks = [(list(o), "hydra.sweep.dir", n, str(n), Singleton.get_state()) for n, o in zip(numbers, job_overrides, strict=True)]
            try:
                jobs = executor.map_array(self, *zip(*tasks, strict=True))
            except (submitit.core.utils.FailedJobError, FileNotFoundError, RuntimeError) as e:
                raise UserError(f"cluster=slurm: sbatch refuses ({str(e).strip().splitlines()[-1]})") from None
            array = jobs[0].job_id.split("_")[0]
            log.info("%d cells are SLURM array %s; python -m diffmia_exp.status shows them, scancel %s ends them", len(jobs), array, array)
            lost = _wait(jobs)
            return [_outcome(job, job in lost, folder / str(n), o) for job, n, o in zip(jobs, numbers, job_overrides, strict=True)]


def _wait(jobs: Sequence[Any]) -> list[Any]:
    """Return when every job has its result or is lost; the lost ones. Tells why tasks wait."""
    pending, missed = list(jobs), dict.fromkeys((job.job_id for job in jobs), 0.0)
    lost, told = [], ""
    while pending:
        time.sleep(POLL)
        queued = _queued({job.job_id.split("_")[0] for job in pending})
        for job in list(pending):
            if job.paths.result_pickle.exists():
                pending.remove(job)
            elif queued is not None and job.job_id not in queued:
                missed[job.job_id] = missed[job.job_id] or time.monotonic()
                if time.monotonic() - missed[job.job_id] > GRACE:
                    pending.remove(job)
                    lost.append(job)
            else:
                missed[job.job_id] = 0.0
        reasons = ", ".join(sorted({reason for reason in (queued or {}).values() if reason not in ("None", "Priority", "Resources")}))
        if reasons not in ("", told):
            log.info("some tasks wait (%s)", reasons)
            told = reasons
    return lost


def _queued(arrays: set[str]) -> dict[str, str] | None:
    """The tasks of some arrays that are waiting or running, and why they wait; None if SLURM does not say."""
    asked = subprocess.run(["squeue", "-h", "-r", "-o", "%i %r", "-j", ",".join(sorted(arrays))], capture_output=True, text=True)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return None  # the controller does not answer: that says nothing of the jobs
    return dict(line.split(maxsplit=1) for line in asked.stdout.splitlines())


def _outcome(job: Any, lost: bool, folder: Path, overrides: Sequence[str]) -> JobReturn:
    result = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
    try:
        if not lost:
            return job.results()[0]
        why = "ended without a result: cancelled, killed, or its node failed"
    except Exception as e:  # whatever submitit makes of a failure outside of the cell
        why = f"failed ({str(e).strip().splitlines()[-1]})"
    why = f"SLURM job {job.job_id} {why}; see {job.paths.stderr}"
    if not (folder / "status.json").exists():
        grid.ended(folder, status="failed", overrides=" ".join(overrides), error=why)
    result.return_value = UserError(why)
    return result
