from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from diffmia_exp import set_inference
from diffmia_exp.errors import ConfigError, UserError
from tests.bench_statistics import features
from tests.test_metrics import Floats


def both(seed: int, n: int, k: int, shift: float = 0.0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 4)) + shift, rng.normal(size=(k, 4))


@pytest.mark.parametrize("seed", range(3))
def test_p_value_is_welchs_on_halves_that_the_model_has_not_seen(seed: int) -> None:
    questioned, nonmembers = both(seed, 61, 40, 0.3)
    rng = np.random.default_rng([seed, 0])
    q, n = questioned[rng.permutation(61)], nonmembers[rng.permutation(40)]
    (fit_q, test_q), (fit_n, test_n) = (q[:31], q[31:]), (n[:20], n[20:])
    fit, label = np.concatenate([fit_q, fit_n]), np.arange(51) < 31
    mean, sd = fit.mean(0), fit.std(0)
    model = LogisticRegression(class_weight="balanced", max_iter=1000).fit((fit - mean) / sd, label)
    a, b = (1 / (1 + np.exp(-(((x - mean) / sd) @ model.coef_[0] + model.intercept_[0]))) for x in (test_q, test_n))
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    df = error**4 / ((a.var(ddof=1) / len(a)) ** 2 / (len(a) - 1) + (b.var(ddof=1) / len(b)) ** 2 / (len(b) - 1))
    expected = stats.t.sf((a.mean() - b.mean()) / error, df)
    assert set_inference.p_value(questioned, nonmembers, seed=seed) == pytest.approx(expected, rel=1e-6)


def test_p_values_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(1)
    p = np.array([set_inference.p_value(features(rng, 100), features(rng, 50), seed=seed) for seed in range(400)])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert (p < 0.05).mean() <= 0.08


def test_several_splits_are_combined_as_twice_the_median_and_stay_valid() -> None:
    questioned, nonmembers = both(0, 60, 60, 0.2)
    p = set_inference.p_value(questioned, nonmembers, splits=7)
    single = []
    for i in range(7):  # the i-th split of seed 0
        rng = np.random.default_rng([0, i])
        single.append(set_inference._one_split(questioned, nonmembers, rng))
    assert p == min(1.0, 2 * sorted(single)[3])
    rng = np.random.default_rng(2)
    null = np.array([set_inference.p_value(features(rng, 40), features(rng, 40), splits=5, seed=s) for s in range(60)])
    assert (null < 0.2).mean() <= 0.2


def test_members_are_found_and_lower_scores_are_not() -> None:
    questioned, nonmembers = both(0, 400, 400, 0.3)
    assert set_inference.p_value(questioned, nonmembers) < 1e-6
    assert set_inference.p_value(questioned, nonmembers, splits=9) < 1e-5
    # The model learns which way the scores point: an attack that points the wrong way counts as evidence too.
    assert set_inference.p_value(-questioned, -nonmembers) == pytest.approx(set_inference.p_value(questioned, nonmembers), rel=1e-6)


@pytest.mark.parametrize("columns", [lambda x: x * [3, 0.1, 10, 1] + 5, lambda x: x[:, ::-1]], ids=["scale", "order"])
def test_neither_scale_nor_order_of_the_attacks_matters(columns: object) -> None:
    questioned, nonmembers = both(3, 80, 80, 0.2)
    expected = set_inference.p_value(questioned, nonmembers)
    assert set_inference.p_value(columns(questioned), columns(nonmembers)) == pytest.approx(expected, rel=1e-3)  # type: ignore[operator]


def test_attacks_without_spread_prove_nothing() -> None:
    assert set_inference.p_value(np.ones((20, 3)), np.ones((20, 3))) == 1
    # A perfect attack that knows only two scores: the exact permutation test of 10 against 10.
    assert set_inference.p_value(np.ones((20, 1)), np.zeros((20, 1))) == pytest.approx(1 / math.comb(20, 10))


def test_images_needed_is_the_smallest_number_by_exhaustive_search() -> None:
    questioned, nonmembers = both(1, 60, 60, 1.0)
    needed = set_inference.images_needed(questioned, nonmembers, draws=15)
    assert needed is not None

    def median(n: int) -> float:
        p = []
        for i in range(15):
            rng = np.random.default_rng([0, i])
            q, k = rng.permutation(60)[:n], rng.permutation(60)[:n]
            p.append(set_inference._one_split(questioned[q], nonmembers[k], rng))
        return float(np.median(p))

    assert median(needed) < 0.01 <= median(needed - 1)
    assert all(median(n) < 0.01 for n in range(needed + 8, 60, 8))


def test_stronger_attacks_need_fewer_images_and_none_will_do_under_the_null() -> None:
    needed = [set_inference.images_needed(*both(0, 300, 200, shift), draws=7) for shift in (0.3, 0.6, 1.5)]
    assert None not in needed
    assert needed == sorted(needed, reverse=True)
    assert set_inference.images_needed(*both(0, 100, 100), draws=11) is None


@pytest.mark.parametrize(("n", "k"), [(3, 50), (50, 3)])
def test_too_few_images_are_refused(n: int, k: int) -> None:
    with pytest.raises(UserError, match="at least 4"):
        set_inference.p_value(*both(0, n, k))


def test_bad_scores_are_refused() -> None:
    questioned, nonmembers = both(0, 9, 9)
    with pytest.raises(UserError, match="same attacks, here 4 and 3"):
        set_inference.p_value(questioned, nonmembers[:, :3])
    with pytest.raises(UserError, match="one column per attack"):
        set_inference.images_needed(questioned[:, 0], nonmembers)
    nonmembers[2, 1] = np.nan
    with pytest.raises(UserError, match="1 scores of known non-member images are not finite"):
        set_inference.p_value(questioned, nonmembers)
    with pytest.raises(ConfigError, match="alpha=2"):
        set_inference.images_needed(questioned, questioned, alpha=2)
    with pytest.raises(ConfigError, match="splits=0"):
        set_inference.p_value(questioned, questioned, splits=0)
