"""One run folder: its files read and checked, so that nothing that comes later meets a surprise."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diffmia_exp.config import GROUPS, Plain
from diffmia_exp.scores import ScoreTable
from diffmia_exp.store import sha256

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where PyYAML has it
NUMBERS = ("auc", "nfe_per_image", "seconds", "n_members", "n_nonmembers", "balanced_accuracy", "seed")
NAMES = ("attack", "threat_model", "dataset", "name", "run_key", "train_key")
SINCE = ("label", "snapshot", "weights", "selection", "shadow_trainings")  # what runs of older versions lack
EVIDENCE = {
    "controls": dict,
    "epsilon": dict,
    "memorisation": dict,
    "utility": dict,
    "privacy": dict,
    "unsound": list,
    "versions": dict,
    "tpr_at_fpr": dict,
    "auc_by_copies": dict,
}


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


class NotDone(Exception):
    """A folder that gives no result."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def read(folder: Path, overrides: str | None) -> Run:
    """A run folder.

    Raises:
        NotDone: where a file is missing, damaged or not of a finished run.
    """
    metrics = _mapping(folder / "metrics.json", json.loads)
    if metrics.get("status") == "not applicable":
        raise NotDone("not applicable", str(metrics.get("reason", "no reason given")))
    if metrics.get("status") != "done":
        raise NotDone("unfinished", f"metrics.json has status {metrics.get('status')!r}, not done")
    _check(metrics)
    config = _mapping(folder / "config.yaml", lambda text: yaml.load(text, _LOADER))
    if wrong := [k for k, v in config.items() if k in GROUPS and not isinstance(v, dict | None)]:
        raise NotDone("damaged", f"config.yaml: {wrong[0]} is no group of settings")
    if type(index := (config.get("split") or {}).get("target_index", 0)) is not int:
        raise NotDone("damaged", f"config.yaml: split.target_index is {index!r}, no whole number")
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
        raise NotDone("damaged", f"scores.parquet cannot be read ({said(e)})") from None
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
        raise NotDone("damaged", f"{path.name} cannot be read ({said(e)})") from None
    if not isinstance(content, dict):
        raise NotDone("damaged", f"{path.name} holds no mapping")
    return content


def _check(metrics: Plain) -> None:
    """Everything that is computed with or hashed later must be of the expected form; what is only shown may be anything."""
    for key in (*NUMBERS, *NAMES, "auc_ci", "tpr_at_fpr"):
        if key not in metrics:
            raise NotDone("damaged", f"metrics.json lacks {key}")
    for key in (*NUMBERS, "shadow_trainings"):
        if not _number(metrics.get(key, 0)):
            raise NotDone("damaged", f"metrics.json: {key} is {metrics[key]!r}, no finite number")
    if not _interval(metrics["auc_ci"]):
        raise NotDone("damaged", f"metrics.json: auc_ci is {metrics['auc_ci']!r}, no interval")
    at = {key: metrics.get(key) for key in EVIDENCE}
    right = {key: value is None or isinstance(value, EVIDENCE[key]) for key, value in at.items()}
    right |= {key: isinstance(metrics[key], str) for key in NAMES}
    right["snapshot"] = metrics.get("snapshot") is None or type(metrics["snapshot"]) is int
    right["epochs"] = metrics.get("epochs") is None or _number(metrics["epochs"])
    for key in ("controls", "epsilon", "tpr_at_fpr", "auc_by_copies"):
        values = list((at[key] or {}).values()) if right[key] else []
        right[key] &= all(isinstance(v, dict) for v in values) and all(map(_fits, values))
    groups = list((at["auc_by_copies"] or {}).values()) if right["auc_by_copies"] else []
    right["auc_by_copies"] &= all(group.get("auc") is not None and group.get("auc_ci") is not None for group in groups)
    private = (at["privacy"] or {}) if right["privacy"] else {}
    right["privacy"] &= not private or (_number(private.get("epsilon")) and (private.get("audited") is None or _number(private["audited"])))
    if wrong := [key for key, fits in right.items() if not fits]:
        raise NotDone("damaged", f"metrics.json: {wrong[0]} is of another form than expected")


def _fits(value: Plain) -> bool:
    """Of a control, a bound or a TPR: its numbers are numbers and its intervals intervals, where it has them."""
    numbers = all(value.get(key) is None or _number(value[key]) for key in ("auc", "tpr", "called_members", "at_fpr", "p_value"))
    intervals = all(value.get(key) is None or _interval(value[key]) for key in ("auc_ci", "ci"))
    return numbers and intervals and not (value.get("resolvable") and (value.get("tpr") is None or value.get("ci") is None))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


def said(e: Exception) -> str:
    """The first line of an error."""
    return (str(e).splitlines() or [type(e).__name__])[0][:200]
