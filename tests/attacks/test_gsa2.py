from __future__ import annotations

import numpy as np
import torch

from diffmia_exp.attacks.gsa2 import GSA2
from tests.attacks.conftest import Lab, T
from tests.attacks.test_gsa1 import loss, norms


def test_formula(lab: Lab) -> None:
    expected = np.array([np.mean([norms(lab, loss(lab, n, t, 2)) for t in (0, 333, 666, 999)], axis=0) for n in range(len(lab.x))])
    attack = GSA2(n_timesteps=4, seed=2)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        access = attack.access(lab.diffusion(dtype))
        np.testing.assert_allclose(attack.signal(access, lab.x, lab.ids).numpy(), expected, rtol=tolerance, atol=0)
        assert access.evaluations == len(lab.x) * attack.nfe(T) == len(lab.x) * 8
