from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmia_exp.attacks.degrade_restore import DegradeRestore
from diffmia_exp.errors import ConfigError
from diffmia_exp.features import Network
from diffmia_exp.noise import derive
from diffmia_exp.noise import gaussian as noise_of
from tests.attacks.conftest import Lab
from tests.attacks.test_rediffuse import vary


def blurred(x: np.ndarray, factor: int, interpolation: str) -> np.ndarray:
    """Means of blocks, put back pixel by pixel."""
    _, h, w = x.shape
    small = np.array([[x[0, i : i + factor, j : j + factor].mean() for j in range(0, w, factor)] for i in range(0, h, factor)])
    n, out = len(small), np.empty_like(x)

    def weights(pixel: int, size: int) -> list[tuple[int, float]]:
        if interpolation == "nearest":
            return [(pixel * n // size, 1.0)]
        centre = max((pixel + 0.5) * n / size - 0.5, 0)
        low = int(centre)
        return [(low, 1 - (centre - low)), (min(low + 1, n - 1), centre - low)]

    for i in range(h):
        for j in range(w):
            out[0, i, j] = sum(u * v * small[p, q] for p, u in weights(i, h) for q, v in weights(j, w))
    return out


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("factor", [2, 3, 8])
def test_blur(lab: Lab, factor: int, interpolation: str) -> None:
    def reference(x: np.ndarray, n: int) -> float:
        return -((vary(lab, blurred(x, factor, interpolation), n, 0, [199, 99], seed=2) - x) ** 2).sum()

    attack = DegradeRestore("blur", factor, interpolation=interpolation, seed=2)
    lab.check(attack, reference)
    assert attack.nfe(1000) == 2


def test_noise(lab: Lab) -> None:
    def reference(x: np.ndarray, n: int) -> float:
        eps = noise_of(derive(3, "score"), lab.ids[n : n + 1], (1, 8, 8))[0].numpy()
        return -((vary(lab, np.clip(x + 0.7 * eps, -1, 1), n, 0, [99], seed=3) - x) ** 2).sum()

    lab.check(DegradeRestore(degrade="noise", sigma=0.7, strength=0.1, steps=1, seed=3), reference)


def test_it_compares_features(lab: Lab) -> None:
    def rows(x: np.ndarray) -> np.ndarray:
        return x[0].reshape(4, 2, 4, 2).mean((1, 3))

    def reference(x: np.ndarray, n: int) -> float:
        return -((rows(vary(lab, blurred(x, 2, "bilinear"), n, 0, [199, 99])) - rows(x)) ** 2).sum()

    lab.check(DegradeRestore("blur", features=Network(torch.nn.AvgPool2d(2))), reference)


def test_bad_settings(lab: Lab) -> None:
    settings = (
        {"degrade": "jpeg"},
        {"factor": 1},
        {"interpolation": "cubic"},
        {"sigma": 0},
        {"strength": 2},
        {"steps": 0},
        {"features": 1},
    )
    for bad in settings:
        with pytest.raises(ConfigError, match=next(iter(bad))):
            DegradeRestore(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps=2"):
        DegradeRestore().nfe(1)
    with pytest.raises(ConfigError, match="factor=9: must be at most 8"):
        DegradeRestore("blur", factor=9).check((1, 8, 8))
