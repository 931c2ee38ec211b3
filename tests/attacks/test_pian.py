import numpy as np
import pytest
import torch

from diffmia_exp.attacks.pian import PIAN
from tests.attacks.conftest import A, Lab


def test_formula(lab: Lab) -> None:
    def reference(x0: np.ndarray, n: int) -> float:
        eps_0 = lab.eps(x0, 0)
        eps_0 = eps_0 * (np.sqrt(2 / np.pi) / (np.abs(eps_0).sum() / eps_0.size))
        return -(np.abs(eps_0 - lab.eps(np.sqrt(A[200]) * x0 + np.sqrt(1 - A[200]) * eps_0, 200)) ** 4).sum()

    lab.check(PIAN(), reference)


def test_normalised_normal_noise_is_standard_normal() -> None:
    normal = torch.randn(1, 1, 400, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(PIAN().noise(17 * normal).std()) == pytest.approx(1, abs=0.01)
