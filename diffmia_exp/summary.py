"""What a person reads in the terminal when a run or a grid has ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmia_exp.runs import Result


def results(finished: Sequence[Result]) -> None:
    """Print the table of one run or of all cells of a grid."""
    rows = [r for r in finished if r["status"] != "trained"]
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    common = set.intersection(*(set(r.overrides) for r in rows))
    columns = ("attack=", "threat_model=", "dataset=", "seed=")
    varied = [" ".join(o for o in r.overrides if o not in common and not o.startswith(columns)) for r in rows]
    fprs = list(dict.fromkeys(fpr for r in rows for fpr in r.get("tpr_at_fpr", {}) if fpr in ("0.01", "0.001")))
    alarms: dict[str, list[str]] = {}
    for r in rows:
        for sentence in r.get("unsound", ()):
            alarms.setdefault(sentence, []).append(f"{r['attack']}, {r['threat_model']}, {r['dataset']}, seed {r['seed']}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    for sentence, of in alarms.items():
        more = f" and {len(of) - 1} more" if len(of) > 1 else ""
        console.print(f"UNSOUND: {sentence} ({of[0]}{more})", style="bold red", soft_wrap=True, highlight=False, markup=False)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("attack", "threat model", "dataset", "seed", *(["settings"] if any(varied) else [])):
        table.add_column(heading, no_wrap=heading != "settings")
    for heading in ("AUC [95% interval]", *(f"TPR@{float(fpr):.1%} FPR" for fpr in fprs), "evals/image", "time", "controls"):
        table.add_column(heading, justify="right")
    for r, settings in zip(rows, varied, strict=True):
        start = [r["attack"], r["threat_model"], r["dataset"], str(r["seed"]), *([settings] if any(varied) else [])]
        if r["status"] != "done":
            table.add_row(*start, r["status"])
            continue
        cost = [f"{r['nfe_per_image']:g}", "found" if r.cached else f"{r['seconds']:.1f} s"]
        cost.append({True: "sound", False: "UNSOUND", None: "none"}[r["sound"]])
        table.add_row(*start, _interval(r["auc"], r["auc_ci"]), *(_tpr(r, fpr) for fpr in fprs), *cost)
    console.print(table)
    if len(rows) == 1 and rows[0].folder is not None:
        console.print(f"run folder: {rows[0].folder}", soft_wrap=True, highlight=False)
    for address in dict.fromkeys(_sync_command(r.tracked) for r in rows if r.tracked):
        console.print(f"W&B: {address}", soft_wrap=True, highlight=False)


def _sync_command(tracked: str) -> str:
    """The address of an online run, or the command that uploads the offline ones, training runs included."""
    return tracked if "://" in tracked else f"wandb sync --yes {os.path.dirname(tracked)}/offline-run-*"


def _interval(value: float, ci: list[float]) -> str:
    return f"{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"


def _tpr(result: dict[str, Any], fpr: str) -> str:
    at = result["tpr_at_fpr"][fpr]
    if not at["resolvable"]:
        return f"unresolvable (1/{result['n_nonmembers']})"
    return _interval(at["tpr"], at["ci"])
