import numpy as np
import pytest
from scipy.stats import norm

from diffmia_exp.attacks.lira import LiRA
from diffmia_exp.attacks.loss import Loss
from diffmia_exp.metrics import auc
from tests.attacks.shadow_world import made_up


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("variance", ["fixed", "per_image"])
def test_formula(online: bool, variance: str) -> None:
    """Against a loop over images, signals and models."""
    signals, _ = made_up(K=12)
    F = signals.target.shape[1]
    rows: dict[tuple[int, int, bool], list[float]] = {}
    for n in range(40):
        for f in range(F):
            for inside in (True, False):
                rows[n, f, inside] = [signals.shadows[k, n, f] for k in range(12) if signals.keep[k, n] == inside]
    assert min(len(v) for v in rows.values()) >= 2

    def pooled(f: int, inside: bool) -> float:
        squares = sum(sum((v - np.mean(rows[n, f, inside])) ** 2 for v in rows[n, f, inside]) for n in range(40))
        return float(np.sqrt(squares / sum(len(rows[n, f, inside]) - 1 for n in range(40))))

    expected = np.zeros(40)
    for n in range(40):
        for f in range(F):
            s = signals.target[n, f]
            density = {}
            for inside in (True, False):
                mu = np.mean(rows[n, f, inside])
                sigma = pooled(f, inside) if variance == "fixed" else np.std(rows[n, f, inside], ddof=1)
                density[inside] = norm(mu, sigma)
            expected[n] += density[True].logpdf(s) - density[False].logpdf(s) if online else density[False].logcdf(s)
    np.testing.assert_allclose(LiRA(Loss(), online, variance).judge(signals), expected, rtol=1e-10)


@pytest.mark.parametrize("online", [True, False])
def test_it_finds_what_membership_adds_and_nothing_where_it_adds_nothing(online: bool) -> None:
    attack = LiRA(Loss(), online)
    signals, is_member = made_up(K=16, n=400, shift=0.5, seed=1)
    plain = auc(is_member, signals.target.mean(1))[0]
    assert auc(is_member, attack.judge(signals))[1][0] > plain + 0.1
    signals, is_member = made_up(K=16, n=400, shift=0.0, seed=2)
    low, high = auc(is_member, attack.judge(signals))[1]
    assert low < 0.5 < high


def test_images_that_all_or_none_of_the_shadows_hold_are_judged_too() -> None:
    signals, _ = made_up(K=2)
    assert not signals.mixed.all()
    assert np.isfinite(LiRA(Loss()).judge(signals)).all()
