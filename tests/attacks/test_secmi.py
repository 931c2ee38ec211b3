import numpy as np
import pytest

from diffmia_exp.attacks.secmi import SecMI
from tests.attacks.conftest import A, Lab


@pytest.mark.parametrize(("t", "stride"), [(100, 10), (40, 40), (200, 25)])
def test_formula(lab: Lab, t: int, stride: int) -> None:
    def move(x: np.ndarray, eps: np.ndarray, a: float, b: float) -> np.ndarray:
        return np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps

    def reference(x: np.ndarray, n: int) -> float:
        for s in range(0, t - stride, stride):  # deterministic inversion up to t - stride
            x = move(x, lab.eps(x, s), A[s], A[s + stride])
        s = t - stride
        up = move(x, lab.eps(x, s), A[s], A[t])
        back = move(up, lab.eps(up, t), A[t], A[s])
        return -((back - x) ** 2).sum()

    attack = SecMI(t=t, stride=stride)
    lab.check(attack, reference)
    assert attack.nfe(1000) == (t - stride) // stride + 2
