import numpy as np
import torch

from diffmia_exp.attacks.multi_loss import MultiLoss
from diffmia_exp.signals import Signals
from tests.attacks.conftest import A, Lab


def losses(lab: Lab, x0: np.ndarray, n: int, steps: list[int], n_noises: int, seed: int) -> list[float]:
    """||eps - eps_t(x_t)||^2 for each timestep, averaged over its noises."""
    out = []
    for i, t in enumerate(steps):
        noises = [lab.noise(n, i * n_noises + draw, seed) for draw in range(n_noises)]
        errors = [((eps - lab.eps(np.sqrt(A[t]) * x0 + np.sqrt(1 - A[t]) * eps, t)) ** 2).sum() for eps in noises]
        out.append(sum(errors) / n_noises)
    return out


def test_formula(lab: Lab) -> None:
    attack = MultiLoss(t=[10, 300, 999], n_noises=2, seed=4)
    lab.check(attack, lambda x0, n: -float(np.mean(losses(lab, x0, n, [10, 300, 999], 2, 4))))


def test_the_signal_keeps_the_timesteps_apart_and_the_judgement_averages_them(lab: Lab) -> None:
    attack = MultiLoss(t=[10, 300, 999], n_noises=2, seed=4)
    signal = attack.signal(attack.access(lab.diffusion()), lab.x, lab.ids)
    expected = [losses(lab, x0.numpy(), n, [10, 300, 999], 2, 4) for n, x0 in enumerate(lab.x)]
    np.testing.assert_allclose(-signal.numpy(), expected, rtol=1e-9)
    none = np.empty((0, len(lab.x)), dtype=bool)
    signals = Signals(lab.ids.numpy(), signal.numpy(), np.empty((0, *signal.shape)), none, none, np.zeros(len(lab.x), dtype=bool))
    scores = attack.score(attack.access(lab.diffusion()), lab.x, lab.ids)
    torch.testing.assert_close(torch.from_numpy(attack.judge(signals)), scores, rtol=1e-12, atol=0)
