"""What a list of scores proves: exact ROC, AUC, TPR at low FPR, each with its interval, all in float64.

Nothing is binned, no threshold is interpolated: every distinct score is a threshold, and the TPR at a target FPR is read at the
largest FPR that does not exceed it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from sklearn.metrics import roc_curve

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Roc:
    """The exact ROC curve: `fpr`, `tpr` and `threshold` [k], from (0, 0) to (1, 1); a score >= threshold is called a member."""

    fpr: Floats
    tpr: Floats
    threshold: Floats


def roc(is_member: NDArray[np.bool_], score: Floats) -> Roc:
    """Every distinct score is a threshold."""
    fpr, tpr, threshold = roc_curve(is_member, score, drop_intermediate=False)
    return Roc(fpr, tpr, threshold)


def tpr_at(curve: Roc, fpr: Floats) -> Floats:
    """The TPR [k] at FPRs [k]: of each the largest FPR of the curve that does not exceed it."""
    return curve.tpr[np.searchsorted(curve.fpr, fpr + 1e-12, side="right") - 1]


def auc(is_member: NDArray[np.bool_], score: Floats, level: float = 0.95) -> tuple[float, Interval]:
    """Area under the ROC curve = P(member > non-member) + P(equal) / 2, with its interval.

    The variance is DeLong's (DeLong, DeLong, Clarke-Pearson 1988). The interval is symmetric on the logit scale, so that it stays
    within [0, 1], with Student's t for the few images that carry the variance where the AUC is near 0 or 1 (`delong`). Where the
    classes are perfectly separated the variance is 0; the interval is then Clopper-Pearson's for min(m, n) disjoint pairs, which
    are independent trials with success probability AUC.
    """
    members, nonmembers = placements(is_member, score)
    area = float(members.mean())
    variance, df = delong(members, nonmembers, area * (1 - area))
    if variance <= 0 or not 0 < area < 1:
        pairs = min(len(members), len(nonmembers))
        low, high = clopper_pearson(math.floor(area * pairs), pairs, level)[0], clopper_pearson(math.ceil(area * pairs), pairs, level)[1]
        return area, (min(low, area), max(high, area))
    centre = np.log(area / (1 - area))
    half = stats.t.ppf(0.5 + level / 2, df) * np.sqrt(variance) / (area * (1 - area))
    return area, (float(special.expit(centre - half)), float(special.expit(centre + half)))


def placements(is_member: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats]:
    """Per member the share of non-members below it [m], per non-member the share of members above it [n]; an equal score counts 1/2.

    Both have the AUC as their mean. They are DeLong's structural components, in the rank form of Sun & Xu (2014).
    """
    positive, negative = score[is_member], score[~is_member]
    m, n = len(positive), len(negative)
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    return (ranks[:m] - stats.rankdata(positive)) / n, 1 - (ranks[m:] - stats.rankdata(negative)) / m


def delong(members: Floats, nonmembers: Floats, largest: float) -> tuple[float, float]:
    """DeLong's variance of an AUC, or of a difference of two, from its placements; and the degrees of freedom of that variance.

    V = s^2(members) / m + s^2(nonmembers) / n with df = 2 V^2 / Var(V) (Satterthwaite 1946), where Var(s^2) is not the normal one
    but estimated from the fourth moment: near AUC 1 nearly all placements are 1 and a handful make up the variance.

    Args:
        members: placements of members [m], or differences of two such.
        nonmembers: the same of non-members [n].
        largest: the largest variance that a placement can have; it stands in for the variance of a class with one score.
    """
    variance = uncertainty = 0.0
    for v in (members, nonmembers):
        k = len(v)
        if k == 1:
            variance += largest
            continue
        spread = float(v.var(ddof=1))
        variance += spread / k
        uncertainty += float(((v - v.mean()) ** 4).mean() - spread**2 * (k - 3) / (k - 1)) / k**3
    return variance, 2 * variance**2 / uncertainty if uncertainty > 0 else math.inf


def tpr_at_fpr(is_member: NDArray[np.bool_], score: Floats, target: float) -> dict[str, Any]:
    """TPR at the largest FPR that does not exceed `target`, with its Clopper-Pearson interval.

    Returns:
        `tpr`, `ci`, `fpr` (the FPR there) and `threshold`; tpr and ci are None, and `resolvable` false, where the target is below
        1 / number of non-members, so that no number of false positives but 0 could meet it.
    """
    curve = roc(is_member, score)
    at = int(np.flatnonzero(curve.fpr <= target)[-1])
    m, n = int(is_member.sum()), int((~is_member).sum())
    if target * n < 1 - 1e-9:
        return {"tpr": None, "ci": None, "fpr": None, "threshold": None, "resolvable": False}
    tpr = float(curve.tpr[at])
    threshold = float(curve.threshold[at])
    return {
        "tpr": tpr,
        "ci": list(clopper_pearson(round(tpr * m), m)),
        "fpr": float(curve.fpr[at]),
        "threshold": threshold if np.isfinite(threshold) else None,
        "resolvable": True,
    }


def balanced_accuracy(is_member: NDArray[np.bool_], score: Floats) -> float:
    """Mean of TPR and TNR at the pooled median of the scores, a threshold that needs no labels (score > median = member)."""
    called = score > np.median(score)
    return float((called[is_member].mean() + (~called[~is_member]).mean()) / 2)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Exact binomial interval (Clopper & Pearson 1934), as quantiles of the beta distribution."""
    tail, failures = (1 - level) / 2, trials - successes
    low = float(special.betaincinv(successes, failures + 1, tail)) if successes else 0.0
    high = float(special.betainccinv(successes + 1, failures, tail)) if failures else 1.0
    return low, high


def evaluate(is_member: NDArray[np.bool_], score: Floats, fprs: tuple[float, ...]) -> dict[str, Any]:
    """All metrics of one score table, as plain values.

    Raises:
        ValueError: if a score is not finite or a class is missing.
    """
    if not np.isfinite(score).all():
        raise ValueError(f"{int((~np.isfinite(score)).sum())} of {len(score)} scores are not finite")
    if is_member.all() or not is_member.any():
        raise ValueError("scores of members and non-members are both needed")
    area, interval = auc(is_member, score)
    return {
        "auc": area,
        "auc_ci": list(interval),
        "tpr_at_fpr": {f"{fpr:g}": tpr_at_fpr(is_member, score, fpr) for fpr in fprs},
        "balanced_accuracy": balanced_accuracy(is_member, score),
        "n_members": int(is_member.sum()),
        "n_nonmembers": int((~is_member).sum()),
    }
