import numpy as np
import pytest

from diffmia_exp.attacks.loss import Loss
from diffmia_exp.attacks.rmia import RMIA
from diffmia_exp.metrics import auc
from tests.attacks.shadow_world import made_up


@pytest.mark.parametrize("online", [True, False])
def test_formula(online: bool) -> None:
    """Against a loop over images, population and models, likelihoods taken as they are written."""
    gamma, a, K = 1.5, 0.98, 12
    signals, _ = made_up(K=K, n=40, public=30)
    s, shadows = signals.target.mean(1), signals.shadows.mean(2)
    inside = [[shadows[k, n] for k in range(K) if signals.keep[k, n]] for n in range(40)]
    outside = [[shadows[k, n] for k in range(K) if not signals.keep[k, n]] for n in range(70)]
    squares = sum(sum((v - np.mean(outside[n])) ** 2 for v in outside[n]) for n in range(40))
    tau = np.sqrt(squares / sum(len(outside[n]) - 1 for n in range(40)))

    def ratio(n: int) -> float:
        p_out = np.exp(np.mean(outside[n]) / tau)
        if n >= 40:
            return float(np.exp(s[n] / tau) / p_out)
        p_in = np.exp(np.mean(inside[n]) / tau) if online else p_out**a
        return float(np.exp(s[n] / tau) / ((p_in + p_out) / 2))

    expected = [sum(ratio(n) / ratio(z) >= gamma for z in range(40, 70)) / 30 for n in range(40)]
    score = RMIA(Loss(), online, gamma, a).judge(signals)[:40]
    assert 0 < np.mean(expected) < 1
    np.testing.assert_allclose(score, expected, atol=0.5 / 30)  # ties are broken within half a member of the population
    for i in range(40):
        assert all(score[i] > score[j] for j in range(40) if expected[i] > expected[j])


@pytest.mark.parametrize("online", [True, False])
def test_it_finds_what_membership_adds_and_nothing_where_it_adds_nothing(online: bool) -> None:
    attack = RMIA(Loss(), online)
    signals, is_member = made_up(K=16, n=400, public=100, shift=0.5, seed=1)
    assert auc(is_member[:400], attack.judge(signals)[:400])[0] > auc(is_member[:400], signals.target.mean(1)[:400])[0] + 0.1
    signals, is_member = made_up(K=16, n=400, public=100, shift=0.0, seed=2)
    low, high = auc(is_member[:400], attack.judge(signals)[:400])[1]
    assert low < 0.5 < high
