"""How far a result may be off: bootstrap intervals, intervals over repetitions, and paired comparisons of attacks.

`metrics.auc` has the analytic interval of one AUC, `metrics.clopper_pearson` that of a rate. docs/statistics.md says when each holds,
and shows how often each covers the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from diffmia_exp import metrics
from diffmia_exp.errors import ConfigError, UserError, whole
from diffmia_exp.metrics import Floats, Interval

Labels = NDArray[np.bool_]
BLOCK = 2**16  # images drawn at once: bounds the memory, and stays within the processor's cache
DEGENERATE = 1e-24  # a variance below it is rounding


@dataclass(frozen=True)
class Comparison:
    """Attack a against attack b on the same images.

    Args:
        difference: AUC of a - AUC of b.
        interval: of the difference.
        p_value: two-sided, of the hypothesis that both AUCs are equal.
    """

    difference: float
    interval: Interval
    p_value: float


def bootstrap_auc(is_member: Labels, score: Floats, level: float = 0.95, n: int = 2000, seed: int = 0) -> tuple[float, Interval]:
    """The AUC and its stratified bootstrap interval: members and non-members are resampled apart.

    The interval is BCa (Efron 1987) with the acceleration of both samples' jackknife, expanded by Student's t over the normal quantile
    (Hesterberg 2015) for the degrees of freedom of `metrics.delong`: near AUC 1 percentiles cover too rarely. Where the classes
    are perfectly separated no resample differs, and the interval is that of `metrics.auc`.

    Args:
        is_member: bool [images].
        score: float64 [images], higher = member.
        level: coverage asked for.
        n: resamples.
        seed: of the resampling.

    Raises:
        UserError: for scores that are not finite, or of one class.
    """
    _level(level)
    members, nonmembers = metrics.placements(*table(is_member, score))
    area = float(members.mean())
    resampled = _resampled_aucs(is_member, score, n, np.random.default_rng(seed))
    if np.ptp(resampled) <= 0:
        return metrics.auc(is_member, score, level)
    # A placement's influence on the AUC, of which the jackknife's values are a multiple.
    influence = np.concatenate([(members - area) / len(members), (nonmembers - area) / len(nonmembers)])
    acceleration = (influence**3).sum() / (influence**2).sum() ** 1.5 / 6
    below = ((resampled < area).mean() + (resampled <= area).mean()) / 2
    bias = stats.norm.ppf(np.clip(below, 0.5 / n, 1 - 0.5 / n))
    z = bias + stats.t.ppf([0.5 - level / 2, 0.5 + level / 2], metrics.delong(members, nonmembers, area * (1 - area))[1])
    low, high = np.quantile(resampled, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    return area, (float(low), float(high))


def mean_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, Interval]:
    """Mean over repetitions and its Student t interval: mean +- t(k - 1) s / sqrt(k).

    It speaks of further repetitions of the same kind: further seeds if the values are of seeds, further splits or targets if of those.
    It knows no bounds: with few values an interval of AUCs may go beyond 1.

    Args:
        values: [k], one per seed, split or target.
        level: coverage asked for.

    Raises:
        UserError: for fewer than two values, or values that are not finite.
    """
    _level(level)
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise UserError(f"an interval over repetitions needs at least two finite values, here {x.tolist()}")
    half = float(stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    mean = float(x.mean())
    return mean, (mean - half, mean + half)


def hierarchical_bootstrap(
    tables: Sequence[tuple[Labels, Floats]], level: float = 0.95, n: int = 2000, seed: int = 0
) -> tuple[float, Interval]:
    """The mean AUC of several targets and its interval, for further targets of the same kind.

    Targets are drawn with replacement, then members and non-members of each. The interval is studentised: the quantiles are of
    (mean of the drawn AUCs - mean) / (their standard error), since the plain percentiles count the images' noise twice and treat few
    targets as if they were many. Where no AUC differs from another, it is the union of the targets' own intervals (`metrics.auc`).

    Args:
        tables: per target `is_member` bool [images] and `score` float64 [images], higher = member.
        level: coverage asked for.
        n: resamples.
        seed: of the resampling.

    Raises:
        UserError: for fewer than two targets, scores that are not finite, or of one class.
    """
    _level(level)
    if len(tables) < 2:
        raise UserError(f"a hierarchical bootstrap needs at least two targets, here {len(tables)}")
    k = len(tables)
    areas = np.array([metrics.placements(*table(*one))[0].mean() for one in tables])
    mean, error = float(areas.mean()), float(areas.std(ddof=1)) / math.sqrt(k)
    if error**2 < DEGENERATE:
        own = [metrics.auc(*one, level)[1] for one in tables]
        return mean, (min(low for low, _ in own), max(high for _, high in own))
    rng = np.random.default_rng(seed)
    resampled = np.stack([_resampled_aucs(*one, n, rng) for one in tables])
    drawn = resampled[rng.integers(k, size=(n, k)), rng.integers(n, size=(n, k))]
    off, errors = drawn.mean(1) - mean, drawn.std(1, ddof=1) / math.sqrt(k)
    # Only one perfectly separated target drawn again and again has no spread; it is as far off as can be.
    student = np.where(errors > 0, off / np.where(errors > 0, errors, 1.0), np.copysign(np.inf, off))
    low = mean - error * np.quantile(student, 0.5 + level / 2, method="higher")
    high = mean - error * np.quantile(student, 0.5 - level / 2, method="lower")
    return mean, (max(float(low), 0.0), min(float(high), 1.0))


def compare(is_member: Labels, score_a: Floats, score_b: Floats, level: float = 0.95) -> Comparison:
    """DeLong's paired test of two attacks on the same images (DeLong, DeLong, Clarke-Pearson 1988).

    The variance of the difference is that of the differences of the placements, which holds the covariance of the two AUCs; the
    quantiles are Student's t with the degrees of freedom of `metrics.delong`. Where the placements differ by a constant d there is no
    variance; then q, the share of pairs which the attacks order differently than that, is below 1 - (alpha/2)^(1/N) for the
    N = min(m, n) disjoint pairs (Clopper-Pearson), and the difference within d +- q (1 + |d|).

    Args:
        is_member: bool [images].
        score_a: float64 [images], higher = member.
        score_b: the same of the other attack, in the same order of images.
        level: coverage asked for.

    Raises:
        UserError: for scores that are not finite, of one class, or not of the same images.
    """
    _level(level)
    if len(score_a) != len(score_b):
        raise UserError(f"a paired comparison needs scores of the same images, here {len(score_a)} and {len(score_b)}")
    of_a, of_b = metrics.placements(*table(is_member, score_a)), metrics.placements(*table(is_member, score_b))
    members, nonmembers = of_a[0] - of_b[0], of_a[1] - of_b[1]
    d = float(members.mean())
    variance, df = metrics.delong(members, nonmembers, 1 - d**2)
    if variance < DEGENERATE:
        pairs = min(len(members), len(nonmembers))
        half = (1 - (0.5 - level / 2) ** (1 / pairs)) * (1 + abs(d))
        p_value = min(1.0, 2 * (1 + abs(d)) ** -pairs)
    else:
        half = float(stats.t.ppf(0.5 + level / 2, df)) * math.sqrt(variance)
        p_value = 2 * float(stats.t.sf(abs(d) / math.sqrt(variance), df))
    return Comparison(d, (max(d - half, -1.0), min(d + half, 1.0)), p_value)


def holm(p_values: ArrayLike) -> Floats:
    """P-values corrected for their number (Holm 1979): rejecting those below alpha errs at all with probability alpha at most.

    Args:
        p_values: [k], in any order and however dependent.

    Returns:
        Corrected p-values [k], in the order given: the largest of (k - j) p_(j) over ranks j = 0, 1, .. up to its own, at most 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise UserError(f"p-values must be a list of numbers from 0 to 1, here {p.tolist()}")
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def table(is_member: Labels, score: Floats) -> tuple[Labels, Floats]:
    """Both as they are, if they are finite scores of members and non-members.

    Raises:
        UserError: if not.
    """
    if is_member.shape != score.shape or score.ndim != 1:
        raise UserError(f"one score and one label per image are needed, here {score.shape} scores and {is_member.shape} labels")
    if not np.isfinite(score).all():
        raise UserError(f"{int((~np.isfinite(score)).sum())} of {len(score)} scores are not finite")
    if is_member.all() or not is_member.any():
        raise UserError("scores of members and non-members are both needed")
    return is_member, score


def _level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError("level", level, "must be a number between 0 and 1, such as 0.95")


def _resampled_aucs(is_member: Labels, score: Floats, n: int, rng: np.random.Generator) -> Floats:
    """AUCs [n] of stratified resamples, from how often each image was drawn: nothing is sorted again."""
    whole("n", n, least=2)
    members, nonmembers = score[is_member], np.sort(score[~is_member])
    below, not_above = (np.searchsorted(nonmembers, members, side) for side in ("left", "right"))
    areas = np.empty(n)
    step = max(1, BLOCK // len(score))
    for start in range(0, n, step):
        rows = min(step, n - start)
        up_to = np.zeros((rows, len(nonmembers) + 1), dtype=np.int64)  # non-members drawn among the lowest j
        np.cumsum(_counts(len(nonmembers), rows, rng), 1, out=up_to[:, 1:])
        # Twice the pairs won, so that all are integers: 2 for a non-member below, 1 for an equal one.
        pairs = np.einsum("ij,ij->i", _counts(len(members), rows, rng), up_to[:, below] + up_to[:, not_above])
        areas[start : start + rows] = pairs / (2 * len(members) * len(nonmembers))
    return areas


def _counts(k: int, rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each of k images is drawn in k draws, [rows, k]."""
    drawn = rng.integers(k, size=(rows, k)) + k * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * k).reshape(rows, k)
