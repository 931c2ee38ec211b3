"""python -m diffmia_exp.table RUNS.. --out FOLDER: one row per attack and threat model, over all its targets, as CSV and Markdown.

RUNS are sweep or run folders. Targets are the different models that were attacked; the interval is that of the mean AUC over targets
(Student's t; targets that share a pool are not independent), and of the one AUC (DeLong) where there is one target only.
With several snapshots `auc_along_training.png` is drawn.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from diffmia_exp.errors import UserError

COLUMNS = ("attack", "threat model", "targets", "AUC", "AUC low", "AUC high", "TPR@1% FPR", "TPR@1% low", "TPR@1% high")
COSTS = ("evaluations per image", "shadow trainings", "seconds")


def collect(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The metrics of every finished run under the folders: run folders, or sweeps whose cells name their runs.

    Raises:
        UserError: if a folder is missing or holds none.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a sweep (outputs/sweeps/..) or run folders")
        paths = list(folder.rglob("metrics.json"))
        for status in folder.rglob("status.json"):
            cell = json.loads(status.read_text())
            if "run" in cell:
                paths.append(status.parents[3] / "runs" / cell["run"] / "metrics.json")
        for path in paths:
            result = json.loads(path.read_text()) if path.exists() else {"status": "missing"}
            if result["status"] == "done":
                found[result["run_key"]] = result
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no finished run in here")
    return list(found.values())


def summarised(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per attack and threat model, best AUC first within a threat model."""
    rows = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in results:  # snapshots and data sets are no further targets, but rows of their own
        where = "" if len({q["dataset"] for q in results}) == 1 else f" on {r['dataset']}"
        when = "" if r["snapshot"] is None else f" at step {r['snapshot']}"
        groups.setdefault((r["threat_model"], r["label"] + where + when), []).append(r)
    for (threat_model, attack), runs in groups.items():
        aucs = [r["auc"] for r in runs]
        tprs = [r["tpr_at_fpr"]["0.01"]["tpr"] for r in runs if r["tpr_at_fpr"].get("0.01", {}).get("resolvable")]
        low, high = _interval(aucs, runs[0]["auc_ci"])
        tpr = (float(np.mean(tprs)), *_interval(tprs, runs[0]["tpr_at_fpr"]["0.01"]["ci"])) if tprs else (None, None, None)
        cost = [float(np.mean([r[k] for r in runs])) for k in ("nfe_per_image", "shadow_trainings", "seconds")]
        values = (attack, threat_model, len(runs), float(np.mean(aucs)), low, high, *tpr)
        rows.append(dict(zip((*COLUMNS, *COSTS), (*values, *cost), strict=True)))
    return sorted(rows, key=lambda row: (row["threat model"], -row["AUC"]))


def _interval(values: list[float], of_one: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return of_one[0], of_one[1]
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return max(0.0, float(np.mean(values) - half)), min(1.0, float(np.mean(values) + half))


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """`table.csv` with every digit, `table.md` to read."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "table.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    def three(*values: float | None) -> str:
        return "unresolvable" if values[0] is None else f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"

    lines = ["| attack | threat model | targets | AUC [95% interval] | TPR at 1% FPR | evaluations per image | shadow trainings |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        auc, tpr = three(r["AUC"], r["AUC low"], r["AUC high"]), three(r["TPR@1% FPR"], r["TPR@1% low"], r["TPR@1% high"])
        cost = f"{r['evaluations per image']:.4g} | {r['shadow trainings']:.0f}"
        lines.append(f"| `{r['attack']}` | {r['threat model']} | {r['targets']} | {auc} | {tpr} | {cost} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmia_exp.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        results = collect(given.runs)
        write(summarised(results), given.out)
        if len({r["snapshot"] for r in results}) > 1:
            from diffmia_exp import figures

            figures.along_training(given.out / "auc_along_training.png", results)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    print((given.out / "table.md").read_text(), end="")


if __name__ == "__main__":
    main()
