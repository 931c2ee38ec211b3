from itertools import combinations

import numpy as np
import pytest

from diffmia_exp.attacks.noise_aggregation import NoiseAggregation
from tests.attacks.conftest import A, Lab


@pytest.mark.parametrize(("t", "stride", "k"), [(80, 10, 5), (300, 100, 4)])
def test_formula(lab: Lab, t: int, stride: int, k: int) -> None:
    def reference(x0: np.ndarray, n: int) -> float:
        x = np.sqrt(A[t]) * x0 + np.sqrt(1 - A[t]) * lab.noise(n, 0, seed=6)
        predicted = []
        for i in range(k):
            now, then = t - i * stride, t - (i + 1) * stride
            eps = lab.eps(x, now)
            predicted.append(eps)
            if i < k - 1:
                x = np.sqrt(A[then]) * (x - np.sqrt(1 - A[now]) * eps) / np.sqrt(A[now]) + np.sqrt(1 - A[then]) * eps
        return -float(np.mean([((a - b) ** 2).sum() for a, b in combinations(predicted, 2)]))

    lab.check(NoiseAggregation(t, stride, k, seed=6), reference)
