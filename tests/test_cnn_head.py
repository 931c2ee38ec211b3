from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone

from diffmia_exp.cnn_head import ResNetHead
from diffmia_exp.errors import ConfigError
from diffmia_exp.metrics import auc


def toy(seed: int, n: int = 400, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Error maps of the same size, but a member's error lies in the left half: nothing that their sum shows."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.5
    maps = np.abs(rng.standard_cauchy((n, channels, 8, 8)))
    maps[labels, :, :, :4] *= 3
    maps[~labels, :, :, 4:] *= 3
    return maps.reshape(n, -1), labels


@pytest.mark.parametrize("channels", [1, 3])
def test_it_learns_what_is_to_be_learned(channels: int) -> None:
    head = clone(ResNetHead(channels=channels, epochs=10, batch_size=64)).fit(*toy(0, channels=channels))
    maps, labels = toy(1, channels=channels)
    p = head.predict_proba(maps)
    assert p.shape == (400, 2)
    assert p.dtype == np.float64
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)
    assert auc(labels, p[:, 1])[0] > 0.95
    assert (head.predict(maps) == labels).mean() > 0.85
    assert list(head.classes_) == [0, 1]


def test_it_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    data, maps = toy(0, 100), toy(1)[0]
    before = torch.get_rng_state()
    first = ResNetHead(epochs=2).fit(*data).predict_proba(maps)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    with torch.inference_mode():  # as while scoring
        again = ResNetHead(epochs=2).fit(*data).predict_proba(maps)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, ResNetHead(epochs=2, seed=1).fit(*data).predict_proba(maps))


def test_a_prediction_depends_on_its_map_alone() -> None:
    head, maps = ResNetHead(epochs=2).fit(*toy(0, 100)), toy(1)[0]
    together = head.predict_proba(maps)
    order = np.random.default_rng(0).permutation(len(maps))
    np.testing.assert_allclose(head.predict_proba(maps[order]), together[order], rtol=1e-10)
    np.testing.assert_allclose(np.concatenate([head.predict_proba(maps[i : i + 1]) for i in range(5)]), together[:5], rtol=1e-10)


def test_extremes_stay_finite() -> None:
    rng = np.random.default_rng(0)
    for maps in (np.zeros((9, 16)), np.full((9, 16), 1e300), rng.standard_normal((9, 1)), rng.standard_normal((1, 9))):
        head = ResNetHead(epochs=1, batch_size=4).fit(maps, np.arange(len(maps)) % 2 == 0)
        assert np.isfinite(head.predict_proba(maps)).all()


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="channels=2"):
        ResNetHead(channels=2).fit(*toy(0, 4))
    for bad in ({"epochs": 0}, {"lr": 0}, {"channels": "x"}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ResNetHead(**bad)
    assert clone(ResNetHead(lr=1)).lr == 1
