from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffmia_exp.attacks import knn
from diffmia_exp.attacks.knn import KNN
from diffmia_exp.errors import ConfigError
from diffmia_exp.features import Network
from diffmia_exp.metrics import auc
from diffmia_exp.threat_models import SamplesOnly
from tests.attacks.conftest import Lab

Plant = Callable[[torch.Tensor], SamplesOnly]
NO_LAB = SimpleNamespace(public=None)


@pytest.fixture
def plant(lab: Lab) -> Plant:
    """Access to a model that is said to generate the given images."""
    return lambda samples: SamplesOnly(lab.diffusion(), sampler=lambda n, steps, seed: samples[:n])


def images(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).double() / 127.5 - 1


def distances(x: torch.Tensor, samples: torch.Tensor) -> np.ndarray:
    return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in samples.double().numpy()] for a in x.numpy()])


@pytest.mark.parametrize("k", [1, 5, 40])
def test_formula(plant: Plant, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    x, samples = images(30, 0), images(40, 1).float()
    ids = torch.arange(30)
    attack = KNN(k=k, n_samples=40)
    attack.prepare(plant(samples), NO_LAB)
    score = attack.score(plant(samples), x, ids)
    expected = [-np.mean(sorted(row)[:k]) for row in distances(x, samples)]
    np.testing.assert_allclose(score.numpy(), expected, rtol=1e-12)
    assert score.dtype == torch.float64
    monkeypatch.setattr(knn, "ENTRIES", 100)  # two rows at a time
    assert torch.equal(attack.score(plant(samples), x, ids), score)
    assert torch.equal(torch.cat([attack.score(plant(samples), x[i : i + 1], ids[i : i + 1]) for i in range(30)]), score)
    assert torch.equal(attack.signal(plant(samples), x, ids), score[:, None])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    attack.prepare(plant(samples[order]), NO_LAB)
    torch.testing.assert_close(attack.score(plant(samples), x, ids), score, rtol=1e-12, atol=0)


def test_planted_copies_are_found(plant: Plant) -> None:
    x = images(60, 0)
    attack = KNN(k=1, n_samples=200)
    attack.prepare(plant(torch.cat([images(180, 1), x[:20]]).float()), NO_LAB)
    assert auc(np.arange(60) < 20, attack.score(plant(x), x, torch.arange(60)).numpy())[0] == 1


def test_it_compares_features(plant: Plant) -> None:
    x, samples = images(5, 0), images(9, 1)
    attack = KNN(k=2, n_samples=9, features=Network(torch.nn.AvgPool2d(4)))
    attack.prepare(plant(samples), NO_LAB)
    pooled = [t.reshape(-1, 2, 4, 2, 4).mean((2, 4)) for t in (x, samples)]
    expected = [-np.mean(sorted(row)[:2]) for row in distances(*pooled)]
    np.testing.assert_allclose(attack.score(plant(samples), x, torch.arange(5)).numpy(), expected, rtol=1e-12)


def test_samples_are_the_target_s_and_paid_once(lab: Lab) -> None:
    attack, access = KNN(k=2, n_samples=8, steps=3, sample_seed=5), SamplesOnly(lab.diffusion(), budget=24)
    attack.prepare(access, NO_LAB)
    assert access.evaluations == attack.nfe_once(1000) == 24
    score = attack.score(access, lab.x, lab.ids)
    assert access.evaluations == 24
    expected = [-np.mean(sorted(row)[:2]) for row in distances(lab.x, lab.diffusion().sample(8, 3, 5))]
    np.testing.assert_allclose(score.numpy(), expected, rtol=1e-12)


def test_bad_settings(lab: Lab) -> None:
    for bad in ({"k": 0}, {"k": 2049}, {"n_samples": 1}, {"steps": 0}, {"sample_seed": -1}, {"features": "pixels"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            KNN(**bad)  # type: ignore[arg-type]
    assert KNN().nfe(50) == 0
    with pytest.raises(ConfigError, match="steps=50"):
        KNN().nfe(49)
    for ask in (KNN().score, KNN().signal):
        with pytest.raises(RuntimeError, match="prepare"):
            ask(SamplesOnly(lab.diffusion()), lab.x, lab.ids)
