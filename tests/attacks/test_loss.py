import numpy as np
import pytest

from diffmia_exp.attacks.loss import Loss
from tests.attacks.conftest import A, Lab


@pytest.mark.parametrize(("t", "n_noises"), [(200, 1), (0, 1), (999, 3)])
def test_formula(lab: Lab, t: int, n_noises: int) -> None:
    def reference(x0: np.ndarray, n: int) -> float:
        total = 0.0
        for draw in range(n_noises):
            eps = lab.noise(n, draw, seed=5)
            total += ((eps - lab.eps(np.sqrt(A[t]) * x0 + np.sqrt(1 - A[t]) * eps, t)) ** 2).sum()
        return -total / n_noises

    lab.check(Loss(t=t, n_noises=n_noises, seed=5), reference)
