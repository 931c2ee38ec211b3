import numpy as np
import pytest

from diffmia_exp.attacks.sima import SimA
from tests.attacks.conftest import Lab


@pytest.mark.parametrize(("t", "p"), [(100, 4), (0, 2), (300, 3)])
def test_formula(lab: Lab, t: int, p: float) -> None:
    lab.check(SimA(t=t, p=p), lambda x0, n: -(np.abs(lab.eps(x0, t)) ** p).sum())
