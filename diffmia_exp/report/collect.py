"""Finding runs and sweeps: what can be shown, and what cannot, each with the reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from diffmia_exp.errors import UserError
from diffmia_exp.report.reading import NotDone, Run, read, said

TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class Note:
    """Something that is not among the results, or is with a reservation: where it lies, what it is, and why."""

    kind: str
    where: str
    why: str


@dataclass
class Collection:
    """What a report is made from."""

    runs: list[Run] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def note(self, kind: str, where: object, why: str) -> None:
        """Add a note."""
        self.notes.append(Note(kind, str(where), why))


def collect(folders: Iterable[Path]) -> Collection:
    """Every run under the folders: run folders, and sweeps whose cells name their runs.

    Raises:
        UserError: if a folder does not exist.
    """
    found = Collection()
    paths: dict[Path, None] = {}  # ordered sets
    cells: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a folder with runs, as outputs or outputs/runs")
        _walk(folder, paths, cells, found)
    overrides = _grid_cells(cells, paths, found)
    seen: dict[str, Path] = {}
    for path in paths:
        try:
            run = read(path, overrides.get(path.name))
        except NotDone as e:
            found.note(e.kind, path, str(e))
            continue
        key = str(run.metrics["run_key"])
        if key in seen:
            found.note("counted once", path, f"the same run as {seen[key]}")
            continue
        seen[key] = path
        if run.older:
            found.note("older format", path, f"lacks {', '.join(run.older)}; shown, but compared with runs of its own format only")
        found.runs.append(run)
    if not paths and not found.notes:
        found.note("nothing here", ", ".join(map(str, folders)), "no run folder and no sweep; runs are written to outputs/runs")
    return found


def _walk(root: Path, paths: dict[Path, None], cells: dict[Path, None], found: Collection) -> None:
    for name, folders, files in os.walk(root):
        here = Path(name)
        folders.sort()
        if "spec.yaml" in files or here.name == "wandb":  # an entry of a store, or W&B's copies
            folders.clear()
        elif "metrics.json" in files or (here.parent.name == "runs" and here.name[:1] != ".") or {"scores.parquet", "run.log"} & set(files):
            paths[here.resolve() if here == Path() else here] = None
            folders.clear()
        elif TEMPORARY.fullmatch(here.name):
            found.note("unfinished", here, "a run that is still being written, or was killed while it was")
            folders.clear()
        elif "multirun.yaml" in files:
            cells |= {here / cell: None for cell in sorted((f for f in folders if f.isdigit()), key=int)}
            folders.clear()


def _grid_cells(cells: Iterable[Path], paths: dict[Path, None], found: Collection) -> dict[str, str]:
    """Note the cells without a result, add the runs of the others to `paths`; returns each run's overrides."""
    overrides: dict[str, str] = {}
    failed: list[tuple[Path, str, str]] = []
    for cell in cells:
        try:
            status = json.loads((cell / "status.json").read_text())
            kind, given = status["status"], str(status.get("overrides", ""))
            if kind == "failed":
                failed.append((cell, given, str(status["error"])))
            elif kind not in ("trained", "measured"):
                overrides[status["run"]] = given
                run = cell.parents[2] / "runs" / status["run"]
                if not any(run.name == path.name for path in paths):
                    paths[run] = None
        except FileNotFoundError:
            found.note("unfinished", cell, "this cell of a grid has no status.json: it is still running, or was killed")
        except (OSError, ValueError, KeyError, TypeError) as e:
            found.note("damaged", cell / "status.json", f"cannot be read ({said(e)})")
    for cell, given, error in failed:
        since = "; the same settings gave a result elsewhere" if given in overrides.values() else ""
        found.note("failed", cell, f"{given}: {error}{since}")
    return overrides
