from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffmia_exp import audit
from diffmia_exp.errors import ConfigError, UserError
from tests.bench_statistics import gaussian_epsilon, response
from tests.test_metrics import Floats, Labels, normal_table

quick = settings(max_examples=25, deadline=None, derandomize=True)


def p_value_by_sums(images: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The tail and the correction for delta, each term of the binomial written out."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    pmf = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    worst = max((sum(pmf[correct - i : correct]) / i for i in range(1, correct + 1)), default=0.0)
    return min(1.0, sum(pmf[correct:]) + 2 * images * delta * worst)


@quick
@given(st.integers(0, 30), st.integers(0, 30), st.floats(0, 4), st.sampled_from([0.0, 1e-5, 1e-3, 0.1]))
def test_p_value_is_the_sum_of_its_terms(a: int, b: int, epsilon: float, delta: float) -> None:
    guesses, correct = max(a, b), min(a, b)
    got = audit.p_value(40, guesses, correct, epsilon, delta)
    assert got == pytest.approx(p_value_by_sums(40, guesses, correct, epsilon, delta), rel=1e-9, abs=1e-12)


def test_bounds_are_the_papers() -> None:
    # Steinke, Nasr, Jagielski 2023: 75 of 100 guesses right, 1,000 canaries (appendix D); 1,439 of 1,510, 100,000 canaries (section 7).
    assert audit.epsilon_bound(1000, 100, 75, 1e-4, 0.05) == pytest.approx(0.673, abs=0.001)
    assert audit.epsilon_bound(100_000, 1510, 1439, 1e-5, 0.05) == pytest.approx(2.675, abs=0.001)


@pytest.mark.parametrize(("guesses", "correct"), [(10, 9), (100, 60), (100, 100), (1000, 731)])
def test_without_delta_the_bound_is_clopper_pearsons_of_the_accuracy(guesses: int, correct: int) -> None:
    accuracy = stats.binomtest(correct, guesses, alternative="greater").proportion_ci(0.95).low
    assert audit.epsilon_bound(guesses, guesses, correct, 0.0, 0.05) == pytest.approx(math.log(accuracy / (1 - accuracy)), abs=1e-6)


@pytest.mark.parametrize(("guesses", "correct"), [(2, 2), (4, 4), (10, 7), (100, 50), (100, 0)])
def test_nothing_shown_is_epsilon_zero(guesses: int, correct: int) -> None:
    # 4 of 4 right has probability 1/16 by guessing.
    assert audit.epsilon_bound(100, guesses, correct, 0.0, 0.05) == 0


@quick
@given(st.integers(1, 60), st.sampled_from([1e-6, 1e-4]))
def test_the_bound_falls_with_delta_and_errors(correct: int, delta: float) -> None:
    assert audit.epsilon_bound(200, 60, correct, delta, 0.05) <= audit.epsilon_bound(200, 60, correct, 0.0, 0.05)
    assert audit.epsilon_bound(200, 60, correct - 1, delta, 0.05) <= audit.epsilon_bound(200, 60, correct, delta, 0.05)


# --- on mechanisms whose epsilon is known


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("guesses", [100, 1000, 2000])
def test_exact_probability_that_the_bound_is_above_randomised_responses_epsilon(epsilon: float, guesses: int) -> None:
    """Each guess repeats a response that is right with probability q, so the right ones are Binomial(guesses, q)."""
    q = 1 / (1 + math.exp(-epsilon))
    right = np.arange(int(guesses * q), guesses + 1)  # fewer than expected give a bound below epsilon
    above = [audit.epsilon_bound(2000, guesses, int(v), 0.0, 0.05) > epsilon for v in right]
    assert audit.epsilon_bound(2000, guesses, int(right[0]), 0.0, 0.05) < epsilon
    assert stats.binom.pmf(right, guesses, q)[above].sum() <= 0.05


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("guesses", [1000, 2000, [500, 1000, 1500]])
def test_one_run_comes_close_on_randomised_response(epsilon: float, guesses: int | list[int]) -> None:
    rng = np.random.default_rng(0)
    bounds = np.array([audit.one_run(*response(rng, 2000, epsilon), guesses, bernoulli=True).epsilon for _ in range(200)])
    assert np.median(bounds) >= 0.7 * epsilon
    assert (bounds > epsilon).mean() <= 0.09  # 5% give at most 18 of 200 with probability .99
    classical = np.array([audit.classical(*response(rng, 2000, epsilon), 0.5).epsilon for _ in range(100)])
    assert np.median(classical) >= 0.7 * epsilon
    assert (classical > epsilon).mean() <= 0.11


@pytest.mark.parametrize(("sigma", "delta"), [(2.0, 1e-2), (1.0, 1e-4), (0.5, 1e-2)])
def test_bounds_hold_for_the_gaussian_mechanism_and_are_not_idle(sigma: float, delta: float) -> None:
    epsilon = gaussian_epsilon(sigma, delta)
    assert stats.norm.sf(epsilon * sigma - 1 / (2 * sigma)) - math.exp(epsilon) * stats.norm.sf(epsilon * sigma + 1 / (2 * sigma)) == (
        pytest.approx(delta)
    )
    one_run, classical = [], []
    for seed in range(60):
        rng = np.random.default_rng([seed, 1])
        is_member = rng.random(2000) < 0.5
        score = sigma * rng.normal(size=2000) + is_member
        one_run.append(audit.one_run(is_member, score, 200, bernoulli=True, delta=delta).epsilon)
        classical.append(audit.classical(is_member, score, [0.5, 0.5 + sigma, 0.5 + 2 * sigma], delta=delta).epsilon)
    for bounds in (one_run, classical):
        assert (np.array(bounds) > epsilon).mean() <= 0.05
    assert np.median(classical) > 0.2 * epsilon
    assert delta == 1e-2 or np.median(one_run) > 0.2 * epsilon


def test_delta_one_and_random_scores_show_nothing() -> None:
    is_member = np.random.default_rng(0).random(1000) < 0.5
    assert audit.one_run(is_member, is_member.astype(float), 1000, bernoulli=True, delta=1.0).epsilon == 0
    assert audit.classical(is_member, is_member.astype(float), 0.5, delta=1.0).epsilon == 0
    noise = np.random.default_rng(1).normal(size=(200, 1000))
    assert np.mean([audit.one_run(is_member, s, 200, bernoulli=True).epsilon > 0 for s in noise]) <= 0.08


# --- the guesses


def right_by_hand(is_member: Labels, score: Floats, guesses: int) -> int:
    ordered = [label for _, label in sorted(zip(score, is_member, strict=True))]
    half = guesses // 2
    return sum(not label for label in ordered[:half]) + sum(bool(label) for label in ordered[-half:])


@quick
@given(st.integers(0, 999), st.integers(1, 40).map(lambda h: 2 * h))
def test_guesses_are_the_extremes_whatever_the_scale_and_the_order(seed: int, guesses: int) -> None:
    is_member, score = normal_table(seed, 40, 40)
    bound = audit.one_run(is_member, score, guesses, bernoulli=True)
    assert (bound.guesses, bound.correct, bound.images, bound.tried) == (guesses, right_by_hand(is_member, score, guesses), 80, 1)
    assert audit.one_run(is_member, np.exp(score), guesses, bernoulli=True) == bound
    order = np.random.default_rng(seed).permutation(80)
    assert audit.one_run(is_member[order], score[order], guesses, bernoulli=True) == bound
    mirrored = audit.one_run(~is_member, -score, guesses, bernoulli=True)
    assert mirrored == bound
    assert audit.one_run(~is_member, score, guesses, bernoulli=True).correct == guesses - bound.correct


@pytest.mark.parametrize("members_first", [True, False])
def test_equal_scores_give_nothing_away_by_the_order_of_the_rows(members_first: bool) -> None:
    is_member = (np.arange(2000) < 1000) == members_first
    correct = [audit.one_run(is_member, np.zeros(2000), 200, bernoulli=True, seed=seed).correct for seed in range(100)]
    # Hypergeometric: mean 100, standard deviation 6.9.
    assert 97 <= np.mean(correct) <= 103
    assert audit.one_run(is_member, np.zeros(2000), 200, bernoulli=True).epsilon == 0


def test_the_best_of_several_pays_for_their_number() -> None:
    is_member, score = response(np.random.default_rng(0), 2000, 1.0)
    single = [audit.one_run(is_member, score, k, bernoulli=True) for k in (100, 500, 1000)]
    several = audit.one_run(is_member, score, [100, 500, 1000], bernoulli=True)
    corrected = [audit.epsilon_bound(2000, one.guesses, one.correct, 0.0, 0.05 / 3) for one in single]
    assert several.epsilon == max(corrected) < max(one.epsilon for one in single)
    assert (several.tried, several.guesses) == (3, single[int(np.argmax(corrected))].guesses)
    thresholds = audit.classical(is_member, score, [0.5, 0.7])
    assert (thresholds.tried, thresholds.threshold) == (2, 0.5)
    assert thresholds.epsilon < audit.classical(is_member, score, 0.5).epsilon


# --- the classical bound


def test_classical_bound_by_hand() -> None:
    is_member = np.arange(300) < 100
    score = np.zeros(300)
    score[:60], score[100:102] = 1, 1  # TPR 60 / 100, FPR 2 / 200
    low = stats.beta.ppf(0.025, 60, 41)
    high = stats.beta.isf(0.025, 3, 198)
    got = audit.classical(is_member, score, 0.5, delta=0.01)
    assert got.epsilon == pytest.approx(math.log((low - 0.01) / high), rel=1e-9)
    assert (got.correct, got.guesses, got.images, got.threshold) == (60 + 198, 300, 300, 0.5)
    # The other direction wins where nearly all members are found: FNR 0, FPR 1 / 2.
    score = np.where(is_member, 1.0, np.arange(300) % 2)
    got = audit.classical(is_member, score, 0.5)
    assert got.epsilon == pytest.approx(math.log((1 - stats.beta.isf(0.025, 101, 100)) / (1 - 0.025**0.01)), rel=1e-9)
    # Lower scores for members are no attack of this direction.
    assert audit.classical(is_member, -score, -0.5).epsilon == 0


@quick
@given(st.integers(0, 999), st.floats(-2, 3))
def test_mirrored_scores_exchange_the_directions_of_the_classical_bound(seed: int, threshold: float) -> None:
    is_member, score = normal_table(seed, 50, 60)
    one, other = audit.classical(is_member, score, threshold), audit.classical(~is_member, -score, -threshold)
    assert other.epsilon == pytest.approx(one.epsilon, abs=1e-9)
    assert other.correct == one.correct


# --- bad input


def test_an_exact_size_is_refused_and_would_break_the_audit() -> None:
    is_member, score = normal_table(0, 50, 50)
    with pytest.raises(UserError, match=r"split=bernoulli.*exact size"):
        audit.one_run(is_member, score, 10, bernoulli=False)
    with pytest.raises(UserError, match="1 members of 40 images cannot come from inclusion with probability 1/2"):
        audit.one_run(np.arange(40) == 7, np.arange(40.0), 10, bernoulli=True)
    # 1,000 pairs with one member each, and randomised response about the first of each pair: its answer betrays the second too, so
    # that 2 Binomial(1000, q) guesses are right. The mechanism's epsilon is 1, and the bound is above it more than twice as often as 5%.
    q, pairs = 1 / (1 + math.exp(-1)), np.arange(700, 1001)
    above = [audit.epsilon_bound(2000, 2000, 2 * int(k), 0.0, 0.05) > 1 for k in pairs]
    assert stats.binom.pmf(pairs, 1000, q)[above].sum() > 0.1


@pytest.mark.parametrize("guesses", [0, 1, 3, 102, -2, 2.0, "10", True, [10, 11], []])
def test_guesses_must_be_even_and_within_the_audit(guesses: object) -> None:
    is_member, score = normal_table(0, 50, 50)
    with pytest.raises(ConfigError, match=r"^guesses="):
        audit.one_run(is_member, score, guesses, bernoulli=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "value"), [("delta", -0.1), ("delta", 1.1), ("delta", np.nan), ("confidence", 0.0), ("confidence", 95)])
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    is_member, score = normal_table(0, 50, 50)
    with pytest.raises(ConfigError, match=f"^{key}="):
        audit.one_run(is_member, score, 10, bernoulli=True, **{key: value})
    with pytest.raises(ConfigError, match=f"^{key}="):
        audit.classical(is_member, score, 0.0, **{key: value})


@pytest.mark.parametrize("threshold", [np.nan, [], [0.5, np.inf]])
def test_thresholds_must_be_finite(threshold: float | list[float]) -> None:
    with pytest.raises(ConfigError, match=r"^threshold="):
        audit.classical(*normal_table(0, 5, 5), threshold)


def test_scores_that_cannot_be_judged_are_refused() -> None:
    is_member, score = normal_table(0, 5, 5)
    for call in (lambda y, s: audit.one_run(y, s, 2, bernoulli=True), lambda y, s: audit.classical(y, s, 0.0)):
        with pytest.raises(UserError, match="not finite"):
            call(is_member, np.where(is_member, np.inf, score))
        with pytest.raises(UserError, match="both needed"):
            call(np.zeros(10, bool), score)
