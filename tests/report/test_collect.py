"""What a report makes of folders that are not as they should be: every one is listed, with the reason, and the others are shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffmia_exp.errors import UserError
from diffmia_exp.report import pictures
from diffmia_exp.report.collect import Collection, Note, collect
from diffmia_exp.report.groups import grouped
from diffmia_exp.scores import ScoreTable
from tests.report import building


def notes(found: Collection) -> dict[str, Note]:
    return {Path(note.where).name: note for note in found.notes}


def alter(run: Path, *gone: str, **changes: object) -> Path:
    """Change metrics, and take some away."""
    path = run / "metrics.json"
    metrics = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in metrics.items() if k not in gone}))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "runs"


def test_each_damage_is_listed_with_its_reason_and_the_others_are_shown(runs: Path) -> None:
    good = building.write(runs, building.config(seed=0))
    seeds = iter(range(1, 100))

    def another() -> Path:
        return building.write(runs, building.config(seed=next(seeds)))

    expected: dict[Path, tuple[str, str]] = {}
    (run := another()).joinpath("metrics.json").write_text('{"status": "done", "auc": 0.')
    expected[run] = "damaged", "metrics.json cannot be read"
    (run := another()).joinpath("metrics.json").write_text("[1]")
    expected[run] = "damaged", "metrics.json holds no mapping"
    (run := another()).joinpath("metrics.json").write_bytes(b"\xff\xfe\x00")
    expected[run] = "damaged", "metrics.json cannot be read"
    (run := another()).joinpath("metrics.json").unlink()
    expected[run] = "unfinished", "metrics.json is missing"
    expected[alter(another(), auc=float("nan"))] = "damaged", "auc is nan, no finite number"
    expected[alter(another(), auc="<b>high</b>")] = "damaged", "auc is '<b>high</b>', no finite number"
    expected[alter(another(), auc_ci=[0.5])] = "damaged", "auc_ci is [0.5], no interval"
    expected[alter(another(), "run_key")] = "damaged", "metrics.json lacks run_key"
    expected[alter(another(), controls=[1])] = "damaged", "controls is of another form"
    expected[alter(another(), status="trained")] = "unfinished", "status 'trained'"
    expected[alter(another(), n_members=3)] = "damaged", "not the file that metrics.json was made from"
    expected[alter(another(), scores_sha256="0")] = "damaged", "not the file that metrics.json was made from"
    expected[alter(another(), status="not applicable", reason="needs white_box access")] = "not applicable", "needs white_box access"
    (run := another()).joinpath("scores.parquet").write_bytes(b"PAR1 no more")
    expected[run] = "damaged", "scores.parquet cannot be read"
    (run := another()).joinpath("scores.parquet").unlink()
    expected[run] = "damaged", "scores.parquet is missing"
    run = another()
    table = ScoreTable.load(run / "scores.parquet")
    ScoreTable(table.sample_id, table.is_member, np.where(table.score > 2, np.nan, table.score)).save(run / "scores.parquet")
    expected[run] = "damaged", f"{(table.score > 2).sum()} of 240 scores are not finite"
    (run := another()).joinpath("config.yaml").write_text("attack: [")
    expected[run] = "damaged", "config.yaml cannot be read"
    (run := another()).joinpath("config.yaml").write_text("attack: pia")
    expected[run] = "damaged", "attack is no group of settings"
    (run := another()).joinpath("config.yaml").unlink()
    expected[run] = "damaged", "config.yaml is missing"
    (run := runs / ".pia-gray_box-digits-s0-c5942cf6.6631898b.tmp").mkdir()
    expected[run] = "unfinished", "still being written, or was killed"
    (run := runs / "empty-one").mkdir()
    expected[run] = "unfinished", "metrics.json is missing"

    (run := another()).joinpath("config.yaml").write_text("split: {target_index: one}")
    expected[run] = "damaged", "split.target_index is 'one', no whole number"
    unusual = [{"train_key": [1]}, {"snapshot": "last"}, {"epochs": "many"}, {"unsound": "yes"}, {"versions": 3}, {"memorisation": 2}]
    unusual += [{"tpr_at_fpr": {"0.1": {"resolvable": True}}}, {"controls": {"blind": {"auc": "x"}}}, {"epsilon": {"one_run": 2}}]
    unusual += [{"controls": {"blind": {"auc": 0.5, "auc_ci": 0.4}}}, {"controls": {"generated": {"called_members": "all"}}}]
    for change in unusual:
        expected[alter(another(), **change)] = "damaged", f"{next(iter(change))} is of another form than expected"

    found = collect([runs.parent])
    assert [run.folder for run in found.runs] == [good]
    for path, (kind, why) in expected.items():
        note = notes(found)[path.name]
        assert note.kind == kind, note
        assert why in note.why, note
    assert len(found.notes) == len(expected)


def test_pictures_that_cannot_be_read_are_listed_and_the_run_is_shown(runs: Path) -> None:
    for seed, content in enumerate(
        ({}, {"sample_id": ["a"], "images": [0]}, {"sample_id": [1, 2], "images": np.zeros((1, 1, 8, 8), np.uint8)})
    ):
        np.savez(building.write(runs, building.config(seed=seed)) / "exposed.npz", **content)
    (building.write(runs, building.config(seed=4)) / "near_copies.npz").write_bytes(b"PK nothing")
    np.savez(
        building.write(runs, building.config(seed=5)) / "exposed.npz",
        sample_id=np.array([{}], dtype=object),
        images=np.array([{}], dtype=object),
    )
    found = collect([runs])
    (group,) = grouped(found)
    pictures.exposed(group, found)
    for run in group.runs:
        pictures.near_copies(run, found)
    assert [(note.kind, Path(note.where).name) for note in found.notes] == [("damaged", "exposed.npz")] * 4 + [
        ("damaged", "near_copies.npz")
    ]


def test_runs_of_an_older_format_are_shown_with_a_reservation(runs: Path) -> None:
    alter(building.write(runs, building.config()), "label", "selection", "shadow_trainings")
    found = collect([runs])
    assert found.runs[0].label == "pia"
    assert [note.kind for note in found.notes] == ["older format"]
    assert "lacks label, selection, shadow_trainings" in found.notes[0].why


def test_the_same_run_in_two_places_counts_once(tmp_path: Path) -> None:
    cell = building.config()
    building.write(tmp_path / "a", cell)
    building.write(tmp_path / "b", cell)
    found = collect([tmp_path])
    assert len(found.runs) == 1
    assert [note.kind for note in found.notes] == ["counted once"]


def test_cells_of_a_grid_bring_their_runs_settings_and_failures(tmp_path: Path) -> None:
    outputs = building.sweep(tmp_path / "outputs")
    found = collect([outputs / "sweeps" / "grid-1"])
    assert len(found.runs) == 18
    assert {run.overrides for run in found.runs if run.label == "knn"} == {"attack=knn seed=0", "attack=knn seed=1"}
    assert [(note.kind, note.why) for note in found.notes if note.kind == "failed"] == [
        ("failed", "attack=lira: split.n_models=1: must be at least 3")
    ]
    assert "no status.json" in next(note.why for note in found.notes if note.kind == "unfinished")


def test_a_cell_that_failed_and_succeeded_since_says_so_and_a_lost_run_is_missed(tmp_path: Path) -> None:
    cells = tmp_path / "sweeps" / "grid-1"
    run = building.write(tmp_path / "runs", building.config())
    for name, status in {
        "0": {"status": "failed", "overrides": "seed=0", "error": "output_dir=/full: the disk is full"},
        "1": {"status": "done", "overrides": "seed=0", "run": run.name},
        "2": {"status": "done", "overrides": "seed=1", "run": "deleted-run"},
        "3": "no mapping",
    }.items():
        (cells / name).mkdir(parents=True)
        (cells / name / "status.json").write_text(json.dumps(status))
    (cells / "multirun.yaml").touch()
    found = collect([tmp_path])
    assert len(found.runs) == 1
    by = notes(found)
    assert "the disk is full; the same settings gave a result elsewhere" in by["0"].why
    assert by["deleted-run"].kind == "unfinished"
    assert by["status.json"].kind == "damaged"


def test_a_folder_without_runs_is_no_error_but_one_that_is_not_there_is(tmp_path: Path) -> None:
    for store, file in {"controls": "scores.parquet", "models": "run.log"}.items():  # entries of a store are no runs
        (tmp_path / store / "0123").mkdir(parents=True)
        (tmp_path / store / "0123" / "spec.yaml").touch()
        (tmp_path / store / "0123" / file).touch()
    found = collect([tmp_path])
    assert found.runs == []
    assert [note.kind for note in found.notes] == ["nothing here"]
    with pytest.raises(UserError, match="no such folder"):
        collect([tmp_path / "typo"])
