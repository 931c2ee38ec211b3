from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from diffmia_exp import metrics

Labels = NDArray[np.bool_]
Floats = NDArray[np.float64]
Table = tuple[Labels, Floats]

quick = settings(max_examples=50, deadline=None, derandomize=True)

TIED = st.integers(-3, 3).map(float)
SPREAD = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False)


@st.composite
def tables(draw: st.DrawFn, value: st.SearchStrategy[float] | None = None) -> Table:
    """Both classes present, in any order; scores with many ties, with none, or mixed."""
    if value is None:
        value = draw(st.sampled_from([TIED, SPREAD, TIED | SPREAD]))
    positive = draw(st.lists(value, min_size=1, max_size=16))
    negative = draw(st.lists(value, min_size=1, max_size=16))
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(positive) + len(negative))
    return (order < len(positive)), np.array(positive + negative)[order]


def normal_table(seed: int, m: int, n: int, shift: float = 1.0) -> Table:
    rng = np.random.default_rng(seed)
    is_member = rng.permutation(np.arange(m + n) < m)
    return is_member, rng.normal(size=m + n) + shift * is_member


def placements(is_member: Labels, score: Floats) -> Floats:
    """psi [m, n] of every pair: 1 where the member is above, 1/2 where equal (DeLong et al. 1988, equation 3)."""
    out = np.empty((is_member.sum(), (~is_member).sum()))
    for i, x in enumerate(score[is_member]):
        for j, y in enumerate(score[~is_member]):
            out[i, j] = 1.0 if x > y else 0.5 if x == y else 0.0
    return out


def delong_variance(is_member: Labels, score: Floats) -> float:
    """S10 / m + S01 / n of the structural components, over all pairs."""
    psi = placements(is_member, score)
    m, n = psi.shape
    area = psi.sum() / (m * n)
    s10 = ((psi.sum(1) / n - area) ** 2).sum() / (m - 1)
    s01 = ((psi.sum(0) / m - area) ** 2).sum() / (n - 1)
    return s10 / m + s01 / n


def degrees_of_freedom(is_member: Labels, score: Floats) -> float:
    """2 V^2 / Var(V), Var(s^2) = (mu4 - s^4 (k - 3) / (k - 1)) / k."""
    psi = placements(is_member, score)
    uncertainty = 0.0
    for v in (psi.mean(1), psi.mean(0)):
        k = len(v)
        uncertainty += (stats.moment(v, 4) - np.cov(v) ** 2 * (k - 3) / (k - 1)) / k / k**2
    return float(2 * delong_variance(is_member, score) ** 2 / uncertainty)


def logit(p: float) -> float:
    return float(np.log(p) - np.log1p(-p))


# --- ROC and AUC


@quick
@given(tables())
def test_auc_is_the_pair_count_and_sklearns_auc(table: Table) -> None:
    area, _ = metrics.auc(*table)
    assert area == pytest.approx(placements(*table).mean(), abs=1e-12)
    assert area == pytest.approx(roc_auc_score(*table), abs=1e-12)
    curve = metrics.roc(*table)
    assert area == pytest.approx(np.trapezoid(curve.tpr, curve.fpr), abs=1e-12)


@quick
@given(tables())
def test_roc_has_one_exact_point_per_distinct_score(table: Table) -> None:
    is_member, score = table
    curve = metrics.roc(is_member, score)
    assert curve.threshold[0] == np.inf
    assert curve.threshold[1:].tolist() == sorted(set(score.tolist()), reverse=True)
    for fpr, tpr, threshold in zip(curve.fpr, curve.tpr, curve.threshold, strict=True):
        assert fpr == (score[~is_member] >= threshold).sum() / (~is_member).sum()
        assert tpr == (score[is_member] >= threshold).sum() / is_member.sum()
    assert (curve.fpr[-1], curve.tpr[-1]) == (1, 1)


def test_roc_keeps_the_points_that_sklearn_drops_by_default() -> None:
    table = normal_table(0, 200, 200)
    assert len(metrics.roc(*table).fpr) == 401 > len(roc_curve(*table)[0])


@settings(quick, max_examples=25)
@given(tables(), st.integers(0, 99))
def test_no_metric_depends_on_the_order_of_the_rows(table: Table, seed: int) -> None:
    is_member, score = table
    order = np.random.default_rng(seed).permutation(len(score))
    one = metrics.evaluate(is_member, score, (0.1, 0.5))
    two = metrics.evaluate(is_member[order], score[order], (0.1, 0.5))
    for key in ("auc", "auc_ci"):
        np.testing.assert_allclose(one.pop(key), two.pop(key), rtol=0, atol=1e-12)
    assert one == two


# --- the interval of the AUC


@pytest.mark.parametrize(("m", "n"), [(2, 2), (7, 31), (40, 9), (120, 150)])
@pytest.mark.parametrize("decimals", [0, 1, 12])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_interval_is_delongs_variance_on_the_logit_scale(m: int, n: int, decimals: int, level: float) -> None:
    seed = next(s for s in range(100) if 0 < roc_auc_score(*normal_table(s, m, n, 0.7)) < 1)
    is_member, score = normal_table(seed, m, n, 0.7)
    score = score.round(decimals)
    area, (low, high) = metrics.auc(is_member, score, level)
    quantile = stats.t.isf((1 - level) / 2, degrees_of_freedom(is_member, score))
    half = quantile * np.sqrt(delong_variance(is_member, score)) / (area * (1 - area))
    assert logit(low) == pytest.approx(logit(area) - half, abs=1e-9)
    assert logit(high) == pytest.approx(logit(area) + half, abs=1e-9)


@quick
@given(tables(TIED))
def test_interval_matches_delong_under_ties(table: Table) -> None:
    is_member, _ = table
    area, (low, high) = metrics.auc(*table)
    if min(is_member.sum(), (~is_member).sum()) > 1 and 0 < area < 1 and delong_variance(*table) > 1e-12:
        width = 2 * stats.t.isf(0.025, degrees_of_freedom(*table)) * np.sqrt(delong_variance(*table)) / (area * (1 - area))
        assert logit(high) - logit(low) == pytest.approx(width, rel=1e-6)
    assert 0 <= low <= area <= high <= 1
    assert low < high


@quick
@given(tables())
def test_negated_scores_mirror_auc_and_interval(table: Table) -> None:
    is_member, score = table
    area, (low, high) = metrics.auc(is_member, score)
    mirrored, (mirrored_low, mirrored_high) = metrics.auc(is_member, -score)
    np.testing.assert_allclose([mirrored, mirrored_low, mirrored_high], [1 - area, 1 - high, 1 - low], rtol=0, atol=1e-9)


@quick
@given(tables())
def test_exchanged_classes_mirror_auc_and_interval(table: Table) -> None:
    is_member, score = table
    area, (low, high) = metrics.auc(is_member, score)
    mirrored, (mirrored_low, mirrored_high) = metrics.auc(~is_member, score)
    np.testing.assert_allclose([mirrored, mirrored_low, mirrored_high], [1 - area, 1 - high, 1 - low], rtol=0, atol=1e-9)


@pytest.mark.parametrize("transform", [lambda s: s * 8 - 3, lambda s: s**3, np.arctan, np.exp], ids=["affine", "cube", "arctan", "exp"])
@settings(quick, max_examples=20)
@given(table=tables(st.integers(-20, 20).map(float)))
def test_monotone_transforms_change_nothing(transform: Callable[[Floats], Floats], table: Table) -> None:
    is_member, score = table
    assert metrics.auc(is_member, transform(score)) == metrics.auc(is_member, score)
    moved, still = metrics.tpr_at_fpr(is_member, transform(score), 0.2), metrics.tpr_at_fpr(is_member, score, 0.2)
    assert (moved.pop("threshold") is None) == (still.pop("threshold") is None)
    assert moved == still


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (9, 1), (5, 5), (10, 40), (40, 11)])
def test_perfect_separation_gives_the_exact_interval_of_disjoint_pairs(m: int, n: int) -> None:
    is_member = np.arange(m + n) < m
    score = np.where(is_member, 1.0, 0.0) + np.linspace(0, 0.5, m + n)
    pairs = min(m, n)
    area, interval = metrics.auc(is_member, score)
    assert area == 1
    assert interval == (pytest.approx(0.025 ** (1 / pairs)), 1)  # p with p^pairs = 2.5%
    area, interval = metrics.auc(is_member, -score)
    assert area == 0
    assert interval == (0, pytest.approx(1 - 0.025 ** (1 / pairs)))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 8), (2, 2), (5, 5), (5, 8), (8, 8), (31, 100)])
def test_equal_scores_say_nothing_either_way(m: int, n: int) -> None:
    area, (low, high) = metrics.auc(np.arange(m + n) < m, np.full(m + n, 3.25))
    assert area == 0.5
    assert low == pytest.approx(1 - high, abs=1e-12)
    assert 0 < low < 0.5


@pytest.mark.parametrize(("m", "n"), [(200, 200), (60, 300)])
@pytest.mark.parametrize("shift", [0.0, 1.2])
def test_95_percent_interval_covers_the_true_auc(m: int, n: int, shift: float) -> None:
    truth = stats.norm.cdf(shift / np.sqrt(2))
    intervals = np.array([metrics.auc(*normal_table(seed, m, n, shift))[1] for seed in range(600)])
    covered = ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean()
    assert 0.92 <= covered <= 0.98
    # The misses fall on both sides.
    assert 0.003 < (truth < intervals[:, 0]).mean() < 0.06
    assert 0.003 < (truth > intervals[:, 1]).mean() < 0.06


def test_interval_covers_near_one_where_few_images_carry_the_variance() -> None:
    # A normal quantile covers in 93.0%, of many such tables; Student's t with these degrees of freedom in 96.5%.
    shift = np.sqrt(2) * stats.norm.ppf(0.99)
    intervals = np.array([metrics.auc(*normal_table(seed, 100, 100, shift))[1] for seed in range(1000)])
    assert 0.94 <= ((intervals[:, 0] <= 0.99) & (intervals[:, 1] >= 0.99)).mean() <= 0.98


def test_degrees_of_freedom_are_two_in_the_worst_case_and_many_in_the_middle() -> None:
    assert metrics.delong(np.array([0.0] + [1.0] * 199), np.ones(200), 0.0)[1] == pytest.approx(2, abs=0.1)
    uniform = np.linspace(0, 1, 200)  # kurtosis 1.8: Var(s^2) = 0.8 s^4 / k
    assert metrics.delong(uniform, uniform, 0.0)[1] == pytest.approx(2 * 200 * 2 / 0.8, rel=0.03)


def test_interval_covers_with_a_single_member() -> None:
    truth = stats.norm.cdf(1 / np.sqrt(2))
    for m, n in ((1, 100), (100, 1)):
        intervals = np.array([metrics.auc(*normal_table(seed, m, n))[1] for seed in range(200)])
        assert ((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean() >= 0.95


def test_interval_widens_with_the_level_and_narrows_with_the_data() -> None:
    def width(n: int, level: float) -> float:
        low, high = metrics.auc(*normal_table(3, n, n), level)[1]
        return high - low

    assert width(50, 0.8) < width(50, 0.95) < width(50, 0.999)
    assert width(50, 0.95) / width(5000, 0.95) == pytest.approx(10, rel=0.25)


# --- TPR at FPR


@quick
@given(table=tables(), target=st.one_of(st.floats(1e-4, 1), st.integers(1, 25).flatmap(lambda n: st.integers(1, n).map(lambda k: k / n))))
def test_tpr_at_fpr_is_the_best_over_all_thresholds(table: Table, target: float) -> None:
    is_member, score = table
    got = metrics.tpr_at_fpr(is_member, score, target)
    m, n = int(is_member.sum()), int((~is_member).sum())
    if target < 1 / n:
        assert got == {"tpr": None, "ci": None, "fpr": None, "threshold": None, "resolvable": False}
        return
    points = [((score[~is_member] >= c).sum() / n, (score[is_member] >= c).sum() / m) for c in [np.inf, *score]]
    best_fpr, best_tpr = max(point for point in points if point[0] <= target)
    assert got["resolvable"] is True
    assert (got["fpr"], got["tpr"]) == (best_fpr, best_tpr)
    assert got["tpr"] == max(tpr for fpr, tpr in points if fpr <= target)
    assert got["fpr"] <= target
    assert got["ci"] == list(metrics.clopper_pearson(round(best_tpr * m), m))
    assert got["ci"][0] <= got["tpr"] <= got["ci"][1]


@quick
@given(table=tables(), target=st.floats(1e-3, 1))
def test_the_threshold_realises_the_reported_rates(table: Table, target: float) -> None:
    is_member, score = table
    got = metrics.tpr_at_fpr(is_member, score, target)
    if not got["resolvable"]:
        assert target * (~is_member).sum() < 1
    elif got["threshold"] is None:  # nobody is called a member
        assert (got["fpr"], got["tpr"]) == (0, 0)
    else:
        called = score >= got["threshold"]
        assert called.any()
        assert called[~is_member].mean() == pytest.approx(got["fpr"], abs=1e-15)
        assert called[is_member].mean() == pytest.approx(got["tpr"], abs=1e-15)


@settings(quick, max_examples=25)
@given(tables(), st.lists(st.floats(1e-3, 1), min_size=2, max_size=6))
def test_tpr_rises_with_the_allowed_fpr(table: Table, targets: list[float]) -> None:
    found = [metrics.tpr_at_fpr(*table, target) for target in sorted(targets)]
    tprs = [f["tpr"] for f in found if f["resolvable"]]
    assert tprs == sorted(tprs)
    assert [f["resolvable"] for f in found] == sorted(f["resolvable"] for f in found)  # once resolvable, always


def test_resolvable_exactly_from_one_non_member_on() -> None:
    for n in [*range(1, 60), 93, 98, 103, 107, 1000, 3000, 10000]:
        is_member = np.arange(n + 4) < 4
        score = np.where(is_member, -1.0, np.arange(n + 4))  # members below all others: the first point is a false positive
        at = metrics.tpr_at_fpr(is_member, score, 1 / n)
        assert (at["resolvable"], at["fpr"]) == (True, 1 / n)
        assert metrics.tpr_at_fpr(is_member, score, 1 / n * (1 - 1e-6))["resolvable"] is False


def test_tpr_at_fpr_by_hand() -> None:
    #        score  9  8  8  7  6  6  5  4  3  2  1  0
    labels = np.array([1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)
    score = np.array([9, 8, 8, 7, 6, 6, 5, 4, 3, 2, 1, 0], float)
    at = {target: metrics.tpr_at_fpr(labels, score, target) for target in (0.1, 0.125, 0.24, 0.25, 1.0)}
    assert at[0.1]["resolvable"] is False
    assert (at[0.125]["tpr"], at[0.125]["fpr"], at[0.125]["threshold"]) == (0.75, 0.125, 7)
    assert (at[0.24]["tpr"], at[0.24]["fpr"], at[0.24]["threshold"]) == (0.75, 0.125, 7)
    assert (at[0.25]["tpr"], at[0.25]["fpr"], at[0.25]["threshold"]) == (1, 0.25, 6)
    assert (at[1.0]["tpr"], at[1.0]["fpr"], at[1.0]["threshold"]) == (1, 1, 0)


def test_a_tie_across_the_target_is_not_split() -> None:
    labels = np.array([1] * 10 + [0] * 10, bool)
    score = np.array([1.0] * 10 + [1.0] * 3 + [0.0] * 7)
    got = metrics.tpr_at_fpr(labels, score, 0.2)
    assert (got["tpr"], got["fpr"], got["threshold"]) == (0, 0, None)
    assert got["ci"] == [0, pytest.approx(1 - 0.025**0.1)]


# --- Clopper-Pearson


@pytest.mark.parametrize("trials", [1, 2, 17, 500, 25000])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_clopper_pearson_is_scipys(trials: int, level: float) -> None:
    for k in sorted({0, 1, trials // 3, trials - 1, trials}):
        exact = stats.binomtest(k, trials).proportion_ci(level, method="exact")
        assert metrics.clopper_pearson(k, trials, level) == pytest.approx((exact.low, exact.high), rel=1e-7, abs=1e-12)


def test_clopper_pearson_covers_at_least_the_level_whatever_the_truth() -> None:
    trials = 30
    intervals = np.array([metrics.clopper_pearson(k, trials) for k in range(trials + 1)])
    for p in np.linspace(0.001, 0.999, 173):
        inside = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
        assert stats.binom.pmf(np.arange(trials + 1), trials, p)[inside].sum() >= 0.95


# --- balanced accuracy


@quick
@given(tables())
def test_balanced_accuracy_is_sklearns_at_the_median(table: Table) -> None:
    is_member, score = table
    assert metrics.balanced_accuracy(is_member, score) == pytest.approx(balanced_accuracy_score(is_member, score > np.median(score)))


def test_balanced_accuracy_of_extremes() -> None:
    labels = np.arange(20) < 10
    assert metrics.balanced_accuracy(labels, labels.astype(float)) == 1
    assert metrics.balanced_accuracy(labels, -labels.astype(float)) == 0
    assert metrics.balanced_accuracy(labels, np.zeros(20)) == 0.5


# --- evaluate


@settings(quick, max_examples=25)
@given(tables())
def test_evaluate_agrees_with_its_parts_and_survives_json(table: Table) -> None:
    is_member, score = table
    got = metrics.evaluate(is_member, score, (0.5, 0.1, 0.0001))
    area, interval = metrics.auc(is_member, score)
    assert got == {
        "auc": area,
        "auc_ci": list(interval),
        "tpr_at_fpr": {k: metrics.tpr_at_fpr(is_member, score, float(k)) for k in ("0.5", "0.1", "0.0001")},
        "balanced_accuracy": metrics.balanced_accuracy(is_member, score),
        "n_members": is_member.sum(),
        "n_nonmembers": (~is_member).sum(),
    }
    assert json.loads(json.dumps(got, allow_nan=False)) == got


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, 19])
def test_evaluate_refuses_scores_that_are_not_finite(bad: float, at: int) -> None:
    is_member, score = normal_table(0, 10, 10)
    score[at] = bad
    with pytest.raises(ValueError, match="1 of 20 scores are not finite"):
        metrics.evaluate(is_member, score, (0.1,))


@pytest.mark.parametrize("label", [True, False])
def test_evaluate_refuses_a_single_class(label: bool) -> None:
    with pytest.raises(ValueError, match="both needed"):
        metrics.evaluate(np.full(9, label), np.arange(9.0), (0.1,))


def test_evaluate_refuses_no_scores() -> None:
    with pytest.raises(ValueError, match="both needed"):
        metrics.evaluate(np.empty(0, bool), np.empty(0), (0.1,))
