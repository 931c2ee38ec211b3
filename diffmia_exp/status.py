"""python -m diffmia_exp.status [FOLDER] [--watch]: what grids and runs are doing. Reads files alone, and imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmia_exp import claims, grid
from diffmia_exp.errors import UserError

SHOWN = 20
"""Lines of one kind that are printed; of more, their number."""

EVERY = 5.0
"""Seconds between two looks with --watch."""


@dataclass(frozen=True)
class Work:
    """An entry that is being made, or was when its maker died: which, by whom, and how far it is."""

    what: str
    owner: dict[str, Any]
    progress: dict[str, Any]
    lost: bool


def working(output_dir: Path) -> Iterator[Work]:
    """Everything below an output folder that is claimed."""
    for kind in sorted(entry.path for entry in os.scandir(output_dir) if entry.is_dir() and entry.name not in ("sweeps", "wandb")):
        for name in sorted(entry.name for entry in os.scandir(kind) if entry.name.endswith(".claim")):
            claim = Path(kind, name)
            if (who := claims.owner(claim)) is not None:
                what = f"{Path(kind).name}/{name.removesuffix('.claim').lstrip('.')}"
                yield Work(what, who, _progress(claim), claims.is_stale(claim, who))


def _progress(claim: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((claim / "progress.json").read_text())
        return found
    except (OSError, ValueError):
        return {}


def overview(folder: Path) -> str:
    """The state of an output folder, or of one grid, as text.

    Args:
        folder: an output folder, or the folder of a grid.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an output folder, or the folder of a grid")
    one = (folder / "cells.json").exists()
    sweeps = [folder] if one else sorted((f.parent for f in folder.glob("sweeps/*/cells.json")), key=_begun)
    lines: list[str] = []
    for n, sweep in enumerate(sweeps):
        cells = grid.cells(sweep)
        counts = Counter(cell.state for cell in cells)
        if n < len(sweeps) - 1 and not counts.keys() & {"running", "waiting"}:
            continue  # ended, and not the last one
        states = ", ".join(f"{counts[state]} {state}" for state in grid.STATES if counts[state])
        lines.append(f"{sweep.name}: {len(cells)} cells: {states or 'nothing to do'}")
        lines += _few([f"  running  {_cell(cell)}  {_who(cell.facts)}" for cell in cells if cell.state == "running"])
        lines += _few([f"  failed   {_cell(cell)}  {cell.facts.get('error', '')}" for cell in cells if cell.state == "failed"])
        lines += _few([f"  lost     {_cell(cell)}  {_who(cell.facts)}" for cell in cells if cell.state == "lost"])
        if counts["failed"] + counts["lost"] and not counts["running"] + counts["waiting"]:
            lines.append(f"  again: python run.py --rerun-failed {sweep}")
    works = list(working(sweeps[0].parents[1] if one else folder))
    lines += ["in the making:" if works else "nothing is in the making"]
    lines += _few([f"  {_work(work)}" for work in works])
    return "\n".join(lines)


def _begun(sweep: Path) -> float:
    return (sweep / "cells.json").stat().st_mtime


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    return lines if more <= 0 else [*lines[:SHOWN], f"  .. and {more} more"]


def _cell(cell: grid.Cell) -> str:
    return f"{cell.number}: {' '.join(cell.overrides)}"


def _who(owner: dict[str, Any]) -> str:
    job = f", SLURM job {owner['slurm_job_id']}" if owner.get("slurm_job_id") else ""
    return f"[{owner.get('user', '?')}@{owner.get('host', '?')} {owner.get('pid', '?')}{job}, since {owner.get('since', '?')}]"


def _work(work: Work) -> str:
    if work.lost:
        return f"{work.what}  LOST; whoever wants it goes on  {_who(work.owner)}"
    if not work.progress:
        return f"{work.what}  {_who(work.owner)}"
    done, total = work.progress["done"], work.progress["total"]
    return f"{work.what}  {work.progress['label']}: {done} of {total} {work.progress['unit']}s, {done / total:.0%}  {_who(work.owner)}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmia_exp.status", description="What grids and runs are doing.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help="an output folder or the folder of a grid")
    parser.add_argument("--watch", action="store_true", help="look again every few seconds, until Ctrl-C")
    given = parser.parse_args(arguments)
    try:
        while True:
            text = overview(given.folder)
            print("\033[H\033[2J" + text if given.watch and sys.stdout.isatty() else text, flush=True)
            if not given.watch:
                return
            time.sleep(EVERY)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
