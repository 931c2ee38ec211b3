import numpy as np
import pytest

from diffmia_exp.attacks.pia import PIA
from tests.attacks.conftest import A, Lab


@pytest.mark.parametrize(("t", "p"), [(200, 4), (50, 2), (900, 1.5)])
def test_formula(lab: Lab, t: int, p: float) -> None:
    def reference(x0: np.ndarray, n: int) -> float:
        eps_0 = lab.eps(x0, 0)
        return -(np.abs(eps_0 - lab.eps(np.sqrt(A[t]) * x0 + np.sqrt(1 - A[t]) * eps_0, t)) ** p).sum()

    lab.check(PIA(t=t, p=p), reference)
