from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmia_exp.attacks.monte_carlo import MonteCarlo
from diffmia_exp.errors import ConfigError
from diffmia_exp.metrics import auc
from diffmia_exp.threat_models import SamplesOnly
from tests.attacks.conftest import Lab
from tests.attacks.test_knn import NO_LAB, Plant, distances, images, plant

__all__ = ["plant"]  # a fixture


def reference(x: torch.Tensor, samples: torch.Tensor, quantile: float, scale: float, weight: str) -> np.ndarray:
    among = distances(samples.double(), samples)
    nearest = sorted(min(row[j] for j in range(len(row)) if j != i) for i, row in enumerate(among))
    radius = scale * np.quantile(nearest, quantile)
    scores = []
    for row in distances(x, samples):
        inside = [d for d in row if d <= radius]
        values = [1.0 if weight == "count" else -np.log(max(d / radius, 1e-6)) for d in inside]
        scores.append(sum(values) / len(row))
    return np.array(scores)


@pytest.mark.parametrize("weight", ["count", "log"])
@pytest.mark.parametrize(("quantile", "scale"), [(0.5, 1.0), (0.0, 1.1), (1.0, 1.0), (0.3, 1.3)])
def test_formula(plant: Plant, quantile: float, scale: float, weight: str) -> None:
    x, samples = images(30, 0), images(40, 1).float()
    x[3] = samples[7].double()  # a copy: at distance 0
    ids = torch.arange(30)
    attack = MonteCarlo(quantile, scale, weight, n_samples=40)
    attack.prepare(plant(samples), NO_LAB)
    score = attack.score(plant(samples), x, ids)
    expected = reference(x, samples, quantile, scale, weight)
    assert (expected > 0).sum() >= 1
    np.testing.assert_allclose(score.numpy(), expected, rtol=1e-12)
    assert score.dtype == torch.float64
    assert torch.equal(torch.cat([attack.score(plant(samples), x[i : i + 1], ids[i : i + 1]) for i in range(30)]), score)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    attack.prepare(plant(samples[order]), NO_LAB)
    torch.testing.assert_close(attack.score(plant(samples), x, ids), score, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", ["count", "log"])
def test_planted_copies_are_found(plant: Plant, weight: str) -> None:
    x = images(60, 0)
    attack = MonteCarlo(radius_scale=0.5, weight=weight, n_samples=200)
    attack.prepare(plant(torch.cat([images(180, 1), x[:20]]).float()), NO_LAB)
    assert auc(np.arange(60) < 20, attack.score(plant(x), x, torch.arange(60)).numpy())[0] == 1


@pytest.mark.parametrize("weight", ["count", "log"])
def test_a_model_that_generates_one_image_only(plant: Plant, weight: str) -> None:
    x = images(2, 0)
    attack = MonteCarlo(weight=weight, n_samples=10)
    attack.prepare(plant(x[:1].expand(10, 1, 8, 8)), NO_LAB)
    score = attack.score(plant(x), x, torch.arange(2))
    assert bool(torch.isfinite(score).all())
    assert score[0] > score[1] == 0


def test_bad_settings(lab: Lab) -> None:
    for bad in ({"quantile": 1.1}, {"quantile": -0.1}, {"radius_scale": 0}, {"weight": "linear"}, {"n_samples": 1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            MonteCarlo(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps=50"):
        MonteCarlo().nfe(1)
    assert (MonteCarlo().nfe(1000), MonteCarlo(n_samples=10, steps=3).nfe_once(1000)) == (0, 30)
    with pytest.raises(RuntimeError, match="prepare"):
        MonteCarlo().score(SamplesOnly(lab.diffusion()), lab.x, lab.ids)
