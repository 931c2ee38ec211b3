"""Settings and thresholds chosen on shadow models, never on the target's labels.

A few shadows (`attack.rehearsals`) play the target in turn, the others are their shadows. Settings: the candidate with the highest
mean AUC over the rehearsals. Threshold at a wanted FPR: that of the pooled non-members of the rehearsals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffmia_exp import metrics
from diffmia_exp.attacks.base import Attack
from diffmia_exp.config import Plain, build
from diffmia_exp.errors import ConfigError, choice, whole
from diffmia_exp.signals import Signals
from diffmia_exp.store import sha256

ABOUT = ("name", "select", "rehearsals", "grid")
"""Keys of an attack's config that are not arguments of its constructor."""


@dataclass(frozen=True)
class Candidate:
    """One setting of an attack.

    Args:
        settings: what it takes from the grid; empty for the settings as given.
        attack: ready to use.
        measures: the part of its config that its signals depend on.
    """

    settings: Plain
    attack: Attack
    measures: Plain


def candidates(config: Plain) -> list[Candidate]:
    """The settings that an attack's config asks for: one, or with select=shadow every point of its grid.

    Raises:
        ConfigError: for settings that the attack refuses, grid points included.
    """
    choice("attack.select", config.get("select", "published"), ("published", "shadow"))
    whole("attack.rehearsals", config.get("rehearsals", 1), least=1)
    grid = config.get("grid") or {}
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ConfigError("attack.grid", grid, "must give a list of values for each setting, as {t: [50, 100]}")
    if config.get("select") != "shadow" or not grid:
        points: list[Plain] = [{}]
    else:
        points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    made = [_built(config | point, "attack") for point in points]
    return [Candidate(point, attack, measures) for point, (attack, _, measures) in zip(points, made, strict=True)]


def _built(config: Plain, group: str) -> tuple[Attack, Plain, Plain]:
    """An attack, inside its plug-in if it has one, what its scores depend on, and the part of that which its signals depend on."""
    arguments = {k: v for k, v in config.items() if k not in (*ABOUT, "host", "plugin")}
    extra: Plain = {}
    scores: Plain = {}
    measures: Plain = {}
    if "host" in config:
        extra["host"], scores, measures = _built(config["host"], f"{group}.host")
    attack: Attack = build(group, arguments, Attack, **extra)
    scores, measures = _depends(attack, arguments, scores, measures)
    if config.get("plugin"):
        plugin = {k: v for k, v in config["plugin"].items() if k != "name"}
        attack = build(f"{group}.plugin", plugin, Attack, host=attack)
        scores, measures = _depends(attack, plugin, scores, measures)
    return attack, scores, measures


def _depends(attack: Attack, arguments: Plain, host_scores: Plain, host_measures: Plain) -> tuple[Plain, Plain]:
    """What an attack's scores depend on, and what its signals do: those of a host's that it relays, or of the host's scores."""
    arguments = by_content(arguments)
    host = {"host": host_scores} if host_scores else {}
    if getattr(attack, "relays", False):
        return arguments | host, host_measures
    return arguments | host, {k: v for k, v in arguments.items() if k not in attack.judging} | host


def by_content(arguments: Plain) -> Plain:
    """Arguments in which the file of its features' weights is known by what it holds, not by what it is called."""
    features = arguments.get("features")
    if not isinstance(features, dict) or not features.get("weights"):
        return arguments
    return arguments | {"features": features | {"weights": sha256(Path(features["weights"]).expanduser())}}


@dataclass(frozen=True)
class Rehearsal:
    """What the rehearsals of one candidate showed.

    Args:
        auc: mean over the rehearsals.
        nonmembers: pooled scores of their non-members.
    """

    auc: float
    nonmembers: NDArray[np.float64]


def rehearse(attack: Attack, signals: Signals, rehearsals: int) -> Rehearsal:
    """Let the first shadows play the target, on their own pools.

    Args:
        attack: whose `judge` is rehearsed.
        signals: with more than `attack.min_shadows` shadows.
        rehearsals: how many, at most.
    """
    areas, nonmembers = [], []
    for k in range(min(rehearsals, len(signals.keep))):
        score = attack.judge(signals.playing(k))
        pool, keep = signals.pool[k], signals.keep[k]
        areas.append(metrics.auc(keep[pool], score[pool])[0])
        nonmembers.append(score[pool & ~keep])
    return Rehearsal(float(np.mean(areas)), np.concatenate(nonmembers))


def choose(options: list[Candidate], signals: Callable[[Candidate], Signals], rehearsals: int) -> tuple[Candidate, Rehearsal, list[Plain]]:
    """The candidate with the highest mean AUC over the rehearsals (the first of equals), and how all of them did."""
    shown = [rehearse(option.attack, signals(option), rehearsals) for option in options]
    best = int(np.argmax([r.auc for r in shown]))
    return options[best], shown[best], [{"settings": o.settings, "shadow_auc": r.auc} for o, r in zip(options, shown, strict=True)]


def thresholds(rehearsal: Rehearsal, fprs: tuple[float, ...]) -> dict[str, float | None]:
    """For each FPR the least threshold that at most this share of the rehearsals' non-members reaches; None if unresolvable."""
    ordered = np.sort(rehearsal.nonmembers)[::-1]
    out: dict[str, float | None] = {}
    for fpr in fprs:
        allowed = int(np.floor(fpr * len(ordered) + 1e-9))
        # Just above the first score that must not be reached.
        out[f"{fpr:g}"] = float(np.nextafter(ordered[min(allowed, len(ordered) - 1)], np.inf)) if allowed else None
    return out


def transferred(is_member: NDArray[np.bool_], score: NDArray[np.float64], chosen: dict[str, float | None]) -> dict[str, Any]:
    """What the thresholds chosen on shadows do on the target: realised FPR and TPR with their Clopper-Pearson intervals."""
    out: dict[str, Any] = {}
    for fpr, threshold in chosen.items():
        if threshold is None:
            continue
        called = score >= threshold
        tp, fp, m, n = int(called[is_member].sum()), int(called[~is_member].sum()), int(is_member.sum()), int((~is_member).sum())
        out[fpr] = {"threshold": threshold, "tpr": tp / m, "tpr_ci": list(metrics.clopper_pearson(tp, m))}
        out[fpr] |= {"fpr": fp / n, "fpr_ci": list(metrics.clopper_pearson(fp, n))}
    return out
