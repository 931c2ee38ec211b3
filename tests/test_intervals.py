from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from diffmia_exp import intervals, metrics
from diffmia_exp.errors import ConfigError, UserError
from tests.test_metrics import Floats, Labels, Table, normal_table, placements, tables

quick = settings(max_examples=25, deadline=None, derandomize=True)


def auc_by_pairs(members: Floats, nonmembers: Floats) -> float:
    return float(np.mean([[(x > y) + (x == y) / 2 for y in nonmembers] for x in members]))


# --- the stratified bootstrap


@pytest.mark.parametrize("decimals", [0, 12])
@pytest.mark.parametrize("block", [1, 70, 2**16])
def test_resampled_aucs_are_those_of_a_loop(decimals: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    is_member, score = normal_table(0, 13, 9)
    score = score.round(decimals)
    monkeypatch.setattr(intervals, "BLOCK", block)
    got = intervals._resampled_aucs(is_member, score, 40, np.random.default_rng(3))
    rng, members, nonmembers = np.random.default_rng(3), score[is_member], np.sort(score[~is_member])
    rows, looped = max(1, block // 22), []
    for start in range(0, 40, rows):
        k = min(rows, 40 - start)
        drawn_nonmembers, drawn_members = rng.integers(9, size=(k, 9)), rng.integers(13, size=(k, 13))
        looped += [auc_by_pairs(members[a], nonmembers[b]) for a, b in zip(drawn_members, drawn_nonmembers, strict=True)]
    np.testing.assert_allclose(got, looped, rtol=0, atol=1e-12)


def test_the_bootstrap_is_scipys_bca() -> None:
    is_member, score = normal_table(1, 400, 300, 1.0)

    def statistic(x: Floats, y: Floats, axis: int = -1) -> Floats:
        ranks = stats.rankdata(np.concatenate([x, y], axis=-1), axis=-1)
        m = x.shape[-1]
        return (ranks[..., :m].sum(-1) - m * (m + 1) / 2) / (m * y.shape[-1])

    reference = stats.bootstrap(
        (score[is_member], score[~is_member]), statistic, n_resamples=4000, method="BCa", rng=np.random.default_rng(0), batch=500
    ).confidence_interval
    area, interval = intervals.bootstrap_auc(is_member, score, n=40_000)
    assert area == pytest.approx(roc_auc_score(is_member, score), abs=1e-12)
    # The width is .068; quantiles of 4,000 resamples are sure to .001.
    np.testing.assert_allclose(interval, reference, rtol=0, atol=0.002)


@pytest.mark.parametrize("true_auc", [0.7, 0.99])
def test_the_bootstrap_covers_the_true_auc(true_auc: float) -> None:
    d = np.sqrt(2) * stats.norm.ppf(true_auc)
    found = np.array([intervals.bootstrap_auc(*normal_table(seed, 100, 100, d), n=300, seed=seed)[1] for seed in range(500)])
    assert 0.925 <= ((found[:, 0] <= true_auc) & (true_auc <= found[:, 1])).mean() <= 0.98


def test_the_bootstrap_is_repeatable_and_depends_on_its_seed_a_little() -> None:
    one = normal_table(2, 60, 60)
    assert intervals.bootstrap_auc(*one, seed=1) == intervals.bootstrap_auc(*one, seed=1)
    (_, first), (_, second) = intervals.bootstrap_auc(*one, seed=1), intervals.bootstrap_auc(*one, seed=2)
    assert first != second
    np.testing.assert_allclose(first, second, rtol=0, atol=0.02)


@pytest.mark.parametrize("transform", [lambda s: s * 8 - 3, lambda s: s**3, np.arctan, np.exp], ids=["affine", "cube", "arctan", "exp"])
@quick
@given(table=tables(st.integers(-20, 20).map(float)))
def test_monotone_transforms_change_no_interval(transform: Callable[[Floats], Floats], table: Table) -> None:
    is_member, score = table
    assert intervals.bootstrap_auc(is_member, transform(score), n=50) == intervals.bootstrap_auc(is_member, score, n=50)
    both = [(is_member, score), (is_member, -score)]
    moved = [(is_member, transform(score)), (is_member, transform(-score))]
    assert intervals.hierarchical_bootstrap(moved, n=50) == intervals.hierarchical_bootstrap(both, n=50)
    other = np.roll(score, 1)
    assert intervals.compare(is_member, transform(score), other) == intervals.compare(is_member, score, transform(other))


def test_exchanged_classes_mirror_the_bootstrap_up_to_its_draws() -> None:
    is_member, score = normal_table(5, 90, 70, 1.5)
    area, (low, high) = intervals.bootstrap_auc(is_member, score, n=40_000)
    mirrored, (mirrored_low, mirrored_high) = intervals.bootstrap_auc(~is_member, score, n=40_000)
    assert mirrored == pytest.approx(1 - area, abs=1e-12)
    np.testing.assert_allclose((mirrored_low, mirrored_high), (1 - high, 1 - low), rtol=0, atol=0.002)


@quick
@given(tables())
def test_the_bootstrap_stays_within_bounds(table: Table) -> None:
    area, (low, high) = intervals.bootstrap_auc(*table, n=60)
    assert 0 <= low <= high <= 1
    if 0 < area < 1 and table[0].sum() > 3 and (~table[0]).sum() > 3:
        assert low < high


def test_perfect_separation_gives_the_analytic_interval() -> None:
    is_member = np.arange(50) < 20
    assert intervals.bootstrap_auc(is_member, is_member.astype(float)) == metrics.auc(is_member, is_member.astype(float))


# --- means over repetitions


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_mean_interval_is_scipys_t_test(level: float) -> None:
    x = np.random.default_rng(0).normal(0.7, 0.02, 6)
    mean, interval = intervals.mean_interval(x, level)
    assert mean == pytest.approx(x.mean())
    assert interval == pytest.approx(tuple(stats.ttest_1samp(x, 0).confidence_interval(level)))


def test_mean_interval_of_two_values_by_hand() -> None:
    mean, (low, high) = intervals.mean_interval([0.6, 0.8])
    assert (mean, high - mean, mean - low) == pytest.approx((0.7, 12.7062 * 0.1, 12.7062 * 0.1), rel=1e-5)


@pytest.mark.parametrize("values", [[], [0.7], [0.7, np.nan], [[0.7, 0.8]]])
def test_mean_interval_refuses_what_says_nothing_of_spread(values: list[float]) -> None:
    with pytest.raises(UserError, match="at least two finite values"):
        intervals.mean_interval(values)


def targets(rng: np.random.Generator, k: int, images: int, centre: float, spread: float) -> list[Table]:
    out = []
    for _ in range(k):
        is_member = rng.random(images) < 0.5
        out.append((is_member, rng.normal(size=images) + rng.normal(centre, spread) * is_member))
    return out


@pytest.mark.parametrize(("k", "spread"), [(3, 0.3), (6, 0.0), (6, 0.6)])
def test_hierarchical_bootstrap_covers_the_mean_over_all_targets(k: int, spread: float) -> None:
    truth, rng = 0.8, np.random.default_rng([k, 1])
    centre = np.sqrt(2 + spread**2) * stats.norm.ppf(truth)  # P(N(0, 1) < N(centre, 1 + spread^2)) = truth
    found = np.array([intervals.hierarchical_bootstrap(targets(rng, k, 80, centre, spread), n=200, seed=i)[1] for i in range(400)])
    assert 0.925 <= ((found[:, 0] <= truth) & (truth <= found[:, 1])).mean() <= 0.98


def test_hierarchical_bootstrap_of_many_targets_is_the_t_interval() -> None:
    some = targets(np.random.default_rng(0), 60, 100, 1.0, 0.4)
    mean, interval = intervals.hierarchical_bootstrap(some, n=5_000)
    reference, expected = intervals.mean_interval([roc_auc_score(*one) for one in some])
    assert mean == pytest.approx(reference, abs=1e-12)
    assert interval == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))


def test_hierarchical_bootstrap_of_equal_targets_is_no_wider_and_no_surer_than_one() -> None:
    one = normal_table(0, 30, 30)
    assert intervals.hierarchical_bootstrap([one, one]) == metrics.auc(*one)
    perfect = np.arange(20) < 10, np.arange(20.0)[::-1]
    assert intervals.hierarchical_bootstrap([perfect] * 3) == metrics.auc(*perfect)


def test_hierarchical_bootstrap_with_a_perfectly_separated_target_stays_within_bounds() -> None:
    perfect = np.arange(40) < 20, np.arange(40.0)[::-1]
    mean, (low, high) = intervals.hierarchical_bootstrap([perfect, perfect, normal_table(0, 20, 20, 2.0)])
    assert 0 <= low < mean < high <= 1


def test_hierarchical_bootstrap_needs_two_targets() -> None:
    with pytest.raises(UserError, match="at least two targets, here 1"):
        intervals.hierarchical_bootstrap([normal_table(0, 9, 9)])


# --- paired comparisons


def delong_covariance(is_member: Labels, a: Floats, b: Floats) -> Floats:
    """S10 / m + S01 / n [2, 2] over all pairs (DeLong et al. 1988, equations 4 to 6)."""
    psi = [placements(is_member, a), placements(is_member, b)]
    m, n = psi[0].shape
    area = [p.mean() for p in psi]
    out = np.empty((2, 2))
    for r in range(2):
        for s in range(2):
            s10 = sum((psi[r][i].mean() - area[r]) * (psi[s][i].mean() - area[s]) for i in range(m)) / (m - 1)
            s01 = sum((psi[r][:, j].mean() - area[r]) * (psi[s][:, j].mean() - area[s]) for j in range(n)) / (n - 1)
            out[r, s] = s10 / m + s01 / n
    return out


@pytest.mark.parametrize("decimals", [0, 1, 12])
@pytest.mark.parametrize(("m", "n"), [(8, 30), (200, 170)])
def test_comparison_is_delongs(m: int, n: int, decimals: int) -> None:
    is_member, a = normal_table(1, m, n, 1.2)
    b = (0.5 * a + normal_table(2, m, n, 0.0)[1]).round(decimals)
    a = a.round(decimals)
    got = intervals.compare(is_member, a, b, 0.9)
    covariance = delong_covariance(is_member, a, b)
    difference = roc_auc_score(is_member, a) - roc_auc_score(is_member, b)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    d10, d01 = (placements(is_member, a) - placements(is_member, b)).mean(1), (placements(is_member, a) - placements(is_member, b)).mean(0)
    uncertainty = sum((stats.moment(v, 4) - np.cov(v) ** 2 * (len(v) - 3) / (len(v) - 1)) / len(v) ** 3 for v in (d10, d01))
    t = stats.t(2 * error**4 / uncertainty)
    assert got.difference == pytest.approx(difference, abs=1e-12)
    assert got.p_value == pytest.approx(2 * t.sf(abs(difference) / error), rel=1e-7)
    assert got.interval == pytest.approx((difference - t.isf(0.05) * error, difference + t.isf(0.05) * error), abs=1e-9)
    if decimals == 12 and m == 200:  # DeLong's own normal quantile agrees where many images carry the variance
        assert stats.norm.isf(got.p_value / 2) == pytest.approx(abs(difference) / error, rel=0.03)


@quick
@given(tables(), st.integers(0, 99))
def test_exchanged_attacks_mirror_the_comparison(table: Table, seed: int) -> None:
    is_member, a = table
    b = np.random.default_rng(seed).permutation(a)
    one, other = intervals.compare(is_member, a, b), intervals.compare(is_member, b, a)
    assert other.difference == pytest.approx(-one.difference, abs=1e-12)
    assert other.p_value == pytest.approx(one.p_value, abs=1e-9)
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]), abs=1e-9)
    assert -1 <= one.interval[0] <= one.difference <= one.interval[1] <= 1
    assert 0 <= one.p_value <= 1


def test_equally_good_attacks_differ_as_often_as_the_level_says() -> None:
    rng, p = np.random.default_rng(0), []
    for _ in range(800):
        is_member, common = rng.random(120) < 0.5, rng.normal(size=120)
        a, b = (common + rng.normal(size=120) + 1.5 * is_member for _ in range(2))
        p.append(intervals.compare(is_member, a, b).p_value)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.03 <= (np.array(p) < 0.05).mean() <= 0.07


def test_pairing_finds_what_two_intervals_do_not() -> None:
    is_member, a = normal_table(0, 300, 300, 1.0)
    b = a + 0.15 * is_member
    got = intervals.compare(is_member, a, b)
    assert got.p_value < 0.001
    assert metrics.auc(is_member, a)[1][1] > metrics.auc(is_member, b)[1][0]


def test_the_same_scores_do_not_differ_and_leave_room_for_what_was_not_seen() -> None:
    is_member, score = normal_table(0, 100, 150)
    got = intervals.compare(is_member, score, np.exp(score))
    unseen = 1 - 0.025**0.01  # 0 of 100 disjoint pairs
    assert (got.difference, got.p_value) == (0, 1)
    assert got.interval == pytest.approx((-unseen, unseen))


def test_perfect_against_constant_is_as_sure_as_the_pairs_allow() -> None:
    for pairs, p_value in ((2, 2 / 1.5**2), (3, 2 / 1.5**3), (40, 2 / 1.5**40)):
        is_member = np.arange(2 * pairs) < pairs
        got = intervals.compare(is_member, is_member.astype(float), np.zeros(2 * pairs))
        assert (got.difference, got.p_value) == (0.5, pytest.approx(p_value))
        assert (got.interval[0] > 0) == (p_value < 0.05)


# --- Holm


def test_holm_by_hand() -> None:
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1 is .02, .03, .06, .04; the last may not be below the one before it.
    np.testing.assert_allclose(intervals.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(intervals.holm([0.5, 0.9]), [1, 1])
    assert intervals.holm([]).tolist() == []


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_stepping_down_rejects(p: list[float], alpha: float) -> None:
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] * (len(p) - rank) > alpha:
            break
        rejected.add(i)
    assert set(np.flatnonzero(intervals.holm(p) <= alpha)) == rejected


@pytest.mark.parametrize("p", [[0.5, 1.2], [-0.1], [np.nan], [[0.5]]])
def test_holm_refuses_what_is_no_p_value(p: list[float]) -> None:
    with pytest.raises(UserError, match="from 0 to 1"):
        intervals.holm(p)


# --- bad input

ALL: list[Callable[[Labels, Floats], object]] = [
    intervals.bootstrap_auc,
    lambda y, s: intervals.hierarchical_bootstrap([(y, s), (y, s)]),
    lambda y, s: intervals.compare(y, s, s),
]


@pytest.mark.parametrize("function", ALL)
def test_scores_that_cannot_be_judged_are_refused(function: Callable[[Labels, Floats], object]) -> None:
    is_member, score = normal_table(0, 5, 5)
    with pytest.raises(UserError, match="both needed"):
        function(np.ones(10, bool), score)
    with pytest.raises(UserError, match="1 of 10 scores are not finite"):
        function(is_member, np.where(np.arange(10) == 3, np.nan, score))
    with pytest.raises(UserError, match="one score and one label per image"):
        function(is_member[:9], score)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, np.nan])
def test_levels_that_are_none_are_refused(level: float) -> None:
    one = normal_table(0, 5, 5)
    for call in (
        lambda: intervals.bootstrap_auc(*one, level=level),
        lambda: intervals.mean_interval([0.1, 0.2], level),
        lambda: intervals.hierarchical_bootstrap([one, one], level),
        lambda: intervals.compare(*one, one[1], level),
    ):
        with pytest.raises(ConfigError, match="level="):
            call()


def test_a_paired_comparison_needs_the_same_images() -> None:
    is_member, score = normal_table(0, 5, 5)
    with pytest.raises(UserError, match="same images, here 10 and 9"):
        intervals.compare(is_member, score, score[:9])
