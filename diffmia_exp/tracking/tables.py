"""What of a run folder stands in W&B: its numbers, its tables and its ROC curve, as plain values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffmia_exp import metrics
from diffmia_exp.config import Plain
from diffmia_exp.scores import ScoreTable

LOW_FPR = 0.01
ROC_ROWS = 2000
"""Of a ROC table beyond LOW_FPR; below it every point is a row."""

LINE_LOW, LINE_REST = 500, 200
"""Points of a ROC line up to LOW_FPR, and beyond it: W&B draws a line of up to 1,000 points as it is."""


@dataclass(frozen=True)
class Table:
    """Rows under columns; a cell may be pixels, uint8 [C, H, W]. The values of a column are of one kind, or None."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def of_run(folder: Path) -> dict[str, Table]:
    """Every table of a run folder that has rows, by its W&B key."""
    result = json.loads((folder / "metrics.json").read_text())
    scores = ScoreTable.load(folder / "scores.parquet")
    rows = zip(scores.sample_id.tolist(), scores.is_member.tolist(), scores.score.tolist(), strict=True)
    selection, memorisation = result.get("selection") or {}, result.get("memorisation") or {}
    tables = {
        "score_table": Table(("sample_id", "is_member", "score"), list(rows)),
        "roc_table": Table(("fpr", "tpr", "threshold"), roc_rows(scores)),
        "tpr_table": _table("target_fpr", result["tpr_at_fpr"], ("tpr", "ci", "fpr", "threshold", "resolvable")),
        "transfer_table": _table("target_fpr", result.get("transfer"), ("threshold", "tpr", "tpr_ci", "fpr", "fpr_ci")),
        "control_table": _table(
            "control", result.get("controls"), ("sound", "auc", "auc_ci", "expected", "p_value", "called_members", "at_fpr", "n", "what")
        ),
        "epsilon_table": _table(
            "bound", result.get("epsilon"), ("epsilon", "delta", "confidence", "guesses", "correct", "images", "valid", "why")
        ),
        "selection_table": Table(
            ("settings", "shadow_auc", "chosen"),
            [
                (json.dumps(tried["settings"]), tried["shadow_auc"], tried["settings"] == selection["settings"])
                for tried in selection.get("tried") or []
            ],
        ),
        "memorisation_table": Table(
            ("quantile", "nn_ratio", "nn_ratio_of_held_out"),
            [
                (float(q), ratio, memorisation.get("nn_ratio_of_held_out", {}).get(q))
                for q, ratio in memorisation.get("nn_ratio", {}).items()
            ],
        ),
        "exposed_table": _arrays(folder / "exposed.npz", ("sample_id", "score", "images")),
        "near_copies_table": _arrays(folder / "near_copies.npz", ("generated", "training", "sample_id", "ratio")),
    }
    return {key: table for key, table in tables.items() if table.rows}


def _table(name: str, entries: Mapping[str, Plain] | None, keys: Sequence[str]) -> Table:
    """One row per entry; an interval becomes two columns."""
    columns = [name]
    for key in keys:
        columns += [f"{key.removesuffix('ci')}low", f"{key.removesuffix('ci')}high"] if key.endswith("ci") else [key]
    rows = []
    for label, entry in (entries or {}).items():
        cells: list[Any] = [label]
        for key in keys:
            value = entry.get(key)
            cells += (value or [None, None]) if key.endswith("ci") else [value]
        rows.append(cells)
    return Table(columns, rows)


def _arrays(path: Path, keys: Sequence[str]) -> Table:
    """The arrays of an npz file as columns; none where an older run has no such file."""
    if not path.exists():
        return Table(keys, [])
    with np.load(path, allow_pickle=False) as file:
        columns = [list(file[key]) if file[key].ndim == 4 else file[key].tolist() for key in keys]
    return Table(keys, list(zip(*columns, strict=True)))


def roc_rows(table: ScoreTable) -> list[list[float]]:
    """The exact ROC curve as rows; past ROC_ROWS only its right part is thinned, every point up to LOW_FPR stays."""
    curve = metrics.roc(table.is_member, table.score)
    low = np.flatnonzero(curve.fpr <= LOW_FPR)
    rest = np.flatnonzero(curve.fpr > LOW_FPR)
    if len(rest) > ROC_ROWS:
        rest = rest[np.linspace(0, len(rest) - 1, ROC_ROWS).round().astype(int)]
    kept = np.concatenate([low, rest])
    threshold = np.where(np.isfinite(curve.threshold), curve.threshold, table.score.max())
    return [[float(curve.fpr[i]), float(curve.tpr[i]), float(threshold[i])] for i in kept]


def roc_line(table: ScoreTable) -> Iterable[dict[str, float]]:
    """The ROC curve as steps of a W&B line plot, `roc/fpr` and `roc/tpr`, at FPRs that are whole numbers of false positives.

    Up to LOW_FPR these are all (LINE_LOW of them, evenly spaced in the logarithm, where there are more), beyond it LINE_REST.
    """
    n = int((~table.is_member).sum())
    curve = metrics.roc(table.is_member, table.score)
    low = max(1, int(LOW_FPR * n + 1e-9))
    below = np.arange(1, low + 1) if low <= LINE_LOW else np.geomspace(1, low, LINE_LOW).round()
    fpr = np.unique(np.concatenate([below, np.geomspace(low, n, LINE_REST).round()])) / n
    for at, tpr in zip(fpr.tolist(), metrics.tpr_at(curve, fpr).tolist(), strict=True):
        yield {"roc/fpr": at, "roc/tpr": tpr}


def numbers(result: Plain) -> dict[str, float | bool]:
    """The numbers of `metrics.json` under W&B's keys."""
    found: dict[str, Any] = {
        "test/auc": result["auc"],
        "test/auc_low": result["auc_ci"][0],
        "test/auc_high": result["auc_ci"][1],
        "test/balanced_accuracy": result["balanced_accuracy"],
        "test/sound": result.get("sound"),
        "test/n_members": result["n_members"],
        "test/n_nonmembers": result["n_nonmembers"],
        "cost/nfe_per_image": result["nfe_per_image"],
        "cost/seconds": result["seconds"],
    }
    found |= {f"test/tpr_at_fpr_{fpr}": at["tpr"] for fpr, at in result["tpr_at_fpr"].items() if at["resolvable"]}
    found |= {f"cost/{key}": result.get(key) for key in ("shadow_trainings", "train_seconds", "parameters", "epochs")}
    found |= {f"memorisation/{key}": value for key, value in (result.get("memorisation") or {}).items()}
    found |= {f"utility/{key}": value for key, value in (result.get("utility") or {}).items()}
    for bound, content in (result.get("epsilon") or {}).items():
        found |= {f"epsilon/{bound}": content.get("epsilon"), f"epsilon/{bound}_valid": content.get("valid")}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def words(result: Plain) -> dict[str, str]:
    """What else stands in a W&B summary: what makes the run unsound, and how its settings were chosen."""
    selection = result.get("selection") or {}
    found = {"test/unsound": "; ".join(result.get("unsound") or []), "selection/select": selection.get("select", "")}
    found["selection/settings"] = json.dumps(selection["settings"]) if selection.get("settings") else ""
    return {key: value for key, value in found.items() if value}
