"""From a config to a run folder: trained once, scored once, written whole, found again."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score

from diffmia_exp import runs
from diffmia_exp.pipeline import run
from diffmia_exp.scores import ScoreTable
from diffmia_exp.store import Store
from diffmia_exp.threat_models import QueryBudgetExceeded, ThreatModel
from tests import command
from tests.composing import CONF, composed, names

SIX = ["loss", "trajectory", "secmi", "pia", "pian", "sima"]
KEYS = "status attack threat_model dataset seed auc auc_ci tpr_at_fpr nfe_per_image n_members n_nonmembers weights train_key epochs seconds"
FILES = {"metrics.json", "scores.parquet", "config.yaml", "roc.png", "scores.png", "samples.png", "run.log"}
FILES |= {"exposed.npz", "near_copies.npz", "near_copies.png"}


def quick(output_dir: Path, *overrides: str) -> runs.Result:
    pool = [] if any(o.startswith(("split=", "split.pool=")) for o in overrides) else ["split.pool=32"]
    bare = [] if any(o.startswith("evaluation=") for o in overrides) else ["evaluation=bare"]
    return run(composed("debug=quick", f"output_dir={output_dir}", *pool, *bare, *overrides))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The README's grid on a quick setting, and its command line."""
    out = tmp_path_factory.mktemp("grid")
    few = ["debug=quick", "evaluation=bare", "split.pool=32"]
    line = ["-m", *few, f"output_dir={out}", f"attack={','.join(SIX)}", "threat_model=gray_box", "seed=0,1"]
    done = command.run(*line)
    assert done.returncode == 0, done.stderr
    return out, line


def test_a_grid_trains_one_target_a_seed(grid: tuple[Path, list[str]]) -> None:
    out, _ = grid
    assert len(list((out / "models").iterdir())) == 2
    assert len(list((out / "scores").iterdir())) == 12
    assert len(list((out / "samples").iterdir())) == 2
    results = [json.loads(f.read_text()) for f in (out / "runs").glob("*/metrics.json")]
    assert sorted((r["attack"], r["seed"]) for r in results) == sorted((a, s) for a in SIX for s in (0, 1))
    assert {r["status"] for r in results} == {"done"}


def test_its_repeat_trains_and_scores_nothing(grid: tuple[Path, list[str]]) -> None:
    out, line = grid
    kinds = ("models", "scores", "samples", "runs")
    before = {kind: contents(out / kind) for kind in kinds}
    done = command.run(*line)
    assert done.returncode == 0, done.stderr
    assert {kind: contents(out / kind) for kind in kinds} == before
    assert done.stdout.count("found") == 12
    status = [json.loads(f.read_text()) for f in sorted((out / "sweeps").glob("*/*/status.json"))]
    assert [s["cached"] for s in status].count(True) == 12


def test_a_run_folder_keeps_its_contract(grid: tuple[Path, list[str]]) -> None:
    for folder in (grid[0] / "runs").iterdir():
        assert {f.name for f in folder.iterdir()} == FILES
        result = json.loads((folder / "metrics.json").read_text())
        assert set(KEYS.split()) <= set(result)
        assert result["name"] == folder.name
        table = ScoreTable.load(folder / "scores.parquet")
        assert result["auc"] == pytest.approx(roc_auc_score(table.is_member, table.score), rel=1e-12)
        assert (result["n_members"], result["n_nonmembers"]) == (table.is_member.sum(), (~table.is_member).sum())
        assert len(np.unique(table.sample_id)) == 32
        assert result["epochs"] == pytest.approx(4 * 8 / result["n_members"])
        for picture in ("roc", "scores", "samples", "near_copies"):
            with Image.open(folder / f"{picture}.png") as image:
                assert min(image.size) > 300
                assert len(image.convert("L").getcolors() or range(999)) > 20, "an empty picture"
        assert "members" in (folder / "run.log").read_text()


def test_the_config_in_a_run_folder_reproduces_the_run(grid: tuple[Path, list[str]]) -> None:
    folder = next((grid[0] / "runs").glob("secmi-*"))
    result = run(yaml.safe_load((folder / "config.yaml").read_text()))
    assert result.cached
    assert result["name"] == folder.name


def test_what_changes_the_scores_is_computed_again_and_nothing_else(grid: tuple[Path, list[str]]) -> None:
    out = grid[0]
    count = lambda kind: len(list((out / kind).iterdir()))  # noqa: E731
    before = {kind: count(kind) for kind in ("models", "scores", "runs")}
    quick(out, "attack=pia", "threat_model=white_box")  # another view of the same scores
    assert {kind: count(kind) - n for kind, n in before.items()} == {"models": 0, "scores": 0, "runs": 1}
    quick(out, "attack=pia", "attack.t=150")
    quick(out, "attack=pia", "weights=raw")
    assert {kind: count(kind) - n for kind, n in before.items()} == {"models": 0, "scores": 2, "runs": 3}
    quick(out, "attack=pia", "training.lr=0.001")
    assert {kind: count(kind) - n for kind, n in before.items()} == {"models": 1, "scores": 3, "runs": 4}


def test_scores_do_not_depend_on_batch_size_or_on_who_else_is_audited(tmp_path: Path) -> None:
    base = quick(tmp_path, "attack=loss")
    other = quick(tmp_path / "apart", "attack=loss", "evaluation.batch_size=5")  # where no score is stored
    assert base.folder is not None
    assert other.folder is not None
    assert other["scores_sha256"] == base["scores_sha256"]
    table = ScoreTable.load(base.folder / "scores.parquet")
    indices = {"members": table.sample_id[table.is_member].tolist(), "nonmembers": table.sample_id[~table.is_member].tolist()[:5]}
    (tmp_path / "split.json").write_text(json.dumps(indices))
    fewer = quick(tmp_path, "attack=loss", "split=from_file", f"split.path={tmp_path / 'split.json'}")
    assert fewer["train_key"] == base["train_key"], "the same members, so the same model"
    assert fewer.folder is not None
    few = ScoreTable.load(fewer.folder / "scores.parquet")
    all_scores = dict(zip(table.sample_id, table.score, strict=True))
    np.testing.assert_allclose(few.score, [all_scores[i] for i in few.sample_id], rtol=1e-5)


def test_an_altered_run_folder_is_made_again_from_the_store(tmp_path: Path) -> None:
    first = quick(tmp_path)
    assert first.folder is not None
    (first.folder / "scores.parquet").write_bytes(b"damaged")
    again = quick(tmp_path)
    assert not again.cached
    assert again["auc"] == first["auc"]
    assert again["seconds"] == first["seconds"], "scored again, though the store had the scores"


def test_stages_build_on_each_other(tmp_path: Path) -> None:
    trained = quick(tmp_path, "stage=train")
    assert trained["status"] == "trained"
    assert not (tmp_path / "scores").exists()
    attacked = quick(tmp_path, "stage=attack")
    assert attacked["train_key"] == trained["train_key"]
    assert attacked.folder is not None
    (attacked.folder / "roc.png").unlink()
    reported = quick(tmp_path, "stage=report")
    assert reported["scores_sha256"] == attacked["scores_sha256"]
    assert (attacked.folder / "roc.png").exists()


def test_a_snapshot_is_attacked_as_it_was(tmp_path: Path) -> None:
    early = quick(tmp_path, "training.snapshots=[2,4]", "snapshot=2")
    late = quick(tmp_path, "training.snapshots=[2,4]", "snapshot=4")
    end = quick(tmp_path, "training.snapshots=[2,4]")
    assert early["auc"] != late["auc"]
    assert late["scores_sha256"] == end["scores_sha256"]
    assert early["epochs"] == pytest.approx(end["epochs"] / 2)


def test_a_checkpoint_of_ones_own_is_attacked_without_training(tmp_path: Path) -> None:
    trained = quick(tmp_path / "a")
    weights = tmp_path / "a" / "models" / trained["train_key"] / "ema.safetensors"
    audited = quick(tmp_path / "b", f"checkpoint={weights}")
    assert not (tmp_path / "b" / "models").exists()
    assert audited["auc"] == trained["auc"]
    assert audited["train_key"] == f"file-{hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"
    assert audited["epochs"] is None


def test_float64_scoring(tmp_path: Path) -> None:
    single, double = quick(tmp_path), quick(tmp_path, "evaluation.precision=float64")
    assert double["scores_sha256"] != single["scores_sha256"]
    assert double["auc"] == pytest.approx(single["auc"], abs=0.02)


def test_copies_across_the_line_are_counted_and_left_out_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    images[31:36] = images[:5]
    np.savez(tmp_path / "images.npz", images=images)
    np.savez(tmp_path / "split.npz", mia_train_idxs=np.arange(20), mia_eval_idxs=np.arange(20, 40))
    data = ["dataset=arrays", f"dataset.path={tmp_path / 'images.npz'}", "dataset.image_size=8", "dataset.channels=1"]
    split = ["split=from_file", f"split.path={tmp_path / 'split.npz'}"]
    kept = quick(tmp_path / "out", *data, *split)
    assert (kept["duplicates_across_split"], kept["n_members"], kept["n_nonmembers"]) == (5, 20, 20)
    assert "5 non-members are exact copies of members" in caplog.text
    dropped = quick(tmp_path / "out", *data, *split, "evaluation.drop_duplicates=true")
    assert (dropped["duplicates_across_split"], dropped["n_members"], dropped["n_nonmembers"]) == (5, 20, 15)
    assert dropped["train_key"] == kept["train_key"]


def test_an_image_folder_of_any_sizes_runs_the_whole_way(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for n in range(12):
        Image.fromarray(rng.integers(0, 256, (10 + n, 30 - n, 3), dtype=np.uint8)).save(tmp_path / f"{n:02d}.png")
    overrides = ["dataset=image_folder", f"dataset.path={tmp_path}", "dataset.image_size=16", "model=small", "split.pool=12"]
    result = quick(tmp_path / "out", *overrides, "diffusion=cosine", "diffusion.prediction=v", "attack=secmi")
    assert result["n_members"] + result["n_nonmembers"] == 12
    assert result["nfe_per_image"] == 11


def test_any_row_can_play_the_target(tmp_path: Path) -> None:
    targets = [quick(tmp_path, "split.n_models=3", f"split.target_index={i}", "split.shadow_pool=disjoint") for i in (0, 2)]
    assert targets[0]["train_key"] != targets[1]["train_key"]
    assert len(list((tmp_path / "models").iterdir())) == 2


def test_the_budget_is_enforced_while_scoring() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x

    from diffmia_exp.attacks.pia import PIA
    from diffmia_exp.diffusion import Diffusion, linear

    access = ThreatModel("white_box", query_budget=1).grant(Diffusion(Net(), linear(1000)), PIA.access, images=4)
    with pytest.raises(QueryBudgetExceeded, match="8 model evaluations in all, 4 are granted"):
        PIA().score(access, torch.zeros(4, 1, 8, 8, dtype=torch.float64), torch.arange(4))
    assert access.evaluations == 4


def test_incompatible_cells_are_recorded_in_a_grid(tmp_path: Path) -> None:
    cells = ["threat_model=samples_only,gray_box", "attack=pia", "split.pool=32"]
    done = command.run("-m", "debug=quick", f"output_dir={tmp_path}", *cells)
    assert done.returncode == 0, done.stderr
    results = {r["threat_model"]: r for r in (json.loads(f.read_text()) for f in (tmp_path / "runs").glob("*/metrics.json"))}
    assert results["samples_only"]["status"] == "not applicable"
    assert "gray_box or white_box" in results["samples_only"]["reason"]
    assert results["gray_box"]["status"] == "done"


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    overrides = ["debug=quick", "split.pool=32", "stage=train", "training.steps=60", "trainer.checkpoint_every=10"]
    line = [*overrides, f"output_dir={tmp_path / 'killed'}"]
    victim = command.start(*line)
    while not list((tmp_path / "killed").glob("models/*.partial/last.ckpt")):
        assert victim.is_alive()
        time.sleep(0.01)
    victim.kill()
    victim.join()
    done = command.run(*line)
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint" in done.stderr
    whole = subprocess.run(
        [sys.executable, "run.py", *overrides, f"output_dir={tmp_path / 'whole'}"], cwd=CONF.parent, capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    (one,), (two,) = ((tmp_path / name / "models").iterdir() for name in ("killed", "whole"))
    for name in ("raw.safetensors", "ema.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


GROUPS = [d.name for d in sorted(CONF.iterdir()) if d.is_dir() and d.name not in ("hydra", "local")]
GIVEN = {"arrays": ["dataset.path=x", "dataset.image_size=8", "dataset.channels=1"], "image_folder": ["dataset.path=x"]}


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in names(g)])
def test_every_shipped_option_composes_and_says_its_name(group: str, option: str) -> None:
    given = GIVEN.get(option, ["split.path=x"] if option == "from_file" else [])
    config: dict[str, Any] = composed(f"{group}={option}", *given)
    if group not in ("experiment", "debug"):
        assert config[group]["name"] == option


def test_store_keys_of_the_defaults_are_stable(tmp_path: Path) -> None:
    """Where a key is computed must not matter: not the process, not the order of overrides."""
    a = quick(tmp_path, "stage=train", "training.lr=0.001", "seed=3")
    b = quick(tmp_path, "seed=3", "training.lr=0.001", "stage=train", "tracking=none")
    assert a["train_key"] == b["train_key"]
    spec = yaml.safe_load((tmp_path / "models" / a["train_key"] / "spec.yaml").read_text())
    assert Store(tmp_path, "models").key(spec) == a["train_key"]
