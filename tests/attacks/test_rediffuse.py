from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmia_exp.attacks.rediffuse import ReDiffuse, ssim
from diffmia_exp.cnn_head import ResNetHead
from diffmia_exp.errors import ConfigError
from diffmia_exp.metrics import auc
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import VariationAPI
from tests.attacks.conftest import A, Lab


def vary(lab: Lab, x: np.ndarray, n: int, draw: int, times: list[int], seed: int = 0) -> np.ndarray:
    """One variation of one image, by the definition of DDIM."""
    noise = gaussian(derive(seed, "vary"), lab.ids[n : n + 1], (1, 8, 8), draw)[0].numpy()
    x = np.sqrt(A[times[0]]) * x + np.sqrt(1 - A[times[0]]) * noise
    for t, then in zip(times, [*times[1:], None], strict=True):
        eps = lab.eps(x, t)
        a = 1.0 if then is None else A[then]
        x = np.sqrt(a) * (x - np.sqrt(1 - A[t]) * eps) / np.sqrt(A[t]) + np.sqrt(1 - a) * eps
    return np.clip(x, -1, 1)


def wang(a: np.ndarray, b: np.ndarray, window: int) -> float:
    """SSIM of [C, H, W] in [-1, 1], pixel by pixel: Wang et al. 2004, equation 13, every pixel of the window weighing the same."""
    c1, c2, r = (0.01 * 2) ** 2, (0.03 * 2) ** 2, window // 2
    values = []
    for u, v in zip(a, b, strict=True):
        u, v = np.pad(u, r, mode="reflect"), np.pad(v, r, mode="reflect")
        for i in range(a.shape[1]):
            for j in range(a.shape[2]):
                p, q = u[i : i + window, j : j + window].ravel(), v[i : i + window, j : j + window].ravel()
                mp, mq = p.mean(), q.mean()
                vp, vq, cov = ((p - mp) ** 2).mean(), ((q - mq) ** 2).mean(), ((p - mp) * (q - mq)).mean()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("strength", "steps", "n", "times"), [(0.2, 2, 10, [199, 99]), (0.1, 4, 3, [99, 74, 49, 24]), (0.001, 1, 2, [0])])
def test_formula(lab: Lab, strength: float, steps: int, n: int, times: list[int]) -> None:
    means = [np.mean([vary(lab, x.numpy(), i, draw, times, seed=4) for draw in range(n)], axis=0) for i, x in enumerate(lab.x)]
    arguments = {"strength": strength, "steps": steps, "n_variations": n, "seed": 4}
    attack = ReDiffuse(**arguments)
    lab.check(attack, lambda x, i: -((means[i] - x) ** 2).sum())
    assert attack.nfe(1000) == n * steps
    lab.check(ReDiffuse(distance="ssim", **arguments), lambda x, i: wang(means[i], x, 7))
    signal = ReDiffuse(distance="head", **arguments).signal(VariationAPI(lab.diffusion()), lab.x, lab.ids)
    expected = [np.abs(mean - x.numpy()).ravel() for mean, x in zip(means, lab.x, strict=True)]
    np.testing.assert_allclose(signal.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [3, 7, 11])
def test_ssim_is_that_of_wang_et_al(window: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 5, 3, 9, 8))
    values = ssim(torch.from_numpy(a), torch.from_numpy(b), window)
    np.testing.assert_allclose(values.numpy(), [wang(u, v, window) for u, v in zip(a, b, strict=True)], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ssim(torch.from_numpy(a), torch.from_numpy(a), window).numpy(), 1, rtol=1e-12)


def test_one_call_pays_for_all_variations(lab: Lab) -> None:
    calls = []

    class Counting(VariationAPI):
        def vary(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            calls.append(len(x))
            return super().vary(x, *args, **kwargs)  # type: ignore[arg-type]

    access = Counting(lab.diffusion())
    ReDiffuse().score(access, lab.x, lab.ids)
    assert calls == [10 * len(lab.x)]
    assert access.evaluations == ReDiffuse().nfe(1000) * len(lab.x)


def test_the_head_judges_maps_by_those_of_shadows() -> None:
    rng = np.random.default_rng(0)
    keep = rng.random((2, 200)) < 0.5
    maps = np.abs(rng.standard_normal((3, 200, 64)))
    member = np.vstack([keep, rng.random(200) < 0.5])
    maps[member] *= 0.7
    no = np.zeros(200, bool)
    signals = Signals(np.arange(200), maps[2], maps[:2], keep, ~np.zeros_like(keep), no)
    attack = ReDiffuse(distance="head", head=ResNetHead(epochs=10))
    score = attack.judge(signals)
    assert auc(member[2], score)[0] > 0.95
    assert attack.min_shadows == 1
    assert ReDiffuse().min_shadows == 0
    assert np.array_equal(ReDiffuse().judge(signals), maps[2][:, 0])
    assert ReDiffuse(distance="head").judge(signals).shape == (200,)


def test_bad_settings(lab: Lab) -> None:
    for bad in ({"strength": 0}, {"strength": 1.1}, {"steps": 0}, {"n_variations": 0}, {"distance": "l1"}, {"window": 4}, {"window": 1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ReDiffuse(**bad)
    for T in (1, 7):  # 0.2 of 7 timesteps are 1
        with pytest.raises(ConfigError, match="steps=2"):
            ReDiffuse().nfe(T)
    assert ReDiffuse().nfe(10) == 20
    access = VariationAPI(lab.diffusion())
    with pytest.raises(ConfigError, match="window=17: must be below 16 for images of 8x8"):
        ReDiffuse(distance="ssim", window=17).score(access, lab.x, lab.ids)
    with pytest.raises(NotImplementedError):
        ReDiffuse(distance="head").score(access, lab.x, lab.ids)
