"""The study's figures and differences, on grids of made-up scores; and that every shipped part composes and is granted."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy import stats

from diffmia_exp import grid
from diffmia_exp.config import checked
from diffmia_exp.errors import UserError
from diffmia_exp.experiment import Experiment
from diffmia_exp.study import drawing, factors, writing
from diffmia_exp.study.__main__ import main
from tests.composing import CONF, composed, names
from tests.report import building

PARTS = [name for name in names("experiment") if name.startswith("study")]  # those of Fashion-MNIST are in test_experiments.py


def swept(name: str) -> dict[str, list[str]]:
    """What an experiment sweeps: the overrides of each key."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        params = compose("config", [f"experiment={name}"], return_hydra_config=True).hydra.sweeper.params
    parser = OverridesParser.create()
    parsed = {key: parser.parse_override(f"{key}={value}") for key, value in params.items()}
    return {
        k: [f"{k}={v}" for v in o.sweep_string_iterator()] if o.is_sweep_override() else [f"{k}={params[k]}"] for k, o in parsed.items()
    }


@pytest.mark.parametrize("name", PARTS)
def test_every_part_sweeps_one_key_and_is_granted_and_fed_at_both_ends(name: str, tmp_path: Path) -> None:
    axes = swept(name)
    keys = [key for key, values in axes.items() if len(values) > 1 and key not in factors.REPEATED]
    assert len(keys) == (name not in ("study", "study_threat_model"))
    first, *rest = axes["attack"]
    others = [values for key, values in axes.items() if key != "attack"]
    ends = [v[0] for v in others], [v[-1] for v in others]
    for attack, end in [(first, ends[0]), *((attack, ends[1]) for attack in (first, *rest))]:
        cell = Experiment(checked(composed(f"experiment={name}", attack, *end, f"output_dir={tmp_path}")))
        if name != "study_threat_model" or cell.threat_model.grants(cell.attack.access):
            cell.load()


def swept_grid(outputs: Path, name: str, key: str, values: dict[str, float], targets: int = 3, **more: Any) -> None:
    """A finished grid of `pia` over a key, with an effect for each value."""
    folder, cells = outputs / "sweeps" / f"{name}-2026-01-02_03-04-05-678901", []
    for value, effect in values.items():
        for target in range(targets):
            cell = building.config("pia", target_index=target, **{"__".join(key.split(".")): value} if "." in key else {})
            where = building.write(outputs / "runs", cell, effect, files=False, **more)
            cells.append([f"{key}={value}", "attack=pia", "threat_model=gray_box", f"split.target_index={target}"])
            grid.ended(folder / str(len(cells) - 1), status="done", cached=False, run=where.name)
    grid.plan(folder, cells, [], [])


def test_levels_are_in_the_order_of_their_numbers_with_students_interval(tmp_path: Path) -> None:
    swept_grid(tmp_path, "study_members", "split.pool", {"512": 0.2, "64": 2.0, "256": 1.0})
    (factor,) = factors.read_all(tmp_path)
    (levels,) = factor.attacks.values()
    assert (factor.name, factor.key, factor.numeric) == ("members", "split.pool", True)
    assert [level.number for level in levels] == [64, 256, 512]
    assert [len(level.runs) for level in levels] == [3, 3, 3]
    aucs = levels[0].aucs
    expected = stats.t.interval(0.95, 2, np.mean(aucs), stats.sem(aucs))
    assert levels[0].auc == pytest.approx((np.mean(aucs), *np.clip(expected, 0, 1)))


def test_a_difference_is_paired_where_targets_are_the_same_and_welchs_elsewhere(tmp_path: Path) -> None:
    swept_grid(tmp_path, "study_weights", "weights", {"ema": 1.5, "raw": 0.7})
    (factor,) = factors.read_all(tmp_path)
    (effect,) = factors.effects(factor)
    a, b = np.array(effect.before.aucs), np.array(effect.after.aucs)
    assert effect.paired
    assert effect.difference == pytest.approx((np.mean(b - a), *stats.t.interval(0.95, 2, np.mean(b - a), stats.sem(b - a))))
    fewer = factors.Level("weights=raw", effect.after.runs[:2])
    (mean, low, high), paired = factors.difference(effect.before, fewer)
    va, vb = a.var(ddof=1) / 3, b[:2].var(ddof=1) / 2
    df = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 1)
    assert not paired
    assert (mean, low, high) == pytest.approx(
        (b[:2].mean() - a.mean(), *stats.t.interval(0.95, df, b[:2].mean() - a.mean(), np.sqrt(va + vb)))
    )
    assert factors.difference(effect.before, factors.Level("weights=raw", effect.after.runs[:1])) == (None, False)


def test_it_writes_a_figure_a_table_and_a_line_for_every_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept_grid(tmp_path, "study_members", "split.pool", {"64": 2.0, "512": 0.2})
    swept_grid(tmp_path, "study_weights", "weights", {"ema": 1.5, "raw": 0.7})
    main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "2 factors, 12 runs" in capsys.readouterr().out
    with (tmp_path / "out" / "study.csv").open() as f:
        lines = list(csv.DictReader(f))
    assert [(line["factor"], line["value"], line["targets"]) for line in lines] == [
        ("members", "64", "3"),
        ("members", "512", "3"),
        ("weights", "ema", "3"),
        ("weights", "raw", "3"),
    ]
    text = (tmp_path / "out" / "study.md").read_text()
    assert "- pia, gray_box, 64 → 512: -0." in text
    for factor in factors.read_all(tmp_path):
        drawn = drawing.figure(factor)
        assert drawn.svg().count("<path") >= len(drawn.rows), "a point for every row"
        assert (tmp_path / "out" / "figures" / f"{factor.name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_front_shows_the_strongest_attack_against_what_the_models_are_worth(tmp_path: Path) -> None:
    worth = {"kid": 0.5, "loss_heldout": 0.2, "learned": True}
    swept_grid(tmp_path, "study_defense", "defense", {"none": 2.0}, utility=worth)
    folder = tmp_path / "sweeps" / "study_defense-2026-01-02_03-04-05-678901"
    cells = grid.planned(folder)["cells"]
    for attack, effect in (("pia", 0.1), ("loss", 0.9)):
        for target in range(3):
            cell = building.config(attack, target_index=target)
            where = building.write(
                tmp_path / "runs",
                cell,
                effect,
                files=False,
                utility=worth | {"kid": 1 + 0.1 * target, "loss_heldout": 0.3, "learned": False},
            )
            cells.append(["defense=flip", f"attack={attack}", "threat_model=gray_box", f"split.target_index={target}"])
            grid.ended(folder / str(len(cells) - 1), status="done", cached=False, run=where.name)
    grid.plan(folder, cells, [], [])
    (factor,) = factors.read_all(tmp_path)
    drawn = drawing.front(factor)
    assert drawn is not None
    flip = next(row for row in drawn.rows if row[0].startswith("flip"))
    assert flip[:2] == ["flip (not learned)", "loss, gray_box"]
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert [float(v) for v in flip[5:]] == pytest.approx([1.1, 1.1 - half, 1.1 + half], rel=1e-3)
    assert [figure.key for figure in drawing.figures(factor)] == ["defense", "defense-kid", "defense-loss_heldout"]
    assert "| *KID* | 0.5 [0.5, 0.5] | 1.1 [" in writing.to_markdown([factor])
    assert drawn.png()[:4] == b"\x89PNG"


def test_a_value_far_from_the_others_does_not_push_them_together(tmp_path: Path) -> None:
    swept_grid(tmp_path, "study_defense", "defense", {"none": 2.0, "flip": 1.0, "dp_sgd": 0.1}, utility={"kid": 0.01, "learned": True})
    (factor,) = factors.read_all(tmp_path)

    def scale(**kids: float) -> dict[str, Any]:
        levels = [
            replace(level, runs=tuple(replace(run, metrics=run.metrics | {"utility": {"kid": kids[level.text]}}) for run in level.runs))
            for level in factor.attacks["pia, gray_box"]
        ]
        drawn = drawing.front(replace(factor, attacks={"pia, gray_box": tuple(levels)}))
        assert drawn is not None
        x: dict[str, Any] = drawn.spec["layer"][-1]["encoding"]["x"]
        return x

    assert scale(none=0.01, flip=0.02, dp_sgd=0.19)["scale"].get("type", "linear") == "linear"
    assert scale(none=-0.003, flip=-0.002, dp_sgd=-0.001)["scale"].get("type", "linear") == "linear", "an unbiased KID may be below 0"
    far = scale(none=0.01, flip=0.02, dp_sgd=1.2)
    assert far["scale"]["type"] == "symlog"
    assert far["axis"]["values"] == pytest.approx([0, 0.01, 0.03, 0.1, 0.3, 1])


def test_models_that_a_factor_leaves_alone_have_no_front_and_their_worth_is_not_told_again(tmp_path: Path) -> None:
    swept_grid(tmp_path, "study_service", "defense.variations", {"1": 2.0, "3": 2.0}, utility={"kid": 0.5, "loss_heldout": 0.2})
    (factor,) = factors.read_all(tmp_path)
    assert [figure.key for figure in drawing.figures(factor)] == ["service"]
    assert "KID" not in (text := writing.to_markdown([factor]))
    assert "→" not in text, "and what it does is nothing"


def test_how_often_an_image_is_there_is_a_factor_of_its_own(tmp_path: Path) -> None:
    by = {n: {"auc": auc, "auc_ci": [auc - 0.1, auc + 0.1], "n_members": 9} for n, auc in (("10", 0.875), ("1", 0.5), ("2", 0.75))}
    swept_grid(tmp_path, "study_copies", "defense", {"none": 1.0, "deduplication": 0.5}, auc_by_copies=by)
    whole, each = factors.read_all(tmp_path)
    assert (whole.name, each.name, each.numeric) == ("copies", "copies-each", True)
    assert list(each.attacks) == ["pia, gray_box, none", "pia, gray_box, deduplication"]
    levels = each.attacks["pia, gray_box, none"]
    assert [(level.number, level.auc[0]) for level in levels] == [(1, 0.5), (2, 0.75), (10, 0.875)]
    assert [len(level.runs) for level in levels] == [3, 3, 3]
    assert whole.attacks["pia, gray_box"][0].aucs == [run.metrics["auc"] for run in levels[0].runs]
    effect = factors.effects(each)[0]
    assert (effect.before.text, effect.after.text, effect.paired) == ("1", "10", True)
    assert effect.difference is not None
    assert effect.difference[0] == pytest.approx(0.375)


def test_grids_of_one_experiment_that_differ_in_settings_are_not_averaged(tmp_path: Path) -> None:
    swept_grid(tmp_path, "study_weights", "weights", {"ema": 1.5, "raw": 0.7})
    again = tmp_path / "sweeps" / "study_weights-2026-01-02_04-00-00-000000"
    changed = building.config("loss", target_index=0, training__steps=7)
    where = building.write(tmp_path / "runs", changed, 1.0, files=False)
    grid.ended(again / "0", status="done", cached=False, run=where.name)
    grid.plan(again, [["weights=ema", "attack=loss", "threat_model=gray_box", "split.target_index=0"]], [], [])
    with pytest.raises(
        UserError, match=r"study_weights: weights=ema, whatever attacks it,: pia.* and loss.* differ in settings or versions"
    ):
        factors.read_all(tmp_path)


def test_a_result_of_other_attack_settings_or_another_version_is_not_averaged(tmp_path: Path) -> None:
    swept_grid(tmp_path, "study_weights", "weights", {"ema": 1.5, "raw": 0.7})
    again = tmp_path / "sweeps" / "study_weights-2026-01-02_04-00-00-000000"
    for value, cell, more in (
        ("ema", building.config("pia", attack__t=7), {}),
        ("old", building.config("pia"), {"versions": {"torch": "1"}}),
    ):
        grid.ended(again / "0", status="done", cached=False, run=building.write(tmp_path / "runs", cell, 1.1, files=False, **more).name)
        grid.plan(again, [[f"weights={value}", "attack=pia", "threat_model=gray_box", "split.target_index=0"]], [], [])
        with pytest.raises(UserError, match="differ in settings or versions"):
            factors.read_all(tmp_path)


def test_of_many_attacks_the_strongest_are_drawn_and_all_are_in_the_table(tmp_path: Path) -> None:
    folder, cells = tmp_path / "sweeps" / "study_weights-2026-01-02_03-04-05-678901", []
    for n, attack in enumerate(("loss", "pia", "pian", "sima", "secmi", "multi_loss", "pfami", "lira")):
        for value in ("ema", "raw"):
            where = building.write(tmp_path / "runs", building.config(attack), 3 - 0.35 * n + (value == "raw") / 100, files=False)
            cells.append([f"weights={value}", f"attack={attack}", "threat_model=gray_box", "split.target_index=0"])
            grid.ended(folder / str(len(cells) - 1), status="done", cached=False, run=where.name)
    grid.plan(folder, cells, [], [])
    (factor,) = factors.read_all(tmp_path)
    drawn = drawing.figure(factor)
    assert {v["s"] for v in drawn.spec["data"]["values"]} == {
        f"{a}, gray_box" for a in ("loss", "pia", "pian", "sima", "secmi", "multi_loss")
    }
    assert "2 weaker attacks are in the table only" in writing.to_markdown([factor])
    assert len(drawn.rows) == 16


def test_the_strongest_at_a_value_is_drawn_however_weak_and_values_keep_their_order(tmp_path: Path) -> None:
    folder, cells = tmp_path / "sweeps" / "study_threat_model-2026-01-02_03-04-05-678901", []
    for n, attack in ((8, "knn"), *enumerate(("loss", "pia", "pian", "sima", "secmi", "multi_loss", "pfami"))):
        for access in ("samples_only", "gray_box") if attack == "knn" else ("gray_box",):
            cell = building.config(attack, access)
            where = building.write(tmp_path / "runs", cell, 3 - 0.35 * n, files=False)
            cells.append([f"threat_model={access}", f"attack={attack}", "split.target_index=0"])
            grid.ended(folder / str(len(cells) - 1), status="done", cached=False, run=where.name)
    grid.plan(folder, cells, [], [])
    (factor,) = factors.read_all(tmp_path)
    values = drawing.figure(factor).spec["data"]["values"]
    assert {v["x"] for v in values if v["s"] == "knn"} == {"samples_only", "gray_box"}
    assert len({v["s"] for v in values}) == 6
    assert '["samples_only", "gray_box"]' in json.dumps(drawing.figure(factor).spec)


def test_every_attack_is_drawn_once_against_its_model_evaluations(tmp_path: Path) -> None:
    swept_grid(tmp_path, "study_noises", "attack.n_noises", {"1": 0.5, "4": 1.0})
    folder, cells = tmp_path / "sweeps" / "study_threat_model-2026-01-02_03-04-05-678901", []
    for attack, access, nfe in (("gsa1", "white_box", 20.0), ("pia", "white_box", 2.0), ("pia", "gray_box", 2.0)):
        for target in range(3):
            cell = building.config(attack, access, target_index=target)
            where = building.write(tmp_path / "runs", cell, 1.2, files=False, nfe_per_image=nfe)
            cells.append([f"attack={attack}", f"threat_model={access}", f"split.target_index={target}"])
            grid.ended(folder / str(len(cells) - 1), status="done", cached=False, run=where.name)
    grid.plan(folder, cells, [], [])
    found = factors.read_all(tmp_path)
    drawn = drawing.budget(found)
    assert drawn is not None
    assert sorted((row[0], row[1], row[2]) for row in drawn.rows) == [
        ("gsa1", "white_box", "20"),
        ("pia (n_noises=-)", "gray_box", "2"),
        ("pia (n_noises=1)", "gray_box", "2"),
        ("pia (n_noises=4)", "gray_box", "2"),
    ]
    assert "## budget" in writing.to_markdown(found)
    assert drawing.budget([factor for factor in found if factor.name == "nothing"]) is None


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished grid"):
        factors.read_all(tmp_path)
    swept_grid(tmp_path, "study_both", "split.pool", {"64": 2.0, "512": 0.2})
    cells = tmp_path / "sweeps" / "study_both-2026-01-02_03-04-05-678901"
    planned = grid.planned(cells)["cells"]
    grid.plan(cells, [[*cell, f"training.lr={n}"] for n, cell in enumerate(planned)], [], [])
    with pytest.raises(UserError, match=r"study_both: sweeps split\.pool, training\.lr; a factor is one key"):
        factors.read_all(tmp_path)
    with pytest.raises(SystemExit, match="error: study_both"):
        main([str(tmp_path)])
