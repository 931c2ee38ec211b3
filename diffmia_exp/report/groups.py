"""Putting together what may be compared: groups of runs of one experiment, and in a group one row per attack.

Runs are repetitions of each other where only the seed or the attacked row of the split differs. Everything else that the numbers
depend on - data, split, network, training, precision, versions of the code - must be equal, or they stand in different groups.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffmia_exp import intervals
from diffmia_exp.config import Plain
from diffmia_exp.report.collect import Collection
from diffmia_exp.report.reading import Run
from diffmia_exp.report.settings import comparable, flat, identity, varying
from diffmia_exp.store import digest

LEVELS = ("samples_only", "variation_api", "gray_box", "white_box")
"""Threat models from little access to much; others come after."""

Estimate = tuple[float, float, float]
"""A number with the ends of its 95% interval."""


@dataclass(frozen=True, eq=False)
class Row:
    """One attack under one threat model: one line of the leaderboard. `runs` differ in seed or target only.

    `settings` names what tells it from the other rows of the group with the same label.
    """

    label: str
    settings: str
    threat_model: str
    snapshot: int | None
    runs: tuple[Run, ...]
    auc: Estimate
    base: str  # equal for the snapshots of one attack

    @property
    def plain_name(self) -> str:
        """What the attack is called in tables and figures."""
        return self.label + (f" ({self.settings})" if self.settings else "")

    @property
    def name(self) -> str:
        """The same, with the training step of the attacked snapshot."""
        return self.plain_name + ("" if self.snapshot is None else f" at step {self.snapshot}")

    @property
    def first(self) -> Run:
        """The run with the least seed and target."""
        return self.runs[0]

    def mean(self, key: str) -> float:
        """Mean of a metric over the runs."""
        return float(np.mean([run.metrics.get(key, 0) for run in self.runs]))

    @property
    def epochs(self) -> float | None:
        """Epochs of training of the attacked model; None where a checkpoint came without them."""
        known = [run.metrics["epochs"] for run in self.runs if run.metrics.get("epochs") is not None]
        return float(np.mean(known)) if known else None

    def tpr(self, fpr: str) -> Estimate | None:
        """TPR at a target FPR; None where some run's non-members do not resolve it."""
        found = [run.metrics["tpr_at_fpr"].get(fpr, {}) for run in self.runs]
        if not all(at.get("resolvable") for at in found):
            return None
        return estimate([at["tpr"] for at in found], found[0]["ci"])

    @property
    def sound(self) -> bool | None:
        """False where a control of a run failed, True where those of all passed, None where some were not run."""
        verdicts = [run.metrics.get("sound") for run in self.runs]
        return False if False in verdicts else True if all(verdict is True for verdict in verdicts) else None

    @property
    def unsound(self) -> list[str]:
        """What the failed controls say."""
        return list(dict.fromkeys(str(why) for run in self.runs for why in run.metrics.get("unsound") or []))


@dataclass(frozen=True)
class Group:
    """Runs that may be compared: `letter` and `title` name it, `facts` is what they have in common."""

    letter: str
    title: str
    facts: Plain
    rows: tuple[Row, ...]

    @property
    def runs(self) -> list[Run]:
        """All its runs."""
        return [run for row in self.rows for run in row.runs]

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.rows[0].first.metrics["dataset"])

    @property
    def threat_models(self) -> list[str]:
        """Those of its rows, from little access to much."""
        return sorted({row.threat_model for row in self.rows}, key=access)

    def under(self, threat_model: str) -> list[Row]:
        """Rows of one threat model against the fully trained model (or the longest trained one), best first."""
        rows = [row for row in self.rows if row.threat_model == threat_model]
        full = [row for row in rows if row.snapshot is None]
        last = max((row.snapshot or 0 for row in rows), default=0)
        return full or [row for row in rows if row.snapshot == last]

    @property
    def final(self) -> list[Row]:
        """The same of all threat models, best first."""
        return sorted((row for tm in self.threat_models for row in self.under(tm)), key=lambda row: -row.auc[0])


def names(rows: Sequence[Row]) -> list[str]:
    """Names that tell rows apart: with the threat model where two have the same."""
    plain = [row.name for row in rows]
    return [f"{row.name}, {row.threat_model}" if plain.count(row.name) > 1 else row.name for row in rows]


def access(threat_model: str) -> tuple[int, str]:
    """Sorts threat models by how much they grant."""
    return LEVELS.index(threat_model) if threat_model in LEVELS else len(LEVELS), threat_model


def estimate(values: Sequence[float], of_one: Sequence[float]) -> Estimate:
    """Mean over repetitions with its interval (Student's t); the interval of the one run where there is one only."""
    if len(values) == 1:
        return float(values[0]), float(of_one[0]), float(of_one[1])
    mean, (low, high) = intervals.mean_interval(values)
    return mean, max(0.0, low), min(1.0, high)


def grouped(found: Collection) -> list[Group]:
    """The groups, largest first. Repetitions of one result are noted and counted once."""
    parts: dict[str, list[Run]] = {}
    for run in found.runs:
        parts.setdefault(digest(flat(comparable(run))), []).append(run)
    split = [part for runs in parts.values() for part in _of_equal_data(runs)]
    split.sort(key=lambda runs: (-len(runs), str(runs[0].folder)))
    shown = [comparable(run[0]) for run in split]
    return [
        Group(_letter(n), _title(facts, runs[0]), facts, tuple(_rows(runs, found)))
        for n, (facts, runs) in enumerate(zip(shown, split, strict=True))
    ]


def _of_equal_data(runs: list[Run]) -> list[list[Run]]:
    """Equal configs may stand for different files: where one seed and target gave different images, each set of images is apart."""
    images: dict[tuple[int, int], set[str]] = {}
    for run in runs:
        images.setdefault((run.seed, run.target_index), set()).add(run.images)
    if all(len(sets) == 1 for sets in images.values()):
        return [runs]
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(run.images, []).append(run)
    return list(parts.values())


def _rows(runs: list[Run], found: Collection) -> list[Row]:
    """One row per attack with its settings, threat model and attacked weights: by threat model, snapshots last, best first."""
    rows: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.target_index, "utility" not in run.metrics, str(run.folder))):
        repetitions = rows.setdefault(digest(flat(identity(run))), [])
        if same := [other for other in repetitions if (other.target, other.images) == (run.target, run.images)]:
            found.note("counted once", run.folder, f"the same attack on the same model as {same[0].folder}")
        else:
            repetitions.append(run)
    made = []
    for repetitions in rows.values():
        one = repetitions[0]
        alike = [
            identity(r[0]) for r in rows.values() if (r[0].label, r[0].metrics["threat_model"]) == (one.label, one.metrics["threat_model"])
        ]
        differing = varying(alike)[alike.index(identity(one))]
        settings = ", ".join(f"{key.split('.')[-1]}={value}" for key, value in differing.items() if key != "snapshot")
        base = digest(flat(identity(one) | {"snapshot": None}))
        auc = estimate([run.metrics["auc"] for run in repetitions], one.metrics["auc_ci"])
        snapshot = one.metrics.get("snapshot")
        made.append(Row(one.label, settings, str(one.metrics["threat_model"]), snapshot, tuple(repetitions), auc, base))
    return sorted(made, key=lambda row: (access(row.threat_model), row.snapshot is not None, -row.auc[0]))


def _letter(n: int) -> str:
    return string.ascii_uppercase[n] if n < 26 else f"Z{n - 25}"


def _title(facts: Plain, run: Run) -> str:
    model, training = facts["model"].get("name", "model"), facts["training"]
    defense = facts["defense"].get("name", "?")
    defended = "" if defense == "none" else f", defense {defense}"
    if "checkpoint" in facts:
        return f"{run.metrics['dataset']}, {model} network from a checkpoint{defended}"
    steps = f", {training['steps']} steps" if "steps" in training else ""
    return f"{run.metrics['dataset']}, {model} network{steps}{defended}"


def target_runs(group: Group) -> list[tuple[Run, dict[Row, Run]]]:
    """The targets that were attacked by several rows: for each one a run on it, and the run of every row on it, most rows first."""
    targets: dict[tuple[object, str], dict[Row, Run]] = {}
    for row in group.final:
        for run in row.runs:
            targets.setdefault((run.target, run.images), {})[row] = run
    ordered = sorted(targets.values(), key=lambda on: -len(on))
    return [(next(iter(on.values())), on) for on in ordered]


def aligned(run: Run) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Membership and score in the order of sample ids."""
    order = np.argsort(run.table.sample_id)
    return run.table.is_member[order], run.table.score[order]
