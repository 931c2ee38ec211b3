import numpy as np

from diffmia_exp.attacks.loss import Loss
from diffmia_exp.attacks.quantile import QuantileRegression
from diffmia_exp.metrics import auc
from diffmia_exp.signals import Signals


def test_it_removes_what_the_pixels_explain() -> None:
    """Scores depend on the pixels far more than on membership; what is learned from public images uncovers the latter."""
    rng = np.random.default_rng(0)
    n, public = 300, 600
    pixels = rng.uniform(-1, 1, (n + public, 16))
    is_member = rng.random(n + public) < 0.5
    is_member[n:] = False
    score = 5 * pixels[:, :4].sum(1) + rng.normal(size=n + public) + 2.0 * is_member
    none = np.empty((0, n + public), dtype=bool)
    target = np.column_stack([score, pixels])
    signals = Signals(np.arange(n + public), target, np.empty((0, *target.shape)), none, none, np.arange(n + public) >= n)
    calibrated = QuantileRegression(Loss(), bags=4).judge(signals)[:n]
    assert auc(is_member[:n], calibrated)[0] > auc(is_member[:n], score[:n])[1][1]
    assert auc(is_member[:n], calibrated)[0] > 0.8
