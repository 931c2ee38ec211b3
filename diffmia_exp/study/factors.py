"""Grids `experiment=study_<factor>` that sweep one key, with everything else fixed, over targets and attacks; and what the key does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from diffmia_exp import grid, intervals
from diffmia_exp.config import Plain
from diffmia_exp.errors import UserError
from diffmia_exp.report.groups import Estimate, estimate
from diffmia_exp.report.reading import NotDone, Run, read
from diffmia_exp.report.settings import comparable, flat
from diffmia_exp.store import digest

PREFIX = "study_"

REPEATED = ("attack", "attack/plugin", "threat_model", "split.target_index", "seed", "experiment")
"""What a grid may sweep beside its factor."""


@dataclass(frozen=True)
class Level:
    """One value of a factor, as it was typed, with the runs of one attack at it."""

    value: str
    runs: tuple[Run, ...]
    copies: str | None = None
    """How many times the members that count are in the training set; None where all count."""

    @property
    def number(self) -> float | None:
        """Where it lies on an axis of numbers; None for a name. A snapshot lies at its epochs."""
        if self.value.startswith("snapshot="):
            return float(f"{np.mean([run.metrics['epochs'] for run in self.runs]):.3g}")
        try:
            return float(self.value.split("=", 1)[1])
        except ValueError:
            return None

    @property
    def text(self) -> str:
        """The value for people."""
        return f"{self.number:.4g}" if self.number is not None else self.value.split("=", 1)[1]

    @property
    def aucs(self) -> list[float]:
        """AUC of each run."""
        return [float(found["auc"]) for found in self._found]

    @property
    def _found(self) -> list[Plain]:
        return [run.metrics if self.copies is None else run.metrics["auc_by_copies"][self.copies] for run in self.runs]

    @property
    def auc(self) -> Estimate:
        """Mean AUC over targets with its 95% interval (Student's t), that of the one run where there is one only."""
        return estimate(self.aucs, self._found[0]["auc_ci"])

    def utility(self, key: str) -> Estimate | None:
        """Mean of a measure of utility over targets with its 95% interval; None where it was not measured, or of one target only."""
        values = [run.metrics["utility"][key] for run in self.runs if "utility" in run.metrics]
        if len(values) < max(2, len(self.runs)):
            return None
        mean, (low, high) = intervals.mean_interval(values)
        return mean, low, high

    @property
    def learned(self) -> bool:
        """Whether every model has learned, as far as that is known."""
        return all(run.metrics.get("utility", {}).get("learned", True) for run in self.runs)


@dataclass(frozen=True)
class Factor:
    """A key that was swept: for every attack the levels, in the order of the key's values."""

    name: str
    key: str
    attacks: dict[str, tuple[Level, ...]]

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        return all(level.number is not None for levels in self.attacks.values() for level in levels)

    @property
    def axis(self) -> str:
        """What its values are, for people."""
        return "epochs of training" if self.key == "snapshot" else self.key

    def worth(self, measure: str) -> dict[str, Estimate | None]:
        """A measure of utility by the text of the values; empty where it is the same at all, as where the models are not touched."""
        at = {level.text: level.utility(measure) for levels in self.attacks.values() for level in levels}
        return at if len(set(at.values())) > 1 else {}


@dataclass(frozen=True)
class Effect:
    """What a factor does to an attack's AUC between two values: the difference with its 95% interval, over so many targets."""

    attack: str
    before: Level
    after: Level
    difference: Estimate | None
    paired: bool


def read_all(outputs: Path) -> list[Factor]:
    """The factors that grids under `outputs` have swept, by name; several grids of one experiment count as one.

    Raises:
        UserError: if there is none, a grid sweeps more than one key, or runs of one value are not repetitions of each other.
    """
    sweeps: dict[str, list[Path]] = {}
    for file in sorted(outputs.glob(f"sweeps/*{PREFIX}*/cells.json")):
        sweeps.setdefault(file.parent.name.rsplit("-", 6)[0], []).append(file.parent)
    found = [factor for name, folders in sweeps.items() if (factor := _factor(name, folders, outputs)) is not None]
    if not found:
        raise UserError(f"{outputs}: holds no finished grid of a factor; python run.py experiment={PREFIX}members makes one")
    return [*found, *(by for factor in found if (by := by_copies(factor)) is not None)]


def by_copies(factor: Factor) -> Factor | None:
    """How many times an image is in the training set, as a factor of its own; None where every run has each image once."""
    attacks = {}
    for attack, levels in factor.attacks.items():
        for level in levels:
            if numbers := level.runs[0].metrics.get("auc_by_copies"):
                times = tuple(Level(f"copies={n}", level.runs, n) for n in sorted(numbers, key=int))
                attacks[f"{attack}, {level.text}"] = times
    return Factor(f"{factor.name}-each", "copies in the training set", attacks) if attacks else None


def _factor(name: str, folders: Sequence[Path], outputs: Path) -> Factor | None:
    runs: dict[str, tuple[list[str], Run]] = {}
    for cell in (cell for folder in folders for cell in grid.cells(folder)):
        if cell.state in ("done", "cached"):
            try:
                runs[cell.facts["run"]] = cell.overrides, read(outputs / "runs" / cell.facts["run"], None)
            except NotDone as e:
                raise UserError(f"{outputs / 'runs' / cell.facts['run']}: {e}; run experiment={name} again") from None
    values: dict[str, dict[str, None]] = {}
    for overrides, _ in runs.values():
        for key, value in (o.split("=", 1) for o in overrides):
            values.setdefault(key, {})[value] = None
    several = [key for key, seen in values.items() if len(seen) > 1]
    swept = [key for key in several if key not in REPEATED] or [key for key in several if key == "threat_model"]
    if not swept:
        return None
    if len(swept) > 1:
        raise UserError(f"{name}: sweeps {', '.join(swept)}; a factor is one key, so sweep them in experiments of their own")
    key = swept[0]
    attacks: dict[str, dict[str, list[Run]]] = {}
    alike: dict[str, tuple[str, Run]] = {}
    for overrides, run in runs.values():
        value = next(o for o in overrides if o.startswith(f"{key}="))
        _compare(name, value, run, alike)
        attack = run.label if key == "threat_model" else f"{run.label}, {run.metrics['threat_model']}"
        attacks.setdefault(attack, {}).setdefault(value, []).append(run)
    order = [f"{key}={value}" for value in values[key]]
    return Factor(name.replace(PREFIX, "", 1), key, {attack: _levels(at, order) for attack, at in attacks.items()})


def _compare(name: str, value: str, run: Run, alike: dict[str, tuple[str, Run]]) -> None:
    """Refuse a run that is no repetition of those that came before it, in `alike` by what they must agree in."""
    facts = comparable(run)
    agree = {
        f"{value}, whatever attacks it,": digest(flat(facts)),
        "all values": digest(flat({"versions": facts["versions"]})),
        f"{run.label}, {run.metrics['threat_model']}, {value}, {run.seed}, {run.target_index}": str(run.metrics["run_key"]),
    }
    for what, of in agree.items():
        seen, other = alike.setdefault(what, (of, run))
        if seen != of:
            why = f"{other.folder.name} and {run.folder.name} differ in settings or versions"
            raise UserError(f"{name}: {what}: {why}; move the folder of the older grid out of sweeps/, or give another output_dir")


def _levels(runs: dict[str, list[Run]], order: Sequence[str]) -> tuple[Level, ...]:
    levels = [Level(value, tuple(sorted(runs[value], key=lambda run: (run.seed, run.target_index)))) for value in order if value in runs]
    return tuple(sorted(levels, key=lambda level: level.number if level.number is not None else 0))


def effects(factor: Factor) -> list[Effect]:
    """What the factor does: from the smallest to the largest number, or from the first name to each other one; not where it is nothing."""
    made = []
    for attack, levels in factor.attacks.items():
        for after in levels[-1:] if factor.numeric else levels[1:]:
            if after is not levels[0] and after.aucs != levels[0].aucs:
                made.append(Effect(attack, levels[0], after, *difference(levels[0], after)))
    return made


def difference(before: Level, after: Level) -> tuple[Estimate | None, bool]:
    """Mean difference of AUC with its 95% interval, None for fewer than two targets a level; and whether targets were paired.

    Targets are paired where both levels have the same ones, with the same images and members; else Welch's interval is taken.
    """
    a, b = before.aucs, after.aucs
    if min(len(a), len(b)) < 2:
        return None, False
    if [run.images for run in before.runs] == [run.images for run in after.runs]:
        mean, (low, high) = intervals.mean_interval(np.subtract(b, a))
        return (mean, low, high), True
    mean = float(np.mean(b) - np.mean(a))
    if np.ptp(a) == np.ptp(b) == 0:
        return (mean, mean, mean), False
    with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):  # that one end is the same for all targets, as an AUC of 1 is
        low, high = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return (mean, float(low), float(high)), False
