"""What a person reads in the terminal when a run or a grid has ended."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from diffmia_exp.runs import Result

MOST = 20
"""Lines of a leaderboard, of errors and of reasons at most; what is beyond is counted."""


@dataclass(frozen=True)
class Line:
    """A finished cell: what `metrics.json` holds, whether it was found rather than made, and its overrides."""

    result: dict[str, Any]
    cached: bool
    overrides: Sequence[str]


def single(result: Result) -> None:
    """Print the table of one run, where its folder is and where W&B logged it."""
    if result["status"] == "trained":
        return
    console = _console()
    _board(console, [Line(result, result.cached, result.overrides)])
    _copies(console, [Line(result, result.cached, result.overrides)])
    if result.folder is not None:
        _say(console, f"run folder: {result.folder}")
    if result.tracked:
        _say(console, f"W&B: {address(result.tracked)}")


def sweep(folder: Path) -> list[tuple[str, str]]:
    """Print what a grid has given so far, from the files that its cells left, wherever they ran.

    Args:
        folder: of the grid, with a folder per cell.

    Returns:
        the overrides and the error of every cell that failed.
    """
    cells = [path for path in folder.iterdir() if path.is_dir() and path.name[:1] != "."]  # .submitit has SLURM's logs
    statuses = [_status(cell) for cell in sorted(cells, key=_number)]
    failed = [(status["overrides"], status["error"]) for status in statuses if status["status"] == "failed"]
    lines = [Line(_metrics(status["folder"]), status["cached"], status["given"]) for status in statuses if "folder" in status]
    done = sorted((line for line in lines if line.result.get("status") == "done"), key=lambda line: -line.result["auc"])
    if not done and len(failed) == len(statuses):
        return failed
    console = _console()
    if done:
        _board(console, done)
        _copies(console, done[:MOST])
    reasons = [("", str(line.result["reason"])) for line in lines if line.result.get("status") == "not applicable"]
    for reason in told(reasons, most=0):
        _say(console, f"not applicable: {reason}")
    _say(console, _counts(statuses, sum(line.cached for line in done)))
    if done:
        _say(console, f"report: python -m diffmia_exp.report {shlex.quote(str(folder))}")
    for where in dict.fromkeys(address(status["tracked"]) for status in statuses if status.get("tracked")):
        _say(console, f"W&B: {where}")
    return failed


def told(pairs: Iterable[tuple[str, str]], most: int = MOST) -> list[str]:
    """Cells with what is said of them, a line each; cells of which the same is said share a line where there are more than `most`.

    Args:
        pairs: a cell's overrides, empty for a run that is not part of a grid, and what is said.
        most: cells with a line of their own.

    Returns:
        at most MOST lines, and one that counts the others.
    """
    pairs = list(pairs)
    cells: dict[str, list[str]] = {}
    for n, (cell, said) in enumerate(pairs):
        cells.setdefault(said if len(pairs) > most else f"{said}\0{n}", []).append(cell)
    lines = []
    for said, of in cells.items():
        more = f" (and {len(of) - 1} more cells)" if len(of) > 2 else " (and 1 more cell)" if len(of) == 2 else ""
        lines.append(f"{of[0]}: {said.split(chr(0))[0]}{more}" if of[0] else said.split(chr(0))[0])
    beyond = sum(map(len, list(cells.values())[MOST:]))
    return lines[:MOST] + ([f"{beyond} more cells, each with its reason in its status.json or metrics.json"] if beyond else [])


def address(tracked: str) -> str:
    """The address of an online run, or the command that uploads the offline ones, training runs included."""
    return tracked if "://" in tracked else f"wandb sync --yes {os.path.dirname(tracked)}/offline-run-*"


def _status(cell: Path) -> dict[str, Any]:
    """A cell's status.json; `not finished` where there is none."""
    try:
        status: dict[str, Any] = json.loads((cell / "status.json").read_text())
        return status
    except (OSError, ValueError):
        return {"status": "not finished"}


def _metrics(run: str) -> dict[str, Any]:
    try:
        metrics: dict[str, Any] = json.loads((Path(run) / "metrics.json").read_text())
        return metrics
    except (OSError, ValueError):  # the run folder was removed meanwhile
        return {}


def _number(cell: Path) -> tuple[float, str]:
    return (int(cell.name) if cell.name.isdigit() else math.inf), cell.name


def _counts(statuses: Sequence[dict[str, Any]], cached: int) -> str:
    """How many cells came to what."""
    of = {kind: sum(status["status"] == kind for status in statuses) for kind in dict.fromkeys(status["status"] for status in statuses)}
    said = [f"{n} {kind}" + (f" ({cached} of them cached)" if kind == "done" and cached else "") for kind, n in of.items()]
    return f"{len(statuses)} {'cell' if len(statuses) == 1 else 'cells'}: {', '.join(said)}"


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _say(console: Console, text: str, **style: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False, **style)  # type: ignore[arg-type]


def _board(console: Console, lines: Sequence[Line]) -> None:
    """A table of finished cells, MOST of them; what makes some unsound comes first."""
    from rich.markup import escape
    from rich.table import Table

    alarms: dict[str, list[str]] = {}
    for line in lines:
        for sentence in line.result.get("unsound", ()):
            alarms.setdefault(sentence, []).append("{attack}, {threat_model}, {dataset}, seed {seed}".format(**line.result))
    for sentence, of in alarms.items():
        more = f" and {len(of) - 1} more" if len(of) > 1 else ""
        _say(console, f"UNSOUND: {sentence} ({of[0]}{more})", style="bold red")
    common = set.intersection(*(set(line.overrides) for line in lines))
    columns = ("attack=", "threat_model=", "dataset=", "defense=", "seed=")
    defended = any(line.result.get("defense", "none") != "none" for line in lines)
    varied = [" ".join(o for o in line.overrides if o not in common and not o.startswith(columns)) for line in lines]
    fprs = list(dict.fromkeys(fpr for line in lines for fpr in line.result.get("tpr_at_fpr", {}) if fpr in ("0.01", "0.001")))
    private = any(line.result.get("privacy") for line in lines)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in (
        "attack",
        "threat model",
        "dataset",
        *(["defense"] if defended else []),
        "seed",
        *(["settings"] if any(varied) else []),
    ):
        table.add_column(heading, no_wrap=heading != "settings")
    for heading in (
        "AUC [95% interval]",
        *(f"TPR@{float(fpr):.1%} FPR" for fpr in fprs),
        *(["epsilon"] if private else []),
        "evals/image",
        "time",
        "controls",
    ):
        table.add_column(heading, justify="right")
    for line, settings in list(zip(lines, varied, strict=True))[:MOST]:
        r = line.result
        start = [r["attack"], r["threat_model"], r["dataset"], *([r.get("defense", "none")] if defended else []), str(r["seed"])]
        start += [escape(settings)] if any(varied) else []
        if r["status"] != "done":
            table.add_row(*start, r["status"])
            continue
        cost = [f"{r['nfe_per_image']:g}", "found" if line.cached else f"{r['seconds']:.1f} s"]
        cost.append({True: "sound", False: "UNSOUND", None: "none"}[r["sound"]])
        epsilon = [_epsilon(r.get("privacy"))] if private else []
        table.add_row(*start, _interval(r["auc"], r["auc_ci"]), *(_tpr(r, fpr) for fpr in fprs), *epsilon, *cost)
    console.print(table)
    if len(lines) > MOST:
        _say(console, f"and {len(lines) - MOST} more cells, down to an AUC of {lines[-1].result['auc']:.3f}")
    for sentence in _utilities([line.result for line in lines]):
        _say(console, sentence)


def _utilities(results: Iterable[dict[str, Any]]) -> list[str]:
    """A line for the utility of each target where it was measured, at most MOST."""
    of = {_utility(r["utility"]): "{dataset}, seed {seed}, row {target_index}".format(**r) for r in results if "utility" in r}
    named = [f"utility ({target}): {said}" if len(of) > 1 else f"utility: {said}" for said, target in of.items()]
    return named[:MOST] + ([f"and the utility of {len(named) - MOST} more targets"] if len(named) > MOST else [])


def _utility(u: dict[str, Any]) -> str:
    images = f"KID {u['kid']:.3g} ± {u['kid_se']:.1g}, FID {u['fid']:.3g}, precision {u['precision']:.2f}, recall {u['recall']:.2f}"
    loss = f"loss {u['loss_members']:.3g} members, {u['loss_heldout']:.3g} {u['heldout']}, {u['loss_linear']:.3g} linear"
    made = f"{u['features']}, {u['n_generated']} generated, {u['n_reference']} real"
    return f"{'' if u['learned'] else 'NOT LEARNED; '}{images}; {loss} ({made})"


def _copies(console: Console, lines: Sequence[Line]) -> None:
    """The AUC of the members that were in the training set once, twice, .., a line for each cell that has copies."""
    for line in lines:
        r = line.result
        if by := r.get("auc_by_copies"):
            of = ", ".join(f"x{number} {_interval(at['auc'], at['auc_ci'])}" for number, at in by.items())
            _say(console, f"AUC by copies, {r['attack']}, defense {r['defense']}, seed {r['seed']}: {of}")


def _interval(value: float, ci: list[float]) -> str:
    return f"{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"


def _tpr(result: dict[str, Any], fpr: str) -> str:
    at = result["tpr_at_fpr"].get(fpr)
    if at is None:
        return "not asked"
    if not at["resolvable"]:
        return f"unresolvable (1/{result['n_nonmembers']})"
    return _interval(at["tpr"], at["ci"])


def _epsilon(privacy: dict[str, Any] | None) -> str:
    """Between which bounds a private training's epsilon lies: the audit's and the accountant's."""
    if privacy is None:
        return "none"
    low = "" if privacy["audited"] is None else f"{privacy['audited']:.2f} to "
    return f"{low}{privacy['epsilon']:.2f}"
