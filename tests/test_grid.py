"""Grids: one model a cell, cells that fail or are killed, their being run again, and the view of it all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from diffmia_exp import claims, grid, status
from diffmia_exp.errors import UserError
from diffmia_exp.store import Store
from tests import command
from tests.composing import CONF

QUICK = ["debug=quick", "evaluation=bare", "split.pool=32"]


def statuses(sweep: Path) -> list[str]:
    return [cell.state for cell in grid.cells(sweep)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two targets of one pool, whose cells need three models in five roles, trained by cells of their own."""
    out = tmp_path_factory.mktemp("grid")
    asked = [*QUICK, f"output_dir={out}", "attack=pia,lira", "split.n_models=3", "split.target_index=0,1"]
    done = command.run("-m", *asked, "stage=train")
    assert done.returncode == 0, done.stderr
    return out


def test_each_model_of_a_grid_is_one_cell(trained: Path) -> None:
    (sweep,) = (trained / "sweeps").iterdir()
    assert statuses(sweep) == ["trained"] * 3
    assert sorted(cell.overrides[-1] for cell in grid.cells(sweep)) == ["model_index=0", "model_index=1", "model_index=2"]
    assert len(list((trained / "models").iterdir())) == 3


def test_a_failing_and_a_killed_cell_stop_no_other_and_are_run_again(trained: Path) -> None:
    asked = [*QUICK, f"output_dir={trained}", "split.n_models=3", "stage=attack", "cluster=local_parallel"]
    done = command.run("-m", *asked, "attack=pia", "attack.t=50,1000,60")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("attack.t=1000: must be a whole number of at most 999")
    assert len(re.findall(r"^pia +gray_box", done.stdout, re.MULTILINE)) == 2, "the others are in the table"
    sweep = grid.latest(trained)
    assert statuses(sweep) == ["done", "failed", "done"]
    log = (sweep / "1" / "output.log").read_text()
    assert "must be a whole number" in log
    assert f"again: python run.py --rerun-failed {sweep}" in status.overview(trained)

    again = command.run("--rerun-failed", f"output_dir={trained}", "attack.t=70")  # with what puts it right
    assert again.returncode == 0, again.stderr
    rerun = grid.latest(trained)
    assert rerun != sweep
    (cell,) = grid.cells(rerun)
    assert cell.state == "done"
    assert "attack.t=70" in cell.overrides
    assert not [o for o in cell.overrides if o == "attack.t=1000"]
    nothing = command.run("--rerun-failed", str(rerun))
    assert nothing.returncode == 0
    assert "0 cells failed or were lost" in nothing.stderr


def test_a_killed_process_of_a_cell_is_told_and_takes_no_other_with_it(tmp_path: Path) -> None:
    asked = [*QUICK, f"output_dir={tmp_path}", "stage=train", "training.steps=100000", "cluster=local_parallel"]
    victim = command.start("-m", *asked, "seed=0,1", "training.batch_size=32,0", "cluster.processes=3", err=tmp_path / "err")
    while len(list(tmp_path.glob("models/*.claim/progress.json"))) < 2:
        assert victim.is_alive()
        time.sleep(0.1)
    sweep = grid.latest(tmp_path)
    running = [cell for cell in grid.cells(sweep) if cell.state == "running"]
    view = status.overview(tmp_path)
    assert "running  0: debug=quick" in view
    assert f"{running[0].facts['user']}@{running[0].facts['host']} {running[0].facts['pid']}" in view
    assert re.search(r"models/\w+  training target model 0.* of 100000 steps, \d+%", view)
    os.kill(running[0].facts["pid"], signal.SIGKILL)
    os.kill(running[1].facts["pid"], signal.SIGTERM)
    victim.join(60)
    assert victim.exitcode == 1
    errors = [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("error: ")]
    assert any(line.endswith("its process was killed by signal 9 (out of memory?)") for line in errors)
    assert any(line.endswith("its process ended with exit status 143") for line in errors)
    assert statuses(sweep) == ["failed"] * 4
    partial = {path.name for path in tmp_path.glob("models/*.partial/*")}
    assert "last.ckpt" in partial, "SIGTERM leaves a checkpoint"


def test_every_cell_of_local_parallel_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hydra_plugins.diffmia_exp import local_parallel

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f")
    assert local_parallel._gpus() == ["3", "GPU-8f"]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert local_parallel._gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA X (UUID: GPU-1)'\necho 'GPU 1: NVIDIA X (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert local_parallel._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,9")
    seen = "${oc.env:CUDA_VISIBLE_DEVICES}"
    mistakes = [f"name=gpu-{seen}-with spaces", "seed=0,1,2,3"]  # a mistake that is told with the value
    done = command.run("-m", *QUICK, f"output_dir={tmp_path}", *mistakes, "cluster=local_parallel")
    told = re.findall(r"name=gpu-(\d)-with spaces", "".join(f.read_text() for f in tmp_path.glob("sweeps/*/*/status.json")))
    assert done.returncode == 1
    assert sorted(set(told)) == ["7", "9"]


def test_what_is_no_grid_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of a grid"):
        grid.planned(tmp_path)
    with pytest.raises(UserError, match="holds no grid"):
        grid.latest(tmp_path)
    done = command.run("--rerun-failed", f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/sweeps: holds no grid; give the folder of one\n"


def test_the_view_of_ten_thousand_entries_needs_no_torch(tmp_path: Path) -> None:
    s = Store(tmp_path, "models")
    for n in range(10_000):
        (s.root / f"{n:016x}").mkdir(parents=True)
    cells = [[f"seed={n}"] for n in range(10_000)]
    sweep = tmp_path / "sweeps" / "grid"
    grid.plan(sweep, cells, [], [])
    for n in range(5_000):
        grid_cell = sweep / str(n)
        grid_cell.mkdir()
        (grid_cell / "status.json").write_text(json.dumps({"status": "done" if n % 2 else "failed", "error": "why", "cached": n % 4 == 1}))
    (sweep / "5000").mkdir()
    with claims.claimed(sweep / "5000" / "cell.claim") as held:
        assert held
        line = [sys.executable, "-X", "importtime", "-m", "diffmia_exp.status", str(tmp_path)]
        done = subprocess.run(line, cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = "1250 done, 1250 cached, 1 running, 4999 waiting, 2500 failed"
    assert f"grid: 10000 cells: {counts}" in done.stdout
    assert ".. and 2480 more" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "hydra", "omegaconf", "rich"}


@pytest.mark.parametrize(
    ("given", "nodes", "tasks", "gpus"),
    [
        (["trainer=cpu"], 1, 1, None),
        (["trainer=ddp", "trainer.devices=8", "trainer.num_nodes=2"], 2, 8, 8),
        (["trainer=ddp", "trainer.devices=8", "trainer.num_nodes=2", "stage=attack"], 1, 1, 1),
        (["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"], 1, 2, None),
    ],
)
def test_what_slurm_is_asked_for_follows_from_the_trainer(given: list[str], nodes: int, tasks: int, gpus: int | None) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        asked = compose("config", ["cluster=slurm", "cluster.partition=p", *given], return_hydra_config=True).hydra.launcher
    assert (asked.nodes, asked.tasks_per_node, asked.gpus_per_node, asked.partition) == (nodes, tasks, gpus, "p")
