"""A report in W&B: every table and figure of the page, read back from the offline run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffmia_exp.errors import UserError
from diffmia_exp.report import collect, groups, sections
from diffmia_exp.report.__main__ import main, report
from diffmia_exp.tracking import views
from tests.offline import Logged
from tests.report import building

CELLS = [("pia", "gray_box"), ("loss", "gray_box"), ("gsa2", "white_box"), ("loss", "white_box")]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of four attacks on one target, two of them on a snapshot too, another data set, and a cell that failed."""
    out = tmp_path_factory.mktemp("out")
    folder, cells = out / "runs", out / "sweeps" / "my-grid"
    written = [building.write(folder, building.config(a, tm), 1.2, shadow_trainings=8, **building.controls()) for a, tm in CELLS]
    early = [building.config(a, tm, snapshot=100) for a, tm in CELLS[:2]]
    written += [building.write(folder, cell, 0.5, shadow_trainings=8, **building.controls()) for cell in early]
    written.append(building.write(folder, building.config("pia", dataset__name="cifar10"), 0.1))
    for n, run in enumerate(written):
        (cells / str(n)).mkdir(parents=True)
        (cells / str(n) / "status.json").write_text(json.dumps({"status": "done", "cached": False, "overrides": "x", "run": run.name}))
    (cells / "7").mkdir()
    (cells / "7" / "status.json").write_text(json.dumps({"status": "failed", "overrides": "attack=lira", "error": "too few"}))
    (cells / "multirun.yaml").write_text("{}")
    return cells


@pytest.fixture(scope="module")
def logged(grid: Path) -> Logged:
    main([str(grid), "--wandb", "--project", "mine"])
    return Logged(grid.parents[1])


@pytest.fixture(scope="module")
def page(grid: Path) -> list[Any]:
    """What the page says of each group."""
    found = collect.collect([grid])
    return [sections.of(group, found) for group in groups.grouped(found)]


def test_every_figure_is_logged_with_its_numbers(logged: Logged, page: list[Any]) -> None:
    kinds: dict[str, list[Any]] = {}
    for section in page:
        for figure in section["figures"]:
            kinds.setdefault(figure.key, []).append(figure)
    assert set(kinds) == {"forest", "roc", "cost", "training", "histogram", "agreement"}
    for key, figures in kinds.items():
        pictures = [Image.open(picture).convert("RGB") for picture in logged.pictures(f"figures/{key}")]
        assert len({picture.size for picture in pictures}) == 1, "W&B shows all at the size of the first"
        for picture, figure in zip(pictures, figures, strict=True):
            drawn = Image.open(io.BytesIO(figure.png())).convert("RGB")
            assert picture.crop((0, 0, *drawn.size)).tobytes() == drawn.tobytes()
        columns, rows = logged.table(f"figures/{key}_table")
        shown = [dict(zip(columns, row, strict=True)) for row in rows]
        expected = [dict(zip(figure.columns, row, strict=True)) for figure in figures for row in figure.rows]
        for given, cells in zip(shown, expected, strict=True):
            assert {column: given[column] for column in cells} == cells


def test_every_table_is_logged(logged: Logged, grid: Path, page: list[Any]) -> None:
    names = ("leaderboard", "verdicts", "controls", "comparisons", "epsilon", "set_level", "exposed", "near_copies")
    names += ("roc_points", "settings", "runs", "what_separates_groups", "notes")
    assert {key for key in logged.keys if key.startswith("report/")} == {f"report/{name}" for name in names}
    columns, rows = logged.table("report/leaderboard")
    csv = grid / "report.csv"
    report([grid], "csv", csv)
    assert columns == csv.read_text().splitlines()[0].split(",")
    assert len(rows) == len(csv.read_text().splitlines()) - 1 == 7
    _, rows = logged.table("report/exposed")
    assert [row[2] for row in rows if row[:2] == ["A", "most"]] == [e.sample_id for e in page[0]["most"]]
    assert logged.table("report/notes")[1] == [["failed", str(grid / "7"), "attack=lira: too few"]]
    _, rows = logged.table("report/roc_points")
    n = page[0]["group"].rows[0].first.metrics["n_nonmembers"]
    low = [row[3] for row in rows if row[:3] == ["A", "pia", "gray_box"] and row[3] <= 0.01]
    assert low == [k / n for k in range(1, n // 100 + 1)]


def test_the_run_says_what_it_is_of(logged: Logged, grid: Path) -> None:
    assert (logged.run["job_type"], logged.run["run_group"], logged.run["project"]) == ("report", "my-grid", "mine")
    keys = [json.loads(path.read_text())["run_key"] for path in (grid.parents[1] / "runs").glob("*/metrics.json")]
    used = {name for name, artifact in logged.artifacts().items() if artifact.get("use_after_commit")}
    assert used == {f"scores-{key}" for key in keys} == set(logged.run["config"]["update"]["scores"])
    (entry,) = logged.artifacts()["report-my-grid"]["manifest"]["contents"]
    assert entry["path"] == "report.html"


def test_the_views_name_what_a_report_logs(logged: Logged) -> None:
    named = set()
    for panel in [panel for panels in views.sections().values() for panel in panels]:
        named |= {*getattr(panel, "media_keys", []), getattr(panel, "table_name", "")}
    assert {key for key in named if key.startswith(("report/", "figures/"))} <= logged.keys


def test_runs_of_several_projects_need_one_to_be_named(grid: Path, tmp_path: Path) -> None:
    for n, project in enumerate(("a", "b")):
        run = building.write(tmp_path / "runs", building.config(seed=n), files=False)
        (run / "wandb.json").write_text(json.dumps({"folder": "x", "project": project, "entity": None, "group": None, "tags": []}))
    with pytest.raises(UserError, match=r"--project: the runs were logged to several, a, b; give the one"):
        report([tmp_path], "markdown", tmp_path / "report.md", wandb=(None, None))
