import numpy as np

from diffmia_exp.attacks.loss import Loss
from diffmia_exp.attacks.reference import Reference
from tests.attacks.shadow_world import made_up


def test_formula() -> None:
    signals, _ = made_up(K=12)
    expected = []
    for n in range(40):
        without = [k for k in range(12) if not signals.keep[k, n]]
        gaps = [signals.target[n, f] - sum(signals.shadows[k, n, f] for k in without) / len(without) for f in range(2)]
        expected.append(sum(gaps) / 2)
    np.testing.assert_allclose(Reference(Loss()).judge(signals), expected, rtol=1e-12)
