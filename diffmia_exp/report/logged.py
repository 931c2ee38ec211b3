"""A report in W&B: the tables and figures of the page, and where they are logged."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffmia_exp.config import Plain
from diffmia_exp.errors import UserError, choice
from diffmia_exp.report import evidence
from diffmia_exp.report.collect import Collection
from diffmia_exp.report.drawing import Figure
from diffmia_exp.report.reading import Run
from diffmia_exp.report.sections import ACCOUNT, ordered, separating
from diffmia_exp.report.settings import flat
from diffmia_exp.report.tables import line
from diffmia_exp.tracking.runs import MODES, Wandb, project_name
from diffmia_exp.tracking.tables import LOW_FPR, Table

VERDICT = ("threat_model", "of", "said", "sound")
CONTROL = ("sound", "auc", "p_value", "called_members", "at_fpr", "what")
EPSILON = ("bound", "epsilon", "delta", "confidence", "guesses", "valid")
LOSSES = ("loss_members", "loss_heldout", "loss_linear", "heldout")
UTILITY = ("learned", "kid", "kid_se", "fid", "precision", "recall", *LOSSES, "features", "n_generated", "n_reference")
RUN = ("auc", "run_key", "train_key")
"""Columns that are called as in the sections and the metrics."""


def log(
    found: Collection, sections: Sequence[Plain], folders: Sequence[Path], page: Path, project: str | None = None, entity: str | None = None
) -> str | None:
    """Log a report as a W&B run, with the lineage of the runs that it is made from.

    Args:
        found: what it is made from.
        sections: of its groups, as `sections.of` made them.
        folders: that were asked for.
        page: the file that was written.
        project, entity: of W&B; None for those of the runs.

    Returns:
        its address, or offline its folder; None where $WANDB_MODE is `disabled`.

    Raises:
        UserError: if there is no run, or if the runs stand in several projects and none was given.
    """
    if not found.runs:
        raise UserError("--wandb: there is no finished run to log; give a folder with runs, as outputs or outputs/runs")
    tracking = _tracking(found.runs, folders, project, entity)
    if tracking.effective_mode == "disabled":
        return None
    first = found.runs[0].folder.resolve().parent
    root = first.parent if first.name == "runs" else first
    name = "report-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", folders[0].resolve().name)
    figures = {
        f"figures/{key}": [(f"{letter} | {figure.title} | {figure.caption}", figure.png()) for letter, figure in drawn]
        for key, drawn in _by_key(sections).items()
    }
    scores = {str(run.metrics["run_key"]): run.folder for run in found.runs}
    return tracking.report(root, name, _config(found, folders, scores), content(found, sections), figures, scores, [page])


def _tracking(runs: Sequence[Run], folders: Sequence[Path], project: str | None, entity: str | None) -> Wandb:
    """Where the runs were logged, by their wandb.json."""
    choice("WANDB_MODE", os.environ.get("WANDB_MODE") or "offline", MODES)
    if project is not None:
        project_name("--project", project)
    places = [place for run in runs if (place := _place(run.folder / "wandb.json"))]
    chosen: Plain = {"project": project, "entity": entity}
    for key, given in chosen.items():
        stand = sorted({str(place[key]) for place in places if place[key] is not None})
        if given is None and len(stand) > 1:
            raise UserError(f"--{key}: the runs were logged to several, {', '.join(stand)}; give the one that the report belongs to")
        if given is None and stand:
            chosen[key] = stand[0]
    groups = {place["group"] for place in places}
    sweep = folders[0].resolve().name if len(folders) == 1 and (folders[0] / "multirun.yaml").exists() else None
    chosen["group"] = sweep or (groups.pop() if len(groups) == 1 else None)
    chosen["tags"] = sorted({tag for place in places for tag in place["tags"]})
    return Wandb(**{key: value for key, value in chosen.items() if value is not None})


def _place(path: Path) -> Plain | None:
    """What wandb.json says; None where it is missing, damaged, or of an older version that did not say where."""
    try:
        place = json.loads(path.read_text())
        return place if {"project", "entity", "group", "tags"} <= set(place) else None
    except (OSError, ValueError, TypeError):
        return None


def _config(found: Collection, folders: Iterable[Path], scores: Iterable[str]) -> Plain:
    def names(key: str) -> list[str]:
        return sorted({str(run.metrics[key]) for run in found.runs})

    config: Plain = {"sources": [str(folder) for folder in folders], "runs": len(found.runs), "scores": [f"scores-{key}" for key in scores]}
    return config | {"attacks": names("attack"), "threat_models": names("threat_model"), "datasets": names("dataset")}


def content(found: Collection, sections: Sequence[Plain]) -> dict[str, Table]:
    """Every table of the page, and the numbers of its figures, by W&B key."""
    columns: dict[str, tuple[str, ...]] = {
        "verdicts": ("group", "title", "strongest", *VERDICT, "auc", "low", "high", "low_over_targets", "high_over_targets", "unsound"),
        "controls": ("group", "attack", "threat_model", "control", *CONTROL, "low", "high"),
        "comparisons": ("group", "strongest", "other", "difference", "low", "high", "p"),
        "epsilon": ("group", "attack", "threat_model", *EPSILON, "why"),
        "privacy": ("group", "attack", "threat_model", "seed", "target_index", *ACCOUNT),
        "set_level": ("group", "threat_model", "attacks", "members", "nonmembers", "p", "images_needed"),
        "exposed": ("group", "end", "sample_id", "exposure", "tables", "image"),
        "near_copies": ("group", "seed", "target_index", "generated", "training", "sample_id", "ratio"),
        "utility": ("group", "seed", "target_index", "snapshot", *UTILITY),
        "roc_points": ("group", "attack", "threat_model", "fpr", "tpr", "low", "high"),
        "settings": ("group", "setting", "value"),
        "runs": ("group", "folder", "attack", "threat_model", "seed", "target_index", *RUN, "cell"),
    }
    rows: dict[str, list[list[Any]]] = {key: [] for key in columns}
    for section in sections:
        for key, lines in _rows(section).items():
            rows[key] += [[section["group"].letter, *cells] for cells in lines]
    tables = {key: Table(columns[key], lines) for key, lines in rows.items()}
    groups = [section["group"] for section in sections]
    board = [line(group, row) for group in groups for row in group.rows]
    tables["leaderboard"] = Table(list(board[0]), [list(cells.values()) for cells in board])
    differing = [[key, group.letter, value] for key, values in separating(groups) for group, value in zip(groups, values, strict=True)]
    tables["what_separates_groups"] = Table(("setting", "group", "value"), differing)
    tables["notes"] = Table(("kind", "where", "why"), [[note.kind, note.where, note.why] for note in ordered(found.notes)])
    named = {f"report/{key}": table for key, table in tables.items() if table.rows}
    return named | {f"figures/{key}_table": _of_figures(drawn) for key, drawn in _by_key(sections).items()}


def _rows(section: Plain) -> dict[str, list[list[Any]]]:
    """What the tables say of one group, but for its letter."""
    group = section["group"]
    curves = [(row, evidence.curve(row, LOW_FPR)) for row in group.final]
    return {
        "verdicts": [
            [group.title, v["row"].name, *(v[key] for key in VERDICT), *v["row"].auc, *over[1:], "; ".join(v["unsound"])]
            for v in section["verdicts"]
            for over in [v["over_targets"] or (None, None, None)]
        ],
        "controls": [
            [row.name, row.threat_model, name, *(c.get(key) for key in CONTROL), *(c.get("auc_ci") or (None, None))]
            for row, cells in section["controls"]["lines"]
            for name, c in cells.items()
        ],
        "comparisons": [[c.best, c.other, *c.difference, c.p] for c in section["comparisons"]],
        "epsilon": [
            [e["row"].name, e["row"].threat_model, *(e[key] for key in EPSILON), "; ".join(e["whys"])] for e in section["epsilons"]
        ],
        "privacy": [
            [a["row"].name, a["row"].threat_model, a["run"].seed, a["run"].target_index, *(a[key] for key in ACCOUNT)]
            for a in section["accounts"]
        ],
        "set_level": [[s.threat_model, s.attacks, s.members, s.nonmembers, s.p, s.needed] for s in section["cdi"]],
        "exposed": [[end, e.sample_id, e.exposure, e.tables, e.pixels] for end in ("most", "least") for e in section[end]],
        "near_copies": [[m["run"].seed, m["run"].target_index, *pair] for m in section["memorisation"] for pair in m["pairs"]],
        "utility": [
            [u["run"].seed, u["run"].target_index, u["run"].metrics.get("snapshot"), *(u["numbers"].get(key) for key in UTILITY)]
            for u in section["utility"]
        ],
        "roc_points": [
            [row.name, row.threat_model, *point]
            for row, c in curves
            for point in zip(c.fpr.tolist(), c.tpr.tolist(), c.low.tolist(), c.high.tolist(), strict=True)
        ],
        "settings": [[key, value] for key, value in flat(section["common"] | {"versions": section["versions"]}).items()],
        "runs": [
            [str(run.folder), row.name, row.threat_model, run.seed, run.target_index, *(run.metrics[key] for key in RUN), run.overrides]
            for row in group.rows
            for run in row.runs
        ],
    }


def _by_key(sections: Sequence[Plain]) -> dict[str, list[tuple[str, Figure]]]:
    """Figures of one kind together, each with the letter of its group."""
    drawn: dict[str, list[tuple[str, Figure]]] = {}
    for section in sections:
        for figure in section["figures"]:
            drawn.setdefault(figure.key, []).append((section["group"].letter, figure))
    return drawn


def _of_figures(drawn: Sequence[tuple[str, Figure]]) -> Table:
    """The numbers of figures of one kind; a figure need not have all of the columns."""
    columns = list(dict.fromkeys(column for _, figure in drawn for column in figure.columns))
    rows = []
    for letter, figure in drawn:
        for row in figure.rows:
            cells = dict(zip(figure.columns, row, strict=True))
            rows.append([letter, figure.title, *(cells.get(column) for column in columns)])
    return Table(["group", "figure", *columns], rows)
