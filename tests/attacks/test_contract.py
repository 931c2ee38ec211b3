"""What every attack promises, for every conf/attack/*.yaml."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffmia_exp import attacks, lit
from diffmia_exp.attacks.base import Attack
from diffmia_exp.config import build
from diffmia_exp.data import digits
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.metrics import auc
from diffmia_exp.recipe import Recipe, TrainerOptions
from diffmia_exp.threat_models import SamplesOnly, WhiteBox
from tests.attacks.conftest import random_net
from tests.composing import composed, names

ATTACKS = names("attack")
T = 1000


def built(name: str) -> Attack:
    return build("attack", composed(f"attack={name}")["attack"])


def pixels(n: int, start: int = 0) -> np.ndarray:
    return digits().take(np.arange(start, start + n))


def as_images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).double() / 127.5 - 1


class OnlyGranted:
    """The access object with nothing but its public names; it remembers which were used."""

    def __init__(self, access: SamplesOnly) -> None:
        object.__setattr__(self, "_Hidden__access", access)
        object.__setattr__(self, "used", set())

    def __getattribute__(self, name: str) -> Any:
        if name == "used":
            return object.__getattribute__(self, name)
        if name.startswith("_"):
            raise AssertionError(f"reached for {name}, past the access granted")
        self.used.add(name)
        return getattr(object.__getattribute__(self, "_Hidden__access"), name)


@pytest.fixture(scope="module")
def target() -> Diffusion:
    return Diffusion(random_net(0), linear(T), image_shape=(1, 8, 8))


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    return as_images(pixels(70)), torch.arange(70)


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    """A model that has learned 16 images by heart: each seen 2,400 times, weights averaged.

    Fewer draws will not do for SecMI. Its error is the change of the prediction between neighbouring timesteps; until the images
    are learned (500 steps of 16 images, say) that says how smooth the network is, and members may well score lower.
    """
    folder = tmp_path_factory.mktemp("memorised")
    diffusion = Diffusion(random_net(0), linear(T))
    recipe = Recipe(steps=600, batch_size=64, lr=3e-3, warmup_steps=20)
    lit.train(folder, diffusion, pixels(16), recipe, TrainerOptions(accelerator="cpu"), seed=0)
    diffusion.net.load_state_dict(load_file(folder / "ema.safetensors"))
    diffusion.eval()
    return diffusion


def test_every_attack_file_has_a_config() -> None:
    files = {f.stem for f in Path(attacks.__file__).parent.glob("*.py")} - {"__init__", "base"}
    targets = {composed(f"attack={name}")["attack"]["_target_"].split(".")[-2] for name in ATTACKS}
    assert files == targets


@pytest.mark.parametrize("name", ATTACKS)
def test_its_config_names_every_argument(name: str) -> None:
    config = composed(f"attack={name}")["attack"]
    attack = built(name)
    assert config["name"] == name
    assert set(config) - {"name", "_target_"} == set(inspect.signature(type(attack)).parameters)
    assert "arXiv" in (inspect.getmodule(type(attack)).__doc__ or "")
    assert "score = -" in (type(attack).__doc__ or "") or "Otherwise as" in (type(attack).__doc__ or "")


@pytest.mark.parametrize("name", ATTACKS)
def test_it_uses_its_access_and_nothing_else(name: str, target: Diffusion, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    attack = built(name)
    proxy = OnlyGranted(attack.access(target))
    attack.score(proxy, images[0][:2], images[1][:2])
    assert proxy.used, "an attack that asks the target nothing"
    if attack.access is not WhiteBox:
        assert not proxy.used & {"diffusion", "count"}


@pytest.mark.parametrize("name", ATTACKS)
def test_it_costs_what_it_says(name: str, target: Diffusion, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    attack = built(name)
    access = attack.access(target, budget=3 * attack.nfe(T))
    attack.score(access, images[0][:3], images[1][:3])
    assert access.evaluations == 3 * attack.nfe(T)
    with pytest.raises(ConfigError):
        attack.nfe(1)  # a schedule of one step is too short for every default


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_score_depends_on_its_image_alone(
    name: str, dtype: torch.dtype, tolerance: float, target: Diffusion, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    attack, (x, ids) = built(name), images
    net = target.net if dtype == torch.float32 else copy.deepcopy(target.net).double()
    access = attack.access(Diffusion(net, linear(T)))
    together = attack.score(access, x, ids)
    assert together.shape == (len(x),)
    assert together.dtype == torch.float64
    assert bool(torch.isfinite(together).all())
    assert not together.requires_grad
    assert torch.equal(together, attack.score(access, x, ids)), "not deterministic"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attack.score(access, x[order], ids[order]), together[order], rtol=tolerance, atol=0)
    for size, n in ((1, 2), (7, 7)):
        some = torch.cat([attack.score(access, x[i : i + size], ids[i : i + size]) for i in range(0, n, size)])
        torch.testing.assert_close(some, together[:n], rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_untrained_target_betrays_nobody(name: str) -> None:
    """Over 20 seeds of net and split, the 95% interval of the AUC covers 1/2 at least 18 times."""
    attack = built(name)
    covered = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ids = rng.permutation(1797)[:64]
        is_member = rng.random(64) < 0.5
        access = attack.access(Diffusion(random_net(seed), linear(T)))
        score = attack.score(access, as_images(digits().take(ids)), torch.from_numpy(ids))
        low, high = auc(is_member, score.numpy())[1]
        covered += low <= 0.5 <= high
    assert covered >= 18


@pytest.mark.parametrize("name", ATTACKS)
def test_a_memorised_image_scores_higher(name: str, memorised: Diffusion) -> None:
    attack = built(name)
    x = as_images(np.concatenate([pixels(16), pixels(64, start=100)]))
    ids = torch.cat([torch.arange(16), torch.arange(100, 164)])
    score = attack.score(attack.access(memorised), x, ids)
    area, (low, _) = auc(np.arange(80) < 16, score.numpy())
    assert low > 0.5, f"AUC {area:.3f}, lower end {low:.3f}"
