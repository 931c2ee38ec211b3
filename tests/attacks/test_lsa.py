import numpy as np

from diffmia_exp.attacks.lsa import LSA
from tests.attacks.conftest import Lab
from tests.attacks.test_multi_loss import losses


def test_its_signals_are_the_losses_at_equidistant_timesteps(lab: Lab) -> None:
    attack = LSA(n_timesteps=4, T=1000, seed=2)
    assert attack.t == [0, 333, 666, 999]
    signal = attack.signal(attack.access(lab.diffusion()), lab.x, lab.ids)
    expected = [losses(lab, x0.numpy(), n, [0, 333, 666, 999], 1, 2) for n, x0 in enumerate(lab.x)]
    np.testing.assert_allclose(-signal.numpy(), expected, rtol=1e-9)
