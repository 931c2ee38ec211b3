from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from diffmia_exp.attacks.gsa1 import GSA1
from diffmia_exp.errors import ConfigError
from diffmia_exp.signals import Signals
from tests.attacks.conftest import A, Lab, T


def loss(lab: Lab, n: int, t: int, seed: int) -> torch.Tensor:
    """L_t of image n by its definition, with a graph."""
    eps = torch.from_numpy(lab.noise(n, t, seed))
    x_t = np.sqrt(A[t]) * lab.x[n] + np.sqrt(1 - A[t]) * eps
    return (eps - lab.net[torch.float64](x_t[None], t).sample[0]).square().mean()


def norms(lab: Lab, value: torch.Tensor) -> np.ndarray:
    found = torch.autograd.grad(value, list(lab.net[torch.float64].parameters()))
    return np.array([float(g.norm()) for g in found])


def test_formula(lab: Lab) -> None:
    times = [0, 333, 666, 999]
    expected = np.array([norms(lab, sum(loss(lab, n, t, 5) for t in times) / 4) for n in range(len(lab.x))])
    attack = GSA1(n_timesteps=4, seed=5)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        access = attack.access(lab.diffusion(dtype))
        signal = attack.signal(access, lab.x, lab.ids)
        assert signal.dtype == torch.float64
        assert not signal.requires_grad
        np.testing.assert_allclose(signal.numpy(), expected, rtol=tolerance, atol=0)
        assert access.evaluations == len(lab.x) * attack.nfe(T) == len(lab.x) * 8


def test_the_head_judges() -> None:
    rng = np.random.default_rng(0)
    keep = rng.random((2, 300)) < 0.5
    member = rng.random(300) < 0.5
    shadows, target = (np.stack([rng.normal(size=m.shape), m + 0.1 * rng.normal(size=m.shape)], -1) for m in (keep, member))
    signals = Signals(np.arange(300), target, shadows, keep, np.ones_like(keep), np.zeros(300, bool))
    for attack in (GSA1(), GSA1(head=LogisticRegression())):
        score = attack.judge(signals)
        assert score[member].min() > score[~member].max()


def test_more_timesteps_than_there_are() -> None:
    with pytest.raises(ConfigError, match="n_timesteps"):
        GSA1(n_timesteps=11).nfe(10)
