"""A grid's folder: which cells it has, and what has become of each. Imports nothing heavy.

outputs/sweeps/<grid>/cells.json        the overrides of every cell, written before the first one starts
outputs/sweeps/<grid>/<n>/cell.claim/   who runs cell n, with a heartbeat
outputs/sweeps/<grid>/<n>/status.json   how it ended
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmia_exp import claims
from diffmia_exp.errors import UserError

STATES = ("done", "cached", "running", "waiting", "failed", "lost", "not applicable", "trained", "measured")
"""What a cell may be: `cached` was found, not computed; `lost` was begun by a process that is gone without a word."""


@dataclass(frozen=True)
class Cell:
    """One cell of a grid, its overrides, its state (one of STATES), and what `status.json` or its claim's owner says of it."""

    number: int
    folder: Path
    overrides: list[str]
    state: str
    facts: dict[str, Any]


def plan(sweep: Path, cells: Sequence[Sequence[str]], hydra: Sequence[str], task: Sequence[str]) -> None:
    """Write down what a grid consists of, and the overrides it was asked for with."""
    sweep.mkdir(parents=True, exist_ok=True)
    content = {"hydra": list(hydra), "task": list(task), "cells": [list(cell) for cell in cells]}
    claims.write_atomic(sweep / "cells.json", json.dumps(content, indent=1))


def planned(sweep: Path) -> dict[str, list[Any]]:
    """What `plan` wrote.

    Raises:
        UserError: if it is not there.
    """
    try:
        return json.loads((sweep / "cells.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{sweep}: no folder of a grid (cells.json is missing); give one of outputs/sweeps") from None


def ended(cell: Path, **facts: Any) -> None:
    """Write down in a cell's folder how it ended: `status`, and what belongs to it."""
    cell.mkdir(parents=True, exist_ok=True)
    claims.write_atomic(cell / "status.json", json.dumps(facts, indent=1))


def cells(sweep: Path) -> list[Cell]:
    """The cells of a grid as they are now."""
    return [_cell(n, sweep / str(n), overrides) for n, overrides in enumerate(planned(sweep)["cells"])]


def _cell(number: int, folder: Path, overrides: list[str]) -> Cell:
    who = claims.owner(folder / "cell.claim")
    if who is not None and not claims.is_stale(folder / "cell.claim", who):
        return Cell(number, folder, overrides, "running", who)
    try:
        facts = json.loads((folder / "status.json").read_text())
        return Cell(number, folder, overrides, "cached" if facts.get("cached") else facts["status"], facts)
    except (OSError, ValueError, KeyError, TypeError):
        return Cell(number, folder, overrides, "waiting" if who is None else "lost", who or {})


def unfinished(sweep: Path) -> list[list[str]]:
    """The overrides of the cells that failed or were lost."""
    return [cell.overrides for cell in cells(sweep) if cell.state in ("failed", "lost")]


def latest(output_dir: Path) -> Path:
    """The grid that was begun last.

    Raises:
        UserError: if there is none.
    """
    found = [file.parent for file in output_dir.glob("sweeps/*/cells.json")]
    if not found:
        raise UserError(f"{output_dir}/sweeps: holds no grid; give the folder of one")
    return max(found, key=lambda sweep: (sweep / "cells.json").stat().st_mtime)
