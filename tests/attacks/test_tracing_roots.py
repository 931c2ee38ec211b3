from __future__ import annotations

import numpy as np
import torch

from diffmia_exp.attacks.tracing_roots import TracingRoots
from diffmia_exp.signals import Signals
from tests.attacks.conftest import A, Lab, T


def test_formula(lab: Lab) -> None:
    net, times = lab.net[torch.float64], [0, 500, 999]
    expected = np.empty((len(lab.x), 3, 3))
    for n in range(len(lab.x)):
        for i, t in enumerate(times):
            eps = torch.from_numpy(lab.noise(n, t, 4))
            x_t = (np.sqrt(A[t]) * lab.x[n] + np.sqrt(1 - A[t]) * eps).requires_grad_()
            loss = (eps - net(x_t[None], t).sample[0]).square().mean()
            of_x, *of_theta = torch.autograd.grad(loss, [x_t, *net.parameters()])
            expected[n, :, i] = loss.item(), float(of_x.square().sum()), sum(float(g.square().sum()) for g in of_theta)
    attack = TracingRoots(n_timesteps=3, seed=4)
    assert T == 1000  # 999 / 2 rounds to 500
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        access = attack.access(lab.diffusion(dtype))
        signal = attack.signal(access, lab.x, lab.ids)
        assert not signal.requires_grad
        np.testing.assert_allclose(signal.numpy(), expected.reshape(len(lab.x), 9), rtol=tolerance, atol=0)
        assert access.evaluations == len(lab.x) * attack.nfe(T) == len(lab.x) * 6


def test_the_logarithms_are_judged() -> None:
    rng = np.random.default_rng(0)
    keep, member = rng.random((1, 400)) < 0.5, rng.random(400) < 0.5
    shadows, target = (10.0 ** (6 * rng.random((*m.shape, 1)) - np.stack([0 * m, m], -1)) for m in (keep, member))
    signals = Signals(np.arange(400), target, shadows, keep, np.ones_like(keep), np.zeros(400, bool))
    score = TracingRoots(n_timesteps=1, C=100.0).judge(signals)
    assert score[member].min() > score[~member].max()
