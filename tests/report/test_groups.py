"""Which runs are averaged, and which never are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffmia_exp.report import page, sections
from diffmia_exp.report.collect import collect
from diffmia_exp.report.groups import Group, grouped
from tests.report import building


def groups(runs: Path) -> list[Group]:
    return grouped(collect([runs]))


def test_seeds_and_targets_are_repetitions_with_students_interval(tmp_path: Path) -> None:
    for seed, target in ((0, 0), (1, 0), (0, 3)):
        building.write(tmp_path, building.config(seed=seed, target_index=target))
    (group,) = groups(tmp_path)
    (row,) = group.rows
    aucs = [run.metrics["auc"] for run in row.runs]
    assert len(aucs) == 3
    mean, low, high = row.auc
    assert mean == pytest.approx(np.mean(aucs))
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, np.mean(aucs), stats.sem(aucs)))


def test_one_run_has_its_own_interval(tmp_path: Path) -> None:
    building.write(tmp_path, building.config())
    (row,) = groups(tmp_path)[0].rows
    assert [row.auc[0], *row.auc[1:]] == [row.first.metrics["auc"], *row.first.metrics["auc_ci"]]


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset__name": "other"},
        {"dataset__image_size": 16},
        {"split__pool": 100},
        {"model__layers_per_block": 2},
        {"training__steps": 700},
        {"diffusion__prediction": "v"},
        {"trainer__precision": "bf16-mixed"},
        {"evaluation__precision": "float64"},
        {"evaluation__drop_duplicates": True},
        {"defense": {"name": "cutout", "side": 0.5}},
        {"split__copies": [1, 2]},
    ],
)
def test_runs_that_differ_in_what_numbers_depend_on_are_in_groups_of_their_own(tmp_path: Path, settings: dict[str, Any]) -> None:
    building.write(tmp_path, building.config(seed=0))
    building.write(tmp_path, building.config(seed=1, **settings))
    assert sorted(group.letter for group in groups(tmp_path)) == ["A", "B"]


def test_titles_name_the_defence(tmp_path: Path) -> None:
    for defense in ({"name": "none"}, {"name": "cutout", "side": 0.5}, {"name": "cutout", "side": 0.25}):
        building.write(tmp_path, building.config(defense=defense))
    titles = [group.title for group in groups(tmp_path)]
    assert sum(title.endswith(", defense cutout") for title in titles) == 2
    assert sum("defense" not in title for title in titles) == 1


def test_the_auc_by_copies_is_averaged_and_shown(tmp_path: Path) -> None:
    for seed, twice in ((0, 0.7), (1, 0.8)):
        by = {n: {"auc": auc, "auc_ci": [auc - 0.1, auc + 0.1], "n_members": 9} for n, auc in (("1", 0.6), ("10", 0.9), ("2", twice))}
        building.write(tmp_path, building.config(seed=seed), auc_by_copies=by)
    building.write(tmp_path, building.config("loss"))
    found = collect([tmp_path])
    (section,) = [sections.of(group, found) for group in grouped(found)]
    assert section["copies"]["numbers"] == ["1", "2", "10"]
    ((row, cells),) = section["copies"]["lines"]
    assert row.label == "pia"
    assert cells["2"][0] == pytest.approx(0.75)
    assert '<th scope="col" class="n">×10</th>' in page.html(found, [section], [tmp_path])


def test_versions_of_the_code_are_never_averaged(tmp_path: Path) -> None:
    building.write(tmp_path, building.config(seed=0))
    building.write(tmp_path, building.config(seed=1), versions={"diffmia_exp": "0.2.0", "torch": "2.13.0"})
    assert len(groups(tmp_path)) == 2


def test_equal_settings_with_different_images_are_different_data(tmp_path: Path) -> None:
    building.write(tmp_path, building.config("pia"), audited_fingerprint="a")
    building.write(tmp_path, building.config("loss"), audited_fingerprint="b")
    assert len(groups(tmp_path)) == 2


def test_what_does_not_change_the_numbers_does_not_part_runs(tmp_path: Path) -> None:
    building.write(tmp_path, building.config(seed=0, trainer__devices=2, evaluation__batch_size=7, output_dir="elsewhere"))
    building.write(tmp_path, building.config(seed=1, split__n_models=9))
    (group,) = groups(tmp_path)
    assert len(group.rows) == 1


def test_settings_threat_models_and_snapshots_are_rows_of_their_own_and_named_by_what_differs(tmp_path: Path) -> None:
    for t in (100, 200):
        building.write(tmp_path, building.config(attack__t=t))
    building.write(tmp_path, building.config(threat_model="white_box"))
    for snapshot in (100, 300):
        building.write(tmp_path, building.config(attack__t=100, snapshot=snapshot))
    (group,) = groups(tmp_path)
    named = {(row.name, row.threat_model) for row in group.rows}
    gray = {("pia (t=100)", "gray_box"), ("pia (t=200)", "gray_box"), ("pia (t=100) at step 100", "gray_box")}
    assert named == gray | {("pia (t=100) at step 300", "gray_box"), ("pia", "white_box")}
    assert {row.name for row in group.under("gray_box")} == {"pia (t=100)", "pia (t=200)"}


def test_attacks_with_different_numbers_of_shadows_are_not_averaged(tmp_path: Path) -> None:
    building.write(tmp_path, building.config("lira", seed=0), shadow_trainings=8)
    building.write(tmp_path, building.config("lira", seed=1), shadow_trainings=16)
    (group,) = groups(tmp_path)
    assert sorted(row.name for row in group.rows) == ["lira (shadow_trainings=16)", "lira (shadow_trainings=8)"]


def test_one_result_under_two_names_counts_once(tmp_path: Path) -> None:
    building.write(tmp_path, building.config())
    building.write(tmp_path, building.config(name="another-name"))
    found = collect([tmp_path])
    (group,) = grouped(found)
    assert len(group.runs) == 1
    assert [note.kind for note in found.notes] == ["counted once"]


def test_one_failed_control_makes_a_row_unsound_and_only_checks_of_all_runs_make_it_sound(tmp_path: Path) -> None:
    for attack, verdicts in {"pia": (True, True), "loss": (True, False), "sima": (True, None)}.items():
        for seed, sound in enumerate(verdicts):
            more = {} if sound is None else building.controls(sound)
            building.write(tmp_path, building.config(attack, seed=seed), **more)
    (group,) = groups(tmp_path)
    assert {row.label: row.sound for row in group.rows} == {"pia": True, "loss": False, "sima": None}
    assert any("the split is unsound" in why for row in group.rows for why in row.unsound)
