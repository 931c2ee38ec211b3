from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from diffmia_exp.attacks.discriminator import Discriminator, log_odds, perceptron
from diffmia_exp.data import Images
from diffmia_exp.errors import ConfigError
from diffmia_exp.metrics import auc
from diffmia_exp.threat_models import SamplesOnly
from tests.attacks.conftest import Lab
from tests.attacks.test_knn import Plant, images, plant

__all__ = ["plant"]  # a fixture


def lab_with(public: torch.Tensor) -> SimpleNamespace:
    pixels = ((public + 1) * 127.5).round().byte().numpy()
    return SimpleNamespace(public=Images(pixels, np.arange(len(pixels))))


def bright(n: int, seed: int) -> torch.Tensor:
    """Images whose upper half is a little brighter than that of `images`."""
    x = images(n, seed)
    x[:, :, :4] = (x[:, :, :4] + 0.4).clamp(-1, 1)
    return x


@pytest.mark.parametrize("classifier", [None, LogisticRegression()])
def test_it_tells_what_looks_generated(plant: Plant, classifier: object) -> None:
    attack = Discriminator(classifier, n_samples=300)
    access = plant(bright(300, 0).float())
    attack.prepare(access, lab_with(images(100, 1)))
    x = torch.cat([bright(50, 2), images(50, 3)])
    score = attack.score(access, x, torch.arange(100))
    assert score.dtype == torch.float64
    assert bool(torch.isfinite(score).all())
    assert len(score.unique()) == 100  # not rounded to one probability
    assert auc(np.arange(100) < 50, score.numpy())[0] > 0.95
    assert torch.equal(attack.score(access, x, torch.arange(100)), score)
    assert torch.equal(attack.score(access, x.flip(0), torch.arange(100)), score.flip(0))
    for size in (1, 7):
        assert torch.equal(torch.cat([attack.score(access, some, torch.arange(len(some))) for some in x.split(size)]), score)
    again = Discriminator(classifier, n_samples=300)
    again.prepare(access, lab_with(images(100, 1)))
    assert torch.equal(again.score(access, x, torch.arange(100)), score), "not deterministic"


def test_formula(plant: Plant) -> None:
    """Of a logistic regression: its log-odds are linear. The public images, a third as many, are used three times."""
    generated, public, x = bright(300, 0).float(), images(100, 1), images(20, 2)
    attack = Discriminator(LogisticRegression(), n_samples=300)
    attack.prepare(plant(generated), lab_with(public))
    both = np.concatenate([generated.double().numpy().reshape(300, -1)] + 3 * [public.numpy().reshape(100, -1)])
    model = LogisticRegression().fit(both, [1] * 300 + [0] * 300)
    expected = [sum(a * w for a, w in zip(row.ravel(), model.coef_[0], strict=True)) + model.intercept_[0] for row in x.numpy()]
    np.testing.assert_allclose(attack.score(plant(x), x, torch.arange(20)).numpy(), expected, rtol=1e-6, atol=1e-6)  # as it converges


def test_log_odds_of_probabilities_stay_finite() -> None:
    for p, expected in ((0.25, np.log(1 / 3)), (0.5, 0), (1.0, np.log(2**53)), (0.0, -np.log(2**53))):
        classifier = SimpleNamespace(predict_proba=lambda x, p=p: np.array([[1 - p, p]]))
        assert log_odds(classifier, np.zeros((1, 2))) == pytest.approx(expected, rel=1e-12)


def test_the_config_s_classifier_is_the_default(plant: Plant) -> None:
    from omegaconf import OmegaConf

    from diffmia_exp.config import build
    from tests.composing import CONF

    config = OmegaConf.to_container(
        OmegaConf.merge({"seed": 0}, {"attack": OmegaConf.load(CONF / "attack/discriminator.yaml")}), resolve=True
    )
    classifier = build("attack", config["attack"]).classifier  # type: ignore[index,call-overload]
    assert str(classifier.named_steps["mlpclassifier"].alpha) == str(perceptron().named_steps["mlpclassifier"].alpha)
    x = images(40, 0)
    scores = []
    for one in (classifier, None):
        attack = Discriminator(one, n_samples=64)
        attack.prepare(plant(bright(64, 1)), lab_with(images(64, 2)))
        scores.append(attack.score(plant(x), x, torch.arange(40)))
    assert torch.equal(*scores)


def test_bad_settings(lab: Lab) -> None:
    for bad in ({"classifier": "svm"}, {"n_samples": 0}, {"steps": 0}, {"features": 1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Discriminator(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps=50"):
        Discriminator().nfe(1)
    assert Discriminator.min_public == 64
    with pytest.raises(RuntimeError, match="prepare"):
        Discriminator().score(SamplesOnly(lab.diffusion()), lab.x, lab.ids)
