"""Defences that change settings: dropout of the network, weight decay of the recipe."""

from __future__ import annotations

import pytest
import torch

from diffmia_exp.config import build, checked
from diffmia_exp.defenses.dropout import Dropout
from diffmia_exp.errors import ConfigError
from diffmia_exp.experiment import Experiment
from tests.composing import composed


def experiment(*overrides: str) -> Experiment:
    return Experiment(checked(composed("tracking=none", "split.n_models=2", "attack.select=shadow", *overrides)))


def test_dropout_is_in_training_and_not_after() -> None:
    e = experiment("defense=dropout")
    torch.manual_seed(0)
    net = build("model", e.group("model"))
    bare = build("model", e.group("model") | {"dropout": 0.0})
    bare.load_state_dict(net.state_dict())
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 200, 999])
    with torch.no_grad():
        assert not torch.equal(net.train()(x, t).sample, net(x, t).sample)
        assert torch.equal(net.eval()(x, t).sample, bare.eval()(x, t).sample)
    assert e.config["model"]["dropout"] == 0.0


def test_a_network_without_dropout_is_refused() -> None:
    settings = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}
    with pytest.raises(ConfigError, match=r"^model._target_=torch.nn.Conv2d: has no setting `dropout`, which defense=dropout needs"):
        Dropout().model(settings)


@pytest.mark.parametrize(("defense", "recipe"), [("none", 0.0), ("weight_decay", 0.1)])
def test_weight_decay_is_the_recipes(defense: str, recipe: float) -> None:
    e = experiment(f"defense={defense}")
    assert e.recipe.weight_decay == e.shadow_recipe.weight_decay == recipe


def test_an_adversary_who_does_not_know_of_it_trains_its_shadows_without() -> None:
    e = experiment("defense=weight_decay", "threat_model.shadow_defense=false")
    assert (e.recipe.weight_decay, e.shadow_recipe.weight_decay) == (0.1, 0.0)
