"""Defences of the service: what it returns, and how often."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffmia_exp import specs
from diffmia_exp.config import checked
from diffmia_exp.defenses.output_perturbation import OutputPerturbation
from diffmia_exp.defenses.query_limit import QueryLimit
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.experiment import Experiment
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.threat_models import GrayBox, QueryLimitExceeded, ThreatModel, VariationAPI
from tests.attacks.conftest import random_net
from tests.composing import composed

IDS = torch.tensor([5, 3, 2**40, 8, 1])
SIGMA = 0.3


@pytest.fixture(scope="module")
def diffusion() -> Diffusion:
    return Diffusion(random_net(0, (8, 8)), linear(100), image_shape=(1, 8, 8))


def x() -> torch.Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def test_variations_are_noisy_by_id_and_draw(diffusion: Diffusion) -> None:
    plain = VariationAPI(diffusion).vary(x(), IDS, draw=torch.arange(5))
    api = VariationAPI(diffusion, defense=OutputPerturbation(SIGMA))
    noisy = api.vary(x(), IDS, draw=torch.arange(5))
    z = gaussian(derive(0, "answer", 1), IDS, (1, 8, 8), torch.arange(5))
    np.testing.assert_allclose(noisy, np.clip(plain + SIGMA * z, -1, 1), atol=1e-12)
    alone = api.vary(x()[2:3], IDS[2:3], draw=2)
    np.testing.assert_allclose(alone, noisy[2:3], atol=1e-12)
    assert not torch.equal(api.vary(x(), IDS, draw=torch.arange(1, 6)), noisy)


def test_generated_images_are_noisy_and_the_prediction_is_not(diffusion: Diffusion) -> None:
    plain, defended = GrayBox(diffusion), GrayBox(diffusion, defense=OutputPerturbation(SIGMA))
    few, many = defended.sample(3, steps=2), defended.sample(6, steps=2)
    torch.testing.assert_close(few, many[:3])
    clean = plain.sample(6, steps=2)
    inside = clean.abs() < 0.1
    assert 0.2 < float((many - clean)[inside].std()) < 0.4
    assert many.abs().max() <= 1
    assert torch.equal(plain.eps(x(), 3), defended.eps(x(), 3))
    assert not torch.equal(defended.vary(x()[:1], torch.zeros(1).long()), plain.vary(x()[:1], torch.zeros(1).long()))


def test_an_image_is_varied_so_often_and_no_more(diffusion: Diffusion) -> None:
    api = ThreatModel("variation_api").grant(diffusion, VariationAPI, 5, None, QueryLimit(3))
    assert isinstance(api, VariationAPI)
    api.vary(x(), IDS)
    api.vary(x()[[0, 0]], IDS[[0, 0]], draw=torch.tensor([1, 2]))
    spent = api.evaluations
    with pytest.raises(QueryLimitExceeded, match=r"^defense.variations: the attack asked for 4 variations of an image in all, 3 are given"):
        api.vary(x()[:1], IDS[:1], draw=3)
    assert api.evaluations == spent
    api.vary(x()[1:], IDS[1:], draw=1)


def experiment(*overrides: str) -> Experiment:
    e = Experiment(checked(composed("tracking=none", "split.pool=32", "split.n_models=2", *overrides)))
    e.load()
    return e


def keys(attack: str, *overrides: str, host: bool = False) -> Any:
    """The keys of the target's weights, and of the signals of target and shadow."""
    e = experiment(f"attack={attack}", *overrides)
    return specs.key(e, 0), *(e.stores["signals"].key(specs.signals(e, row, e.candidates[0])) for row in (0, 1))


def test_what_depends_on_a_service_is_stored_apart_and_nothing_else() -> None:
    noisy = "defense=output_perturbation"
    assert keys("pia", noisy) == keys("pia")
    plain, defended, naive = keys("rediffuse"), keys("rediffuse", noisy), keys("rediffuse", noisy, "threat_model.shadow_defense=false")
    assert defended[0] == naive[0] == plain[0]
    assert len({plain[1], defended[1], keys("rediffuse", noisy, "defense.sigma=0.2")[1]}) == 3
    assert plain[2] != defended[2]
    assert (defended[1], plain[2]) == (naive[1], naive[2])
    assert keys("degrade_restore", "defense=query_limit") == keys("degrade_restore")
    runs = {
        specs.run_key(experiment("attack=degrade_restore", f"defense={name}")) for name in ("none", "query_limit", "output_perturbation")
    }
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("attack", "key"),
    [
        (["attack=rediffuse"], "attack.n_variations"),
        (["attack=lira", "attack@attack.host=rediffuse", "split.n_models=3"], "attack.host.n_variations"),
        (["attack=rediffuse", "attack.select=shadow", "+attack.grid={n_variations: [1, 10]}"], "attack.n_variations"),
    ],
)
def test_an_attack_that_would_ask_too_often_is_refused(attack: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=10: must be at most 3, the variations of an image that the service gives$"):
        experiment("defense=query_limit", *attack)


def test_a_surrogate_is_the_adversarys_own() -> None:
    experiment("defense=query_limit", "attack=surrogate", "attack@attack.host=rediffuse", "threat_model=samples_only")


@pytest.mark.parametrize(
    "made", [lambda: OutputPerturbation(-0.1), lambda: OutputPerturbation(0), lambda: QueryLimit(0), lambda: QueryLimit(1.5)]
)
def test_settings_are_checked(made: Any) -> None:
    with pytest.raises(ConfigError, match=r"^(sigma|variations)="):
        made()
