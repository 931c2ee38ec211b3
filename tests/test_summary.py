"""What the terminal says when a grid has ended, or was interrupted."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from diffmia_exp import summary
from diffmia_exp.report.__main__ import main as report
from tests import command

QUICK = ("debug=quick", "evaluation=bare", "split.pool=32")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Eight cells: two give a result, one of which was there before; two are not applicable; four fail."""
    out = tmp_path_factory.mktemp("grid")
    line = ["-m", *QUICK, f"output_dir={out}"]
    assert command.run(*line, "attack=loss", "attack.t=100").returncode == 0
    return out, command.run(*line, "attack=loss,pia", "threat_model=gray_box,samples_only", "attack.t=100,5000")


def test_the_best_attack_comes_first_then_what_gave_no_result(grid: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = grid
    assert done.returncode == 1
    heading, *lines = done.stdout.splitlines()
    assert heading.split()[:3] == ["attack", "threat", "model"]
    aucs = {(r := json.loads(f.read_text()))["attack"]: r.get("auc") for f in out.glob("runs/*gray_box*/metrics.json")}
    assert [line.split()[0] for line in lines[:2]] == sorted(aucs, key=lambda attack: -aucs[attack])
    assert {line.split()[0]: "found" in line for line in lines[:2]} == {"loss": True, "pia": False}
    refused = [f"not applicable: threat_model=samples_only: attack={attack} needs gray_box access" for attack in ("loss", "pia")]
    assert [line.split(";")[0] for line in lines[2:4]] == refused
    assert lines[4] == "8 cells: 2 done (1 of them cached), 4 failed, 2 not applicable"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == done.stderr.splitlines()[-4:]
    assert all(error.endswith("attack.t=5000: must be a whole number of at most 999") for error in errors)


def test_the_command_that_is_printed_writes_the_report(grid: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    told = grid[1].stdout.splitlines()[-1]
    assert told.startswith("report: python -m diffmia_exp.report ")
    line = shlex.split(told.removeprefix("report: "))
    report(line[3:])
    text = Path(line[-1], "report.html").read_text()
    assert "attack=loss needs gray_box access" in text
    assert "must be a whole number of at most 999" in text


def test_an_interrupted_grid_tells_what_it_has(tmp_path: Path) -> None:
    out, err = tmp_path / "out.txt", tmp_path / "err.txt"
    slow = ["trainer.checkpoint_every=10", "training.steps=4,100000", f"output_dir={tmp_path}", "stage=all"]
    process = command.start("-m", *QUICK, *slow, out=out, err=err)
    while not list(tmp_path.glob("models/*.partial/last.ckpt")) or not list(tmp_path.glob("sweeps/*/0/status.json")):
        assert process.is_alive(), err.read_text()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert "pia " in out.read_text()
    assert "2 cells: 1 done, 1 not finished" in out.read_text()
    assert err.read_text().splitlines()[-1] == "interrupted; the same command goes on from the last checkpoint"


def test_a_grid_of_hundreds_of_cells_fits_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"threat_model": "gray_box", "dataset": "digits", "auc_ci": [0.4, 0.6], "tpr_at_fpr": {}, "nfe_per_image": 1, "seconds": 1.0}
    for n in range(260):
        cell, run = tmp_path / "sweep" / str(n), tmp_path / f"run{n}"
        cell.mkdir(parents=True)
        if n >= 200:
            (cell / "status.json").write_text(json.dumps({"status": "failed", "overrides": f"seed={n}", "error": f"mistake {n % 2}"}))
            continue
        run.mkdir()
        result = {"status": "done", "attack": "pia", "seed": n, "auc": 0.5 + n / 1000, "sound": None} | facts
        (run / "metrics.json").write_text(json.dumps(result))
        status = {"status": "done", "cached": n < 50, "overrides": "x", "given": [f"a.b=[x{n}]"], "folder": str(run)}
        (cell / "status.json").write_text(json.dumps(status))
    failed = summary.sweep(tmp_path / "sweep")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[1:21]] == [str(n) for n in range(199, 179, -1)]
    assert "a.b=[x199]" in lines[1], "brackets are no markup"
    assert lines[21] == "and 180 more cells, down to an AUC of 0.500"
    assert lines[22] == "260 cells: 200 done (50 of them cached), 60 failed"
    assert len(lines) == 24
    assert summary.told(failed) == ["seed=200: mistake 0 (and 29 more cells)", "seed=201: mistake 1 (and 29 more cells)"]
    many = summary.told((f"seed={n}", f"mistake {n}") for n in range(50))
    assert len(many) == summary.MOST + 1
    assert many[-1] == "30 more cells, each with its reason in its status.json or metrics.json"
