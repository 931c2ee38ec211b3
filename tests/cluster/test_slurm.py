"""Grids and trainings on a real SLURM: what is submitted, interrupted, requeued and cancelled ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffmia_exp import claims, grid, status
from tests.cluster import cluster

QUICK = ["debug=quick", "evaluation=bare", "split.pool=32", "attack=pia"]
LONG = ["stage=train", "training.steps=200", "trainer.checkpoint_every=10"]


started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _none_stays() -> Iterator[None]:
    yield
    for process in started:
        process.kill()
        process.wait()


class Submitted:
    """`python run.py cluster=slurm ..`, which goes on until all tasks have ended."""

    def __init__(self, out: Path, *overrides: str) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        small = ["cluster=slurm", "cluster.cpus=1", "cluster.memory_gb=null", f"output_dir={out}"]
        self.process = subprocess.Popen(
            [sys.executable, "run.py", *small, *QUICK, *overrides], cwd=cluster.ROOT, stdout=self.log.open("w"), stderr=subprocess.STDOUT
        )

        started.append(self.process)

    def until(self, true: Callable[[], object], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text() + cluster.call("squeue")
            time.sleep(0.1)

    def training(self) -> bool:
        """A checkpoint has been written."""
        return bool(list(self.out.glob("models/*.partial/last.ckpt")))

    def hold(self) -> None:
        """Stop the training once a checkpoint has been written, so that it cannot end before it is interrupted."""
        self.until(self.training)
        (claim,) = self.out.glob("models/*.claim")
        os.kill((claims.owner(claim) or {})["pid"], signal.SIGSTOP)
        assert not list(self.out.glob("models/*/DONE"))

    def end(self, seconds: float = 300) -> int:
        """Wait for the exit status. Whatever SLURM puts back into the queue need not wait its two minutes."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            for task in cluster.call("squeue", "-h", "-r", "-t", "PENDING", "-o", "%i %r").splitlines():
                if task.endswith("BeginTime"):
                    cluster.call("scontrol", "update", f"JobId={task.split()[0]}", "StartTime=now")
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.log.read_text() + cluster.call("squeue"))
            time.sleep(0.3)
        return self.process.returncode

    def errors(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self.out.glob("sweeps/*/.submitit/*/*_log.err")))


def task() -> str:
    """The one task there is."""
    return cluster.call("squeue", "-h", "-r", "-o", "%i").strip()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the same training on this machine, without SLURM."""
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run([sys.executable, "run.py", *QUICK, *LONG, f"output_dir={out}"], cwd=cluster.ROOT, check=True, capture_output=True)
    return weights(out)


def weights(out: Path) -> dict[str, bytes]:
    (entry,) = (out / "models").iterdir()
    return {file.name: file.read_bytes() for file in entry.glob("*.safetensors")}


def resumed(out: Path) -> bool:
    (facts,) = out.glob("models/*/training.json")
    return bool(json.loads(facts.read_text())["resumed"])


def test_a_grid_of_models_then_attacks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["attack=pia,lira", "split.n_models=3"]
    train = Submitted(out, *asked, "stage=train")
    train.until(lambda: "running" in status.overview(out) if out.exists() else False)
    view = status.overview(out)
    assert re.search(r"3 cells: .*running", view)
    assert re.search(r"\[root@n[12] \d+, SLURM job \d+, since ", view)
    assert train.end() == 0
    assert [cell.state for cell in grid.cells(grid.latest(out))] == ["trained"] * 3
    assert len(list((out / "models").iterdir())) == 3
    attack = Submitted(out, *asked, "stage=attack")
    assert attack.end() == 0
    assert len(re.findall(r"^(pia|lira) +gray_box", attack.log.read_text(), re.MULTILINE)) == 2, "results of tasks are in the table"
    again = Submitted(out, *asked, "stage=train")
    assert again.end() == 0
    assert "needs 3 models, of which 3 are in the store" in again.log.read_text()
    assert "SLURM array" not in again.log.read_text()


def test_a_requeued_training_goes_on_and_ends_with_the_same_bits(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    submitted = Submitted(tmp_path / "out", *LONG)
    submitted.hold()
    cluster.call("scontrol", "requeue", task())  # which wakes what it ends
    assert submitted.end() == 0
    assert resumed(submitted.out)
    assert weights(submitted.out) == undisturbed


def test_a_requeued_training_over_nodes_in_parts_goes_on(tmp_path: Path) -> None:
    """The checkpoint of weights that lie in parts on two nodes is one of the whole, and is dealt out again."""
    over = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2", "trainer.checkpoint_every=10"]
    train = ["stage=train", "training.steps=60", "training.batch_size=16"]
    submitted = Submitted(tmp_path / "out", *train, *over)
    submitted.hold()
    cluster.call("scontrol", "requeue", task())
    assert submitted.end() == 0
    assert resumed(submitted.out)
    alone = [sys.executable, "run.py", *QUICK, *train, f"output_dir={tmp_path / 'one'}"]
    subprocess.run(alone, cwd=cluster.ROOT, check=True, capture_output=True)
    (one,), (two,) = ((path / "models").iterdir() for path in (tmp_path / "one", submitted.out))
    assert one.name == two.name, "how it is dealt out is no part of the key"
    averaged, expected = (load_file(entry / "ema.safetensors") for entry in (two, one))
    for name, weight in expected.items():
        torch.testing.assert_close(averaged[name], weight, rtol=0, atol=2e-3)


def test_a_training_that_runs_out_of_time_saves_and_is_requeued(tmp_path: Path) -> None:
    """The periodic checkpoint is never reached: what is resumed was written when the signal came."""
    endless = ["stage=train", "training.steps=100000", "trainer.checkpoint_every=50000", "cluster.minutes=2", "cluster.notice=75"]
    submitted = Submitted(tmp_path / "out", *endless)
    submitted.until(lambda: "BeginTime" in cluster.call("squeue", "-h", "-o", "%r"))
    assert submitted.training()
    assert not list(submitted.out.glob("models/*.claim"))
    assert "remaining timeouts" in submitted.errors()
    cluster.call("scontrol", "update", f"JobId={task()}", "StartTime=now")
    submitted.until(lambda: "going on from the checkpoint" in submitted.errors())
    cluster.call("scancel", task())
    assert submitted.end() == 1


def test_a_node_that_dies_loses_nothing(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    submitted = Submitted(tmp_path / "out", *LONG)
    submitted.hold()
    node = cluster.call("squeue", "-h", "-o", "%N").strip()
    cluster.fail(node)
    try:
        assert submitted.end() == 0
    finally:
        cluster.start(node)
    assert resumed(submitted.out)
    assert weights(submitted.out) == undisturbed
    assert {path.name for path in submitted.out.glob("models/*")} == {path.parent.name for path in submitted.out.glob("models/*/DONE")}


def test_a_cancelled_task_fails_alone_and_is_run_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    submitted = Submitted(out, "stage=train", "training.steps=4,100000")
    submitted.until(lambda: list(out.glob("models/*.claim/progress.json")) and len(list(out.glob("models/*/DONE"))) == 1)
    sweep = grid.latest(out)
    (claim,) = out.glob("models/*.claim")
    cluster.call("scancel", str((claims.owner(claim) or {})["slurm_job_id"]))
    assert submitted.end() == 1
    assert [cell.state for cell in grid.cells(sweep)] == ["trained", "failed"]
    assert "ended without a result: cancelled, killed, or its node failed" in submitted.log.read_text()
    again = subprocess.run(
        [sys.executable, "run.py", "--rerun-failed", str(sweep), "training.steps=6"], cwd=cluster.ROOT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert [cell.state for cell in grid.cells(grid.latest(out))] == ["trained"]


@pytest.mark.parametrize(("strategy", "steps"), [("auto", 200), ("fsdp", 60)])
def test_two_nodes_train_as_one_process_does(tmp_path: Path, strategy: str, steps: int) -> None:
    line = [sys.executable, "-m", "tests.cluster.losses"]
    both = ["srun", "--job-name=ddp", "-N2", "-n2", "--ntasks-per-node=1"]
    for command in ([*both, *line, "two.npy", str(steps), "1", "2", strategy], [*line, "one.npy", str(steps), "1", "1"]):
        arguments = [str(tmp_path / a) if a.endswith(".npy") else a for a in command]
        done = subprocess.run(arguments, cwd=cluster.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    two, one = np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy")
    assert len(two) == len(one) == steps
    assert np.abs(two - one).max() < 1e-4
    assert one[-20:].mean() < 0.8 * one[:20].mean(), "it must have learnt something"
    averaged, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("two", "one"))
    for name, weight in expected.items():
        torch.testing.assert_close(averaged[name], weight, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("trainer", "steps"), [("ddp", 100), ("fsdp", 40)])
def test_a_model_trained_over_nodes_is_in_the_store_once_and_attacked(tmp_path: Path, trainer: str, steps: int) -> None:
    """The whole way: claimed and written by the first rank alone, then the AUC of one process within its interval."""
    over = [f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]
    train = [f"training.steps={steps}", "training.batch_size=16"]
    both = Submitted(tmp_path / "both", *over, *train)
    assert both.end() == 0, both.log.read_text()
    one = subprocess.run(
        [sys.executable, "run.py", *QUICK, *train, f"output_dir={tmp_path / 'one'}"], cwd=cluster.ROOT, capture_output=True, text=True
    )
    assert one.returncode == 0, one.stderr
    found = [json.loads(next((tmp_path / name).glob("runs/*/metrics.json")).read_text()) for name in ("both", "one")]
    assert found[0]["train_key"] == found[1]["train_key"], "devices are no part of the key"
    low, high = found[1]["auc_ci"]
    assert low <= found[0]["auc"] <= high
    assert "8 on each of 2 devices" in both.errors()
