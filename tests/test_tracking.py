"""What is logged to W&B, read back with W&B's own reader from the offline runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffmia_exp import metrics
from diffmia_exp.pipeline import run
from diffmia_exp.scores import ScoreTable
from diffmia_exp.tracking import Wandb
from diffmia_exp.tracking.tables import ROC_ROWS, roc_rows
from tests.composing import composed


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("tracked")
    config = composed("debug=quick", "split.pool=32", "tracking=wandb", "tracking.tags=[t1]", "trainer.log_every=1", f"output_dir={out}")
    return out, run(config, sweep="my-sweep")


def wandb(*arguments: str) -> str:
    done = subprocess.run([Path(sys.executable).with_name("wandb"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout or done.stderr


def records(out: Path, run_id: str) -> dict[str, list[dict[str, Any]]]:
    """The records of an offline run by their type."""
    (folder,) = (out / "wandb").glob(f"offline-run-*-{run_id}")
    found: dict[str, list[dict[str, Any]]] = {}
    for line in wandb("leet", "inspect", "--json", str(folder / f"run-{run_id}.wandb")).splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def test_the_attack_can_be_read_back(tracked: tuple[Path, Any]) -> None:
    out, result = tracked
    found = records(out, result["run_key"])
    (run_record,) = found["run"]
    assert run_record["job_type"] == "attack"
    assert run_record["run_group"] == "my-sweep"
    assert run_record["tags"] == ["t1"]
    assert run_record["display_name"] == result["name"]
    config = run_record["config"]["update"]
    assert {k: config["attack"][k] for k in ("name", "t", "p", "select")} == {"name": "pia", "t": 200, "p": 4, "select": "published"}
    assert config["train_key"] == result["train_key"]
    text = json.dumps(found)
    assert "_target_" not in text
    for key in ("roc", "scores", "samples", "score_table", "roc_table"):
        assert key in json.dumps(found["history"]), key
    summary = json.loads(wandb("leet", "inspect", "--summary", "--json", str(next((out / "wandb").glob(f"*-{result['run_key']}/*.wandb")))))
    flat = json.dumps(summary)
    for key in ("test/auc", "test/auc_low", "cost/nfe_per_image", "test/balanced_accuracy"):
        assert key.split("/")[1] in flat, key
    assert f"scores-{result['run_key']}" in text
    media = next((out / "wandb").glob(f"*-{result['run_key']}")) / "files" / "media"
    assert len(list(media.rglob("*.png"))) == 3
    tables = {f.name.split("_0_")[0].split("_1_")[0]: json.loads(f.read_text()) for f in media.rglob("*.table.json")}
    assert tables["score_table"]["columns"] == ["sample_id", "is_member", "score"]
    assert result.folder is not None
    table = ScoreTable.load(result.folder / "scores.parquet")
    assert [row[0] for row in tables["score_table"]["data"]] == table.sample_id.tolist()
    np.testing.assert_array_equal([row[2] for row in tables["score_table"]["data"]], table.score)


def test_the_training_can_be_read_back(tracked: tuple[Path, Any]) -> None:
    out, result = tracked
    found = records(out, result["train_key"])
    assert found["run"][0]["job_type"] == "train"
    history = json.dumps(found["history"])
    assert history.count("train/loss") >= 4 or history.count('"loss"') >= 4
    assert f"model-{result['train_key']}" in json.dumps(found)


def test_nothing_is_logged_twice_and_a_later_wish_is_honoured(tmp_path: Path) -> None:
    quiet = composed("debug=quick", "split.pool=32", f"output_dir={tmp_path}")
    assert run(quiet).tracked is None
    assert not (tmp_path / "wandb").exists()
    wished = composed("debug=quick", "split.pool=32", "tracking=wandb", f"output_dir={tmp_path}")
    assert run(wished).tracked is not None
    again = run(wished)
    assert again.tracked is None
    assert again.cached
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_the_printed_sync_command_finds_the_runs(tracked: tuple[Path, Any]) -> None:
    out, result = tracked
    folders = [str(f) for f in (out / "wandb").glob("offline-run-*")]
    listed = wandb("sync", "--yes", "--dry-run", *folders)
    assert result["run_key"] in listed
    assert result["train_key"] in listed


@pytest.mark.parametrize(
    ("config", "variable", "expected"), [(None, None, "offline"), (None, "online", "online"), ("offline", "online", "offline")]
)
def test_mode(config: str | None, variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert Wandb(mode=config).effective_mode == expected


def test_the_roc_table_is_exact_where_fpr_is_low() -> None:
    rng = np.random.default_rng(0)
    n = 30000
    table = ScoreTable(np.arange(n), rng.random(n) < 0.5, rng.standard_normal(n))
    curve, rows = metrics.roc(table.is_member, table.score), np.array(roc_rows(table))
    low = curve.fpr <= 0.01
    np.testing.assert_array_equal(rows[: low.sum(), 0], curve.fpr[low])
    np.testing.assert_array_equal(rows[: low.sum(), 1], curve.tpr[low])
    assert len(rows) == low.sum() + ROC_ROWS
    assert tuple(rows[-1, :2]) == (1, 1)
