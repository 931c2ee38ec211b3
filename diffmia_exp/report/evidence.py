"""What follows from several score tables of one group: agreement and comparison of attacks, ROC curves with bands, exposure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from diffmia_exp import intervals, metrics, set_inference
from diffmia_exp.report.groups import Estimate, Group, Row, access, aligned, names
from diffmia_exp.report.reading import Run

Floats = NDArray[np.float64]
CURVE = 120
"""Points of a drawn ROC curve at most, evenly spaced in the logarithm of the FPR; every FPR below 1% of small sets is among them."""

AGREEING = 20
"""Attacks whose agreement is shown at most: the number of pairs grows with the square."""

SET_LEVEL = 2000
"""Members, and non-members, that set-level inference draws at most."""


@dataclass(frozen=True)
class Curve:
    """TPR [k] at the FPRs [k], with the ends of its band."""

    fpr: Floats
    tpr: Floats
    low: Floats
    high: Floats


def curve(row: Row, low: float = 0.0) -> Curve:
    """The exact ROC curve at FPRs that are whole numbers of false positives, the mean over the runs of a row.

    Of the FPRs up to `low` none is left out. The band is Clopper-Pearson's for one run; over several it is their range, since few runs
    give no useful pointwise interval.
    """
    n, m = (min(int(run.metrics[key]) for run in row.runs) for key in ("n_nonmembers", "n_members"))
    fpr = np.unique(np.concatenate([np.arange(1, int(low * n + 1e-9) + 1), np.geomspace(1, n, CURVE).round()])) / n
    tprs = np.stack([_tpr(run, fpr) for run in row.runs])
    tpr = tprs.mean(0)
    if len(tprs) > 1:
        return Curve(fpr, tpr, tprs.min(0), tprs.max(0))
    k = (tpr * m).round()
    with np.errstate(invalid="ignore"):
        low, high = stats.beta.ppf(0.025, k, m - k + 1), stats.beta.ppf(0.975, k + 1, m - k)
    return Curve(fpr, tpr, np.where(k == 0, 0.0, low), np.where(k == m, 1.0, high))


def _tpr(run: Run, fpr: Floats) -> Floats:
    return metrics.tpr_at(metrics.roc(run.table.is_member, run.table.score), fpr)


@dataclass(frozen=True)
class Agreement:
    """Which members attacks find on one target: `found` bool [attacks, members] at an FPR, rank correlation of members' scores."""

    rows: tuple[Row, ...]
    fpr: float
    found: NDArray[np.bool_]
    correlation: Floats

    def both(self, a: int, b: int) -> tuple[int, int]:
        """Members that both find, and that at least one finds."""
        return int((self.found[a] & self.found[b]).sum()), int((self.found[a] | self.found[b]).sum())


def agreement(on: dict[Row, Run]) -> Agreement | None:
    """Between the strongest attacks on one target, at 1% FPR or, where the non-members do not resolve it, 10%; None where there is one."""
    if len(on) < 2:
        return None
    rows = sorted(on, key=lambda row: -row.auc[0])[:AGREEING]
    n = int(on[rows[0]].metrics["n_nonmembers"])
    fpr = 0.01 if n >= 100 else 0.1
    found, scores = [], []
    for row in rows:
        is_member, score = aligned(on[row])
        curve = metrics.roc(is_member, score)
        found.append(score[is_member] >= curve.threshold[np.flatnonzero(curve.fpr <= fpr)[-1]])
        scores.append(stats.rankdata(score[is_member]))
    with np.errstate(invalid="ignore"):
        correlation = np.corrcoef(np.stack(scores))
    return Agreement(tuple(rows), fpr, np.stack(found), correlation)


@dataclass(frozen=True)
class Exposed:
    """A member of some target: its exposure, in how many score tables it was a member, and its pixels if a run kept them."""

    sample_id: int
    exposure: float
    tables: int
    pixels: NDArray[np.uint8] | None


def exposure(group: Group, images: dict[int, NDArray[np.uint8]]) -> list[Exposed]:
    """Members by exposure, most exposed first.

    The exposure of a member in one table is the share of non-members that score below it (half of those that score the same), so
    that its mean over members is the AUC. It is averaged over the attacks, seeds and targets of the group in which the image is a
    member. Images that are in less than half as many tables as others are left out: their mean is of too few.
    """
    total: dict[int, list[float]] = {}
    for row in group.final:
        for run in row.runs:
            table = run.table
            below = metrics.placements(table.is_member, table.score)[0]
            for sample_id, share in zip(table.sample_id[table.is_member].tolist(), below.tolist(), strict=True):
                total.setdefault(sample_id, []).append(share)
    most = max(map(len, total.values()))
    listed = [Exposed(i, float(np.mean(v)), len(v), images.get(i)) for i, v in total.items() if 2 * len(v) >= most]
    return sorted(listed, key=lambda e: (-e.exposure, e.sample_id))


@dataclass(frozen=True)
class Comparison:
    """The strongest attack on a target against another one: difference of their AUCs, and the corrected p-value."""

    best: str
    other: str
    difference: Estimate
    p: float


def comparisons(on: dict[Row, Run]) -> list[Comparison]:
    """The strongest attack on a target against each other one on the same images: DeLong's paired test, corrected by Holm."""
    rows = sorted(on, key=lambda row: -float(on[row].metrics["auc"]))
    if len(rows) < 2:
        return []
    is_member, best = aligned(on[rows[0]])
    tests = [intervals.compare(is_member, best, aligned(on[row])[1]) for row in rows[1:]]
    corrected = intervals.holm([test.p_value for test in tests])
    strongest, *others = names(rows)
    return [
        Comparison(strongest, other, (test.difference, *test.interval), float(p))
        for other, test, p in zip(others, tests, corrected, strict=True)
    ]


def over_targets(row: Row) -> Estimate | None:
    """The mean AUC with its hierarchical bootstrap interval over targets and images; None below three targets, which tell too little."""
    if len(row.runs) < 3:
        return None
    mean, interval = intervals.hierarchical_bootstrap([(run.table.is_member, run.table.score) for run in row.runs], n=1000)
    return mean, *interval


@dataclass(frozen=True)
class SetLevel:
    """CDI on one target: attacks of one threat model, the sizes of the two sets, the p-value, and images needed for p < 0.01."""

    threat_model: str
    attacks: int
    members: int
    nonmembers: int
    p: float
    needed: int | None


def set_level(on: dict[Row, Run]) -> list[SetLevel]:
    """Were the members, as a set, in the training data? By the scores of all attacks of a threat model on a target, if there are several.

    At most SET_LEVEL images of each kind are drawn, so that it takes moments.
    """
    made = []
    for threat_model in dict.fromkeys(row.threat_model for row in on):
        tables = [aligned(run) for row, run in on.items() if row.threat_model == threat_model]
        is_member, scores = tables[0][0], np.stack([score for _, score in tables], axis=1)
        rng = np.random.default_rng(0)
        members, others = (scores[rng.permutation(np.flatnonzero(mask))[:SET_LEVEL]] for mask in (is_member, ~is_member))
        if len(tables) < 2 or min(len(members), len(others)) < set_inference.LEAST:
            continue
        p, needed = set_inference.p_value(members, others, splits=21), set_inference.images_needed(members, others, draws=11)
        made.append(SetLevel(threat_model, len(tables), len(members), len(others), p, needed))
    return sorted(made, key=lambda level: access(level.threat_model))
