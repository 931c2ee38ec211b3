"""What every attack promises, for every conf/attack/*.yaml and conf/attack/plugin/*.yaml."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from diffmia_exp import attacks, lit, selection
from diffmia_exp.attacks.base import Attack
from diffmia_exp.data import Images, digits
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.metrics import auc
from diffmia_exp.recipe import Recipe, TrainerOptions
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import SamplesOnly, WhiteBox
from tests.attacks.conftest import random_net
from tests.composing import CONF, composed, names

PLUGINS = [f"pia attack/plugin={name}" for name in names("attack/plugin")]
ATTACKS = names("attack") + PLUGINS
T = 1000
# Smaller than their defaults, to be quick. Budgets, not settings that decide what is computed.
QUICK = {
    "knn": ["attack.n_samples=64", "attack.steps=5"],
    "monte_carlo": ["attack.n_samples=64", "attack.steps=5"],
    "discriminator": ["attack.n_samples=64", "attack.steps=5"],
    "surrogate": ["attack.n_samples=64", "attack.steps=5", "attack.host.stride=100"],
    "secmi_nns": ["+attack.head.epochs=3"],
    "quantile": ["attack.bags=3"],
    "trajectory": ["attack.stride=50"],
    "likelihood": ["attack.tolerance=1.0"],
}
SAMPLES = {name: ["attack.n_samples=256", "attack.steps=10"] for name in ("knn", "monte_carlo", "discriminator", "surrogate")}


def config(name: str, quick: bool = True) -> dict[str, Any]:
    return composed(*f"attack={name}".split(), *(QUICK.get(name, []) if quick else []))["attack"]


def built(name: str, quick: bool = True) -> Attack:
    return selection.candidates(config(name, quick))[0].attack


def pixels(n: int, start: int = 0) -> np.ndarray:
    return digits().take(np.arange(start, start + n))


def as_images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).double() / 127.5 - 1


# The others' signals are their hosts'.
MEASURING = [name for name in ATTACKS if not getattr(built(name), "relays", False)]


class AtHome:
    """The adversary's own means: public images, and a way to train."""

    def __init__(self, train: Callable[[np.ndarray], Diffusion]) -> None:
        self.public = Images(pixels(200, start=1500), np.arange(1500, 1700))
        self.train = train


def untrained(seed: int = 77) -> Diffusion:
    return Diffusion(random_net(seed, (8, 16)), linear(T), image_shape=(1, 8, 8))


HOME = AtHome(lambda _: untrained())


def measured(attack: Attack, diffusion: Diffusion, x: torch.Tensor, ids: torch.Tensor, home: AtHome = HOME) -> np.ndarray:
    access = attack.access(diffusion)
    attack.prepare(access, home)
    return attack.signal(access, x, ids).numpy()


def with_public(attack: Attack, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not attack.min_public:
        return x, ids
    return torch.cat([x, as_images(HOME.public.pixels)]), torch.cat([ids, torch.from_numpy(HOME.public.sample_id)])


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
    return untrained(0)


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    return as_images(pixels(70)), torch.arange(70)


def test_every_attack_file_has_a_config() -> None:
    folder = Path(attacks.__file__).parent
    files = {f.stem for f in [*folder.glob("*.py"), *folder.glob("plugins/*.py")]} - {"__init__", "base"}
    chosen = [config(name)["_target_"] for name in names("attack")] + [config(name)["plugin"]["_target_"] for name in PLUGINS]
    assert files == {target.split(".")[-2] for target in chosen}


def test_every_attack_is_documented() -> None:
    text = (CONF.parent / "docs" / "attacks.md").read_text()
    for name in names("attack"):
        assert f"\n## {name}\n" in text, name
        assert f"| `{name}` |" in text, name
    for name in names("attack/plugin"):
        assert f"| `{name}` |" in text, name


@pytest.mark.parametrize("name", ATTACKS)
def test_its_config_names_every_argument(name: str) -> None:
    attack, given = built(name), config(name, quick=False)
    if name in PLUGINS:
        given = given["plugin"]
        assert given["name"] == name.split("=")[1]
        assert set(given) - {"name", "_target_"} == set(inspect.signature(type(attack)).parameters) - {"host"}
    else:
        assert given["name"] == name
        assert set(given) - {*selection.ABOUT, "plugin", "_target_"} == set(inspect.signature(type(attack)).parameters)
        assert set(given.get("grid", {})) <= set(given)
    assert "arXiv" in (inspect.getmodule(type(attack)).__doc__ or "")
    assert "score = " in (type(attack).__doc__ or "") or "Otherwise as" in (type(attack).__doc__ or "")


@pytest.mark.parametrize("name", MEASURING)
def test_it_uses_its_access_and_nothing_else(name: str, target: Diffusion, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    attack = built(name)
    proxy = OnlyGranted(attack.access(target))
    attack.prepare(proxy, HOME)
    attack.signal(proxy, images[0][:2], images[1][:2])
    assert proxy.used, "an attack that asks the target nothing"
    if attack.access is not WhiteBox:
        assert not proxy.used & {"diffusion", "count"}


@pytest.mark.parametrize("name", ATTACKS)
def test_it_costs_what_it_says(name: str, target: Diffusion, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    attack = built(name)
    stated = 3 * attack.nfe(T) + attack.nfe_once(T)
    access = attack.access(target, budget=stated)
    attack.prepare(access, HOME)
    attack.signal(access, images[0][:3], images[1][:3])
    if name == "likelihood":  # its solver takes as many steps as the tolerance asks for; what it states is the bound
        assert 0 < access.evaluations <= stated
    else:
        assert access.evaluations == stated
    with pytest.raises(ConfigError):
        attack.nfe(1)  # a schedule of one step is too short for every default


@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_signal_depends_on_its_image_alone(
    name: str, dtype: torch.dtype, tolerance: float, target: Diffusion, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    attack = built(name)
    x, ids = images if dtype == torch.float32 else (images[0][:6], images[1][:6])  # 70 are more than one block
    net = target.net if dtype == torch.float32 else copy.deepcopy(target.net).double()
    access = attack.access(Diffusion(net, linear(T), image_shape=(1, 8, 8)))
    attack.prepare(access, HOME)
    together = attack.signal(access, x, ids)
    assert together.shape[0] == len(x)
    assert together.ndim == 2
    assert together.dtype == torch.float64
    assert bool(torch.isfinite(together).all())
    assert not together.requires_grad

    def close(some: torch.Tensor, expected: torch.Tensor) -> None:
        # Relative to each signal's size over the images: a pixel of an error map may be all but 0.
        scale = expected.abs().mean(0)
        assert bool(((some - expected).abs() <= tolerance * torch.maximum(scale, expected.abs())).all())

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    close(attack.signal(access, x[order], ids[order]), together[order])
    one, others = (attack.signal(access, x[at], ids[at]) for at in (slice(0, 1), slice(1, 6)))
    close(torch.cat([one, others]), together[:6])
    assert torch.equal(one, attack.signal(access, x[:1], ids[:1])), "not deterministic"


@pytest.mark.parametrize("name", ATTACKS)
def test_a_judgement_depends_on_the_target_s_other_images_in_nothing(name: str) -> None:
    """With other signals of the target on half of the images, the scores of the other half stay as they were."""
    attack, _, ids, signals = rehearsal(name, seed=0)
    score = attack.judge(signals)
    assert score.shape == (len(ids),)
    assert score.dtype == np.float64
    assert np.array_equal(score, attack.judge(signals)), "not deterministic"
    changed = signals.target.copy()
    changed[:20] *= 1.5
    again = attack.judge(Signals(signals.sample_id, changed, signals.shadows, signals.keep, signals.pool, signals.public))
    np.testing.assert_allclose(again[20:], score[20:], rtol=1e-12)
    order = np.random.default_rng(0).permutation(len(ids))
    if not attack.min_public and "head" not in attack.judging:  # what is trained on images in another order is another classifier
        np.testing.assert_allclose(attack.judge(signals.take(order)), score[order], rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in ATTACKS if not (built(name).compares and built(name).min_shadows)])
def test_an_attack_that_does_not_compare_needs_no_shadow_s_view_of_an_image(name: str) -> None:
    attack, _, ids, signals = rehearsal(name, seed=0)
    again = signals.take(np.r_[np.arange(len(ids)), 0, 1, 2])
    shadows, keep, pool = again.shadows.copy(), again.keep.copy(), again.pool.copy()
    shadows[:, -3:], keep[:, -3:], pool[:, -3:] = np.nan, False, False
    score = attack.judge(Signals(again.sample_id, again.target, shadows, keep, pool, again.public))
    np.testing.assert_allclose(score[-3:], score[:3], rtol=1e-12)
    np.testing.assert_allclose(score[:-3], attack.judge(signals), rtol=1e-12)


SHADOWS = 4
_shadow_signals: dict[str, np.ndarray] = {}


def rehearsal(name: str, seed: int) -> tuple[Attack, torch.Tensor, torch.Tensor, Signals]:
    """An attack on an untrained net of this seed, with four other untrained nets as shadows."""
    attack = built(name)
    ids = torch.from_numpy(np.random.default_rng(0).permutation(1400)[:64])
    n = len(ids)
    x, ids = with_public(attack, as_images(digits().take(ids.numpy())), ids)
    count = SHADOWS if attack.min_shadows else 0
    if name not in _shadow_signals:
        shadows = [measured(attack, untrained(1000 + k), x, ids) for k in range(count)]
        _shadow_signals[name] = np.stack(shadows) if shadows else np.empty((0, len(ids), 1))
    public = np.arange(len(ids)) >= n
    pool = np.tile(~public, (count, 1))
    keep = (np.random.default_rng(1).random((count, len(ids))) < 0.5) & pool
    return attack, x, ids, Signals(ids.numpy(), measured(attack, untrained(seed), x, ids), _shadow_signals[name], keep, pool, public)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_untrained_target_betrays_nobody(name: str) -> None:
    """Over 2 nets with 100 random splits each, the 95% interval of the AUC covers 1/2 in at least 90%."""
    covered = 0
    for seed in range(2):
        attack, _, _, signals = rehearsal(name, seed)
        pool = ~signals.public
        score = attack.judge(signals)[pool]
        for draw in range(100):
            is_member = np.random.default_rng([seed, draw]).random(len(score)) < 0.5
            low, high = auc(is_member, score)[1]
            covered += low <= 0.5 <= high
    assert covered >= 180


def trained(folder: Path, members: np.ndarray, seed: int, steps: int) -> Diffusion:
    diffusion = Diffusion(random_net(seed), linear(T), image_shape=(1, 8, 8))
    folder.mkdir()
    recipe = Recipe(steps=steps, batch_size=64, lr=3e-3, warmup_steps=20)
    lit.train(folder, diffusion, members, recipe, TrainerOptions(accelerator="cpu"), seed=seed)
    diffusion.net.load_state_dict(load_file(folder / "ema.safetensors"))
    diffusion.eval()
    return diffusion


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Diffusion], np.ndarray, AtHome]:
    """A model that learned 16 of 32 images by heart, seen 2,400 times each, weights averaged, and two shadows of a quarter of its steps.

    Fewer draws will not do for SecMI. Its error is the change of the prediction between neighbouring timesteps; until the images
    are learned (500 steps of 16 images, say) that says how smooth the network is, and members may well score lower.
    """
    keep = np.zeros((3, 32), dtype=bool)
    for row in range(3):
        keep[row, np.random.default_rng(row).permutation(32)[:16]] = True
    folder, pool = tmp_path_factory.mktemp("memorised"), pixels(32)
    models = [trained(folder / str(row), pool[keep[row]], row, steps) for row, steps in enumerate((600, 150, 150))]
    return models, keep, AtHome(lambda samples: trained(folder / "surrogate", samples, 9, 150))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_memorised_image_scores_higher(name: str, memorised: tuple[list[Diffusion], np.ndarray, AtHome]) -> None:
    models, keep, home = memorised
    attack = selection.candidates(composed(*f"attack={name}".split(), *SAMPLES.get(name, []))["attack"])[0].attack
    x = as_images(np.concatenate([pixels(32), pixels(64, start=100)]))
    ids = torch.cat([torch.arange(32), torch.arange(100, 164)])
    n = len(ids)
    x, ids = with_public(attack, x, ids)
    signals = [measured(attack, model, x, ids, home) for model in (models if attack.min_shadows else models[:1])]
    public = np.arange(len(ids)) >= n
    kept = np.zeros((len(signals), len(ids)), dtype=bool)
    kept[:, :32] = keep[: len(signals)]
    pool = np.tile(~public, (len(signals), 1))
    both = Signals(ids.numpy(), signals[0], np.stack(signals)[1:], kept[1:], pool[1:], public)
    score = attack.judge(both)[:n]
    above = stats.mannwhitneyu(score[kept[0][:n]], score[~kept[0][:n]], alternative="greater")
    assert above.pvalue < 0.025, f"AUC {above.statistic / (16 * (n - 16)):.3f}, p-value {above.pvalue:.4f}"
