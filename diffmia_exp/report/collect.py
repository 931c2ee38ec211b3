"""Reading run folders and sweeps: what can be shown, and what cannot, each with the reason."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diffmia_exp.config import Plain
from diffmia_exp.errors import UserError
from diffmia_exp.scores import ScoreTable
from diffmia_exp.store import sha256

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where PyYAML has it
STORES = {"models", "samples", "signals", "scores", "wandb"}
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")
NUMBERS = ("auc", "nfe_per_image", "seconds", "n_members", "n_nonmembers", "balanced_accuracy", "seed")
NAMES = ("attack", "threat_model", "dataset", "name", "run_key", "train_key")
SINCE = ("label", "snapshot", "weights", "selection", "shadow_trainings")  # what runs of older versions lack
EVIDENCE = {"controls": dict, "epsilon": dict, "memorisation": dict, "unsound": list, "versions": dict, "tpr_at_fpr": dict}


@dataclass(frozen=True)
class Run:
    """A finished run, read and checked: its metrics, resolved config and scores; `overrides` of the grid cell that made it."""

    folder: Path
    metrics: Plain
    config: Plain
    table: ScoreTable
    overrides: str | None = None

    @property
    def label(self) -> str:
        """The attack with its host, plug-in and way of choosing settings."""
        return str(self.metrics.get("label") or self.metrics["attack"])

    @property
    def older(self) -> list[str]:
        """The keys that a run of an older version lacks."""
        return [key for key in SINCE if key not in self.metrics]

    @property
    def seed(self) -> int:
        """Of the split, the training and the scoring noise."""
        return int(self.metrics["seed"])

    @property
    def target_index(self) -> int:
        """The row of the split that was attacked."""
        return int(self.group("split").get("target_index") or 0)

    @property
    def target(self) -> tuple[str, str, int | None]:
        """The attacked network: which training, which weights, after how many steps (None: all)."""
        return str(self.metrics["train_key"]), str(self.metrics.get("weights", "ema")), self.metrics.get("snapshot")

    @cached_property
    def images(self) -> str:
        """Which images were audited, and who is a member: equal where scores may be compared image by image."""
        order = np.argsort(self.table.sample_id)
        content = hashlib.sha256(str(self.metrics.get("audited_fingerprint")).encode())
        content.update(self.table.sample_id[order].astype("<i8").tobytes() + self.table.is_member[order].astype("u1").tobytes())
        return content.hexdigest()

    def group(self, name: str) -> Plain:
        """A group of the config, empty where an older version had none."""
        return dict(self.config.get(name) or {})


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
            run = _read(path, overrides.get(path.name))
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


class NotDone(Exception):
    """A folder that gives no result."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def _walk(root: Path, paths: dict[Path, None], cells: dict[Path, None], found: Collection) -> None:
    for name, folders, files in os.walk(root):
        here = Path(name)
        folders.sort()
        if "metrics.json" in files or (here.parent.name == "runs" and here.name[:1] != ".") or {"scores.parquet", "run.log"} & set(files):
            paths[here.resolve() if here == Path() else here] = None
            folders.clear()
        elif TEMPORARY.fullmatch(here.name):
            found.note("unfinished", here, "a run that is still being written, or was killed while it was")
            folders.clear()
        elif "multirun.yaml" in files:
            cells |= {here / cell: None for cell in sorted((f for f in folders if f.isdigit()), key=int)}
            folders.clear()
        else:
            folders[:] = [f for f in folders if f not in STORES]


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
            elif kind != "trained":
                overrides[status["run"]] = given
                run = cell.parents[2] / "runs" / status["run"]
                if not any(run.name == path.name for path in paths):
                    paths[run] = None
        except FileNotFoundError:
            found.note("unfinished", cell, "this cell of a grid has no status.json: it is still running, or was killed")
        except (OSError, ValueError, KeyError, TypeError) as e:
            found.note("damaged", cell / "status.json", f"cannot be read ({_said(e)})")
    for cell, given, error in failed:
        since = "; the same settings gave a result elsewhere" if given in overrides.values() else ""
        found.note("failed", cell, f"{given}: {error}{since}")
    return overrides


def _read(folder: Path, overrides: str | None) -> Run:
    """Raises NotDone where a file is missing, damaged or not of a finished run."""
    metrics = _mapping(folder / "metrics.json", json.loads)
    if metrics.get("status") == "not applicable":
        raise NotDone("not applicable", str(metrics.get("reason", "no reason given")))
    if metrics.get("status") != "done":
        raise NotDone("unfinished", f"metrics.json has status {metrics.get('status')!r}, not done")
    _check(metrics)
    config = _mapping(folder / "config.yaml", lambda text: yaml.load(text, _LOADER))
    if wrong := [k for k, v in config.items() if k in ("dataset", "split", "model", "attack", "threat_model") and not isinstance(v, dict)]:
        raise NotDone("damaged", f"config.yaml: {wrong[0]} is no group of settings")
    path = folder / "scores.parquet"
    try:
        table = ScoreTable.load(path)
        if not np.isfinite(table.score).all():
            raise NotDone(
                "damaged", f"scores.parquet: {int((~np.isfinite(table.score)).sum())} of {len(table.score)} scores are not finite"
            )
        counts = int(table.is_member.sum()), int((~table.is_member).sum())
    except NotDone:
        raise
    except FileNotFoundError:
        raise NotDone("damaged", "scores.parquet is missing") from None
    except Exception as e:  # whatever a parquet reader says to a file that is none
        raise NotDone("damaged", f"scores.parquet cannot be read ({_said(e)})") from None
    checksum = sha256(path)
    if counts != (metrics["n_members"], metrics["n_nonmembers"]) or metrics.get("scores_sha256", checksum) != checksum:
        raise NotDone("damaged", "scores.parquet is not the file that metrics.json was made from")
    return Run(folder, metrics, config, table, overrides)


def _mapping(path: Path, parse: Any) -> Plain:
    try:
        content = parse(path.read_text())
    except FileNotFoundError:
        unfinished = path.name == "metrics.json"
        why = "it is still running, was killed, or is no run" if unfinished else "so it is not known what the run may be compared with"
        raise NotDone("unfinished" if unfinished else "damaged", f"{path.name} is missing; {why}") from None
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise NotDone("damaged", f"{path.name} cannot be read ({_said(e)})") from None
    if not isinstance(content, dict):
        raise NotDone("damaged", f"{path.name} holds no mapping")
    return content


def _check(metrics: Plain) -> None:
    for key in (*NUMBERS, *NAMES, "auc_ci", "tpr_at_fpr"):
        if key not in metrics:
            raise NotDone("damaged", f"metrics.json lacks {key}")
    ci = metrics["auc_ci"]
    numbers = {key: metrics[key] for key in NUMBERS} | {"shadow_trainings": metrics.get("shadow_trainings", 0)}
    numbers |= dict(zip(("low", "high"), ci if isinstance(ci, list) else [], strict=False))
    for key, value in numbers.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise NotDone("damaged", f"metrics.json: {key} is {value!r}, no finite number")
    if not {"low", "high"} <= set(numbers):
        raise NotDone("damaged", f"metrics.json: auc_ci is {ci!r}, no interval")
    for key, kind in EVIDENCE.items():
        values = metrics.get(key)
        nested = key in ("controls", "epsilon", "tpr_at_fpr") and isinstance(values, dict)
        if values is not None and (not isinstance(values, kind) or (nested and not all(isinstance(v, dict) for v in values.values()))):
            raise NotDone("damaged", f"metrics.json: {key} is of another form than expected")


def _said(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]
