"""Class-conditional models: asked under the right label, trained under labels that are sometimes dropped, attacked with and without."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from diffmia_exp import lit, runs, specs
from diffmia_exp.attacks.base import Attack
from diffmia_exp.attacks.gsa1 import GSA1
from diffmia_exp.attacks.loss import Loss
from diffmia_exp.attacks.rediffuse import ReDiffuse
from diffmia_exp.attacks.secmi import SecMI
from diffmia_exp.attacks.surrogate import Surrogate
from diffmia_exp.attacks.tracing_roots import TracingRoots
from diffmia_exp.config import checked
from diffmia_exp.data import Images, Pixels, digits
from diffmia_exp.diffusion import Diffusion, given, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.evaluation import Evaluation, measure
from diffmia_exp.experiment import Experiment
from diffmia_exp.lit import LitDiffusion
from diffmia_exp.pipeline import run
from diffmia_exp.recipe import Recipe, TrainerOptions
from diffmia_exp.scores import ScoreTable
from tests.attacks.conftest import random_net
from tests.composing import composed

C = 3  # classes; the null label is the next number
SHAPE = (1, 8, 8)


def model(dtype: torch.dtype = torch.float64, seed: int = 0) -> Diffusion:
    return Diffusion(random_net(seed, (8, 16), C).to(dtype), linear(1000), image_shape=SHAPE, n_classes=C)


def some(n: int, seed: int = 0) -> Images:
    """Digits with labels that have nothing to do with them, in no order, one class more frequent than the others."""
    rng = np.random.default_rng(seed)
    return Images(digits().take(np.arange(n)), 100 + rng.permutation(n), rng.permutation(np.arange(n) % 4 % C))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- asking


@pytest.mark.parametrize(("label", "expected"), [(2, [2] * 4), (torch.tensor([0, 2, 1, C]), [0, 2, 1, C]), (None, [C] * 4)])
def test_the_net_is_asked_under_the_label_that_is_given(label: Any, expected: list[int]) -> None:
    diffusion, x, t = model(), noise(4, *SHAPE), torch.tensor([0, 5, 500, 999])
    with torch.no_grad(), given(label):
        found = diffusion.eps(x, t)
        one_by_one = [diffusion.net(x[i : i + 1], t[i], torch.tensor([expected[i]])).sample[0] for i in range(4)]
    torch.testing.assert_close(found, torch.stack(one_by_one), rtol=0, atol=1e-12)


def test_outside_it_is_the_null_label_again_whatever_happened_inside() -> None:
    diffusion, x = model(), noise(2, *SHAPE)

    def eps() -> Tensor:
        return diffusion.eps(x, 100).detach()

    null = eps()
    with given(0):
        with pytest.raises(KeyError), given(1):
            raise KeyError
        with given(1):
            one = eps()
        zero = eps()
    assert torch.equal(eps(), null)
    assert min(float((a - b).abs().max()) for a, b in ((null, zero), (zero, one), (one, null))) > 1e-3


def test_an_unconditional_model_does_not_heed_labels() -> None:
    diffusion, x = Diffusion(random_net(0, (8, 16)).double(), linear(1000)), noise(2, *SHAPE)
    plain = diffusion.eps(x, 100)
    with given(1):
        assert torch.equal(diffusion.eps(x, 100), plain)


def test_samples_are_drawn_under_each_class_in_turn() -> None:
    diffusion = model()
    drawn = diffusion.sample(7, 3, seed=5)
    assert torch.equal(diffusion.sample(7, 3, seed=5, labels=torch.arange(7) % C), drawn)
    torch.testing.assert_close(diffusion.sample(5, 3, seed=5, batch_size=2), drawn[:5], rtol=0, atol=1e-5)
    for label in range(C):
        of_one = diffusion.sample(7, 3, seed=5, labels=torch.full((7,), label))
        apart = (of_one - drawn).abs().amax((1, 2, 3))
        assert [bool(gap < 1e-5) for gap in apart] == [i % C == label for i in range(7)]


# --- measuring


class Trained:
    """At home: a surrogate, itself conditional."""

    def train(self, pixels: Pixels) -> Diffusion:
        return model(seed=9)


MEASURED: dict[str, tuple[Attack, int]] = {
    "loss": (Loss(t=100, n_noises=2), 5),
    "secmi": (SecMI(t=100, stride=50), 5),
    "rediffuse": (ReDiffuse(n_variations=3), 4),
    "gsa1": (GSA1(n_timesteps=2), 4),
    "tracing_roots": (TracingRoots(n_timesteps=2), 4),
    "surrogate": (Surrogate(Loss(t=100), n_samples=4, steps=2), 4),
}


def signals(attack: Attack, images: Images, batch_size: int = 256, dtype: torch.dtype = torch.float64) -> np.ndarray:
    access = attack.access(model(dtype))
    return measure(attack, access, Trained(), images, Evaluation(batch_size=batch_size), torch.device("cpu"), "")[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MEASURED)
def test_measuring_class_by_class_equals_asking_for_each_image_alone(name: str) -> None:
    """Whatever rows an attack stacks, and whether it asks the target or a model of its own."""
    attack, n = MEASURED[name]
    images = some(n)
    assert images.labels is not None
    access = attack.access(model())
    attack.prepare(access, Trained())  # type: ignore[arg-type]

    def alone(i: int, label: int) -> Tensor:
        x = torch.from_numpy(images.pixels[i : i + 1]).double() / 127.5 - 1
        with given(label):
            return attack.signal(access, x, torch.tensor([int(images.sample_id[i])]))[0].detach()

    found = signals(attack, images)
    expected = torch.stack([alone(i, int(images.labels[i])) for i in range(n)]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())
    wrong = torch.stack([alone(i, int(images.labels[i] + 1) % C) for i in range(n)]).numpy()
    assert (np.abs(found - wrong).max(1) > 1e-6 * np.abs(found).max(1)).all(), "the label makes no difference, so this tests nothing"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_scores_depend_neither_on_the_batch_nor_on_the_order(dtype: torch.dtype, tolerance: float) -> None:
    attack, images = Loss(t=100), some(12)
    assert images.labels is not None
    everything = signals(attack, images, dtype=dtype)
    for batch_size in (1, 3):
        np.testing.assert_allclose(signals(attack, images, batch_size, dtype), everything, rtol=tolerance)
    order = np.random.default_rng(7).permutation(12)
    shuffled = Images(images.pixels[order], images.sample_id[order], images.labels[order])
    np.testing.assert_allclose(signals(attack, shuffled, 4, dtype), everything[order], rtol=tolerance)
    some_of_them = images.where(np.arange(12) % 3 == 0)
    np.testing.assert_allclose(signals(attack, some_of_them, 4, dtype), everything[::3], rtol=tolerance)


def test_without_labels_everything_is_asked_under_the_null_label() -> None:
    images = some(9)
    unknown = Images(images.pixels, images.sample_id)
    null = Images(images.pixels, images.sample_id, np.full(9, C))
    found = signals(Loss(t=100), unknown)
    np.testing.assert_allclose(found, signals(Loss(t=100), null), rtol=1e-12)
    assert (found != signals(Loss(t=100), images)).all()


# --- training

RECIPE = Recipe(steps=12, batch_size=8, lr=2e-3, label_dropout=0.4)


def module(recipe: Recipe = RECIPE, seed: int = 0, index: int = 0, labelled: bool = True) -> LitDiffusion:
    images = some(16)
    return LitDiffusion(model(torch.float32), images.pixels, recipe, seed, index, labels=images.labels if labelled else None)


def test_training_equals_a_bare_loop_under_labels_some_of_which_are_dropped(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    images, m = some(16), module()
    assert images.labels is not None
    net = m.diffusion.net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0, fused=True)
    x, abar = (
        torch.from_numpy(images.pixels).float() / 127.5 - 1,
        torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0),
    )
    dropped = 0
    for step in range(12):
        index, t, noise, _ = m.draws(step)
        under = m.labels(step, index)
        assert under is not None
        coin = under == C
        dropped += int(coin.sum())
        assert torch.equal(under[~coin], torch.from_numpy(images.labels)[index][~coin])
        a = abar[t][:, None, None, None]
        x_t = a.sqrt().float() * x[index] + (1 - a).sqrt().float() * noise
        loss = (net(x_t, t, under).sample - noise).square().flatten(1).mean(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert 20 <= dropped <= 60
    trained = model(torch.float32)
    trained.net.train()
    options = TrainerOptions(accelerator="cpu")
    lit.train(tmp_path, trained, images.pixels, RECIPE, options, seed=0, made=partial(LitDiffusion, labels=images.labels))
    found = load_file(tmp_path / "raw.safetensors")
    for name, value in net.state_dict().items():
        assert torch.equal(found[name], value), name


def test_as_many_labels_are_dropped_as_the_recipe_says() -> None:
    for share in (0.0, 0.1, 0.7, 1.0):
        m = module(Recipe(steps=1, batch_size=20000, label_dropout=share))
        index = m.draws(0)[0]
        under = m.labels(0, index)
        assert under is not None
        dropped = (under == C).double()
        assert abs(float(dropped.mean()) - share) <= 4 * (share * (1 - share) / 20000) ** 0.5
        for image in range(16):  # whichever the image
            assert abs(float(dropped[index == image].mean()) - share) < 0.08


def test_which_labels_are_dropped_is_a_function_of_seed_model_and_step() -> None:
    big = Recipe(steps=9, batch_size=64, label_dropout=0.5)
    one, index = module(big), torch.zeros(64, dtype=torch.int64)
    one.labels(5, index)  # whatever was drawn before
    under = one.labels(3, index)
    assert torch.equal(module(big).labels(3, index), under)
    for other in (module(big, seed=1).labels(3, index), module(big, index=1).labels(3, index), one.labels(4, index)):
        assert not torch.equal(other, under)


def test_labels_change_no_other_draw() -> None:
    """So that weights of unconditional models are those of before, bit for bit (tests/test_training.py has the loop)."""
    labelled, plain = module(), module(Recipe(steps=12, batch_size=8, lr=2e-3, label_dropout=0.9), labelled=False)
    assert plain.labels(3, plain.draws(3)[0]) is None
    for one, two in zip(labelled.draws(3), plain.draws(3), strict=True):
        assert torch.equal(one, two)
    digest = hashlib.sha256(b"".join(draw.numpy().tobytes() for draw in plain.draws(3)[:2])).hexdigest()[:16]
    assert digest == DRAWN


# --- keys

DRAWN = "7cacaddfc5b3a210"
KEYS = {
    "model": "4d40d85e93938325",
    "untrained": "untrained-b4ec2004a2d5c896",
    "signals": "dcf2d1b1e44f458a",
    "scores": "f42e7dd93b305977",
    "run": "48b05ac23388bad9",
}
"""Of the default run, from before there were conditional models. Another value makes everything stored count as another thing."""


def experiment(tmp_path: Path, *overrides: str) -> Experiment:
    made = Experiment(checked(composed("tracking=none", f"output_dir={tmp_path}", *overrides)))
    made.load()
    return made


def keys(e: Experiment) -> dict[str, str]:
    signals = e.stores["signals"].key(specs.signals(e, e.target_index, e.candidates[0]))
    found = {"model": specs.key(e, e.target_index), "untrained": specs.key(e, e.untrained), "signals": signals}
    return found | {"scores": e.stores["scores"].key(specs.scores(e)), "run": specs.run_key(e)}


def test_keys_of_unconditional_models_are_those_of_before(tmp_path: Path) -> None:
    assert keys(experiment(tmp_path)) == KEYS
    assert keys(experiment(tmp_path, "threat_model.knows_label=false", "training.label_dropout=0.5")) == KEYS
    config = experiment(tmp_path).config
    assert not {"conditional", "label_dropout", "knows_label", "label_column"} & {
        key for group in config.values() if isinstance(group, dict) for key in group
    }


def test_keys_of_conditional_models_depend_on_labels_and_on_who_knows_them(tmp_path: Path) -> None:
    pixels, ids = digits().take(np.arange(16)), np.arange(16)
    found = {}
    for name, labels in (("own", ids % 3), ("other", (ids + 1) % 3)):
        np.savez(tmp_path / f"{name}.npz", images=pixels, labels=labels)
        data = ["dataset=arrays", f"dataset.path={tmp_path}/{name}.npz", "dataset.image_size=8", "dataset.channels=1", "split.pool=16"]
        for knows in ("true", "false"):
            given_ = ["diffusion.conditional=true", f"threat_model.knows_label={knows}"]
            found[name, knows] = keys(experiment(tmp_path, *data, *given_))
        found[name, "unconditional"] = keys(experiment(tmp_path, *data))
    assert found["own", "unconditional"]["model"] == found["other", "unconditional"]["model"]
    models = [found[name, "true"]["model"] for name in ("own", "other")]
    assert len({*models, found["own", "unconditional"]["model"]}) == 3
    for name in ("own", "other"):
        one, two = found[name, "true"], found[name, "false"]
        assert [key for key in one if one[key] == two[key]] == ["model", "untrained"]
    dropout = experiment(tmp_path, "diffusion.conditional=true", "training.label_dropout=0.2")
    assert keys(dropout)["model"] != keys(experiment(tmp_path, "diffusion.conditional=true"))["model"]


# --- the whole way

TINY = ["model.block_out_channels=[8,16]", "diffusion.conditional=true", "evaluation=bare"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings for 24 images of two classes."""
    path, source = tmp_path_factory.mktemp("data") / "two.npz", digits()
    ids = np.arange(24)
    np.savez(path, images=source.take(ids), labels=ids // 3 % 2)
    data = ["dataset=arrays", f"dataset.path={path}", "dataset.image_size=8", "dataset.channels=1"]
    return ["debug=quick", *TINY, *data, "split.pool=24"]


def conditional(output_dir: Path, *overrides: str) -> runs.Result:
    return run(composed("tracking=none", f"output_dir={output_dir}", *overrides))


def table(result: runs.Result) -> ScoreTable:
    assert result.folder is not None
    return ScoreTable.load(result.folder / "scores.parquet")


def test_a_model_that_memorised_its_members_betrays_them_with_and_without_their_labels(tmp_path: Path) -> None:
    line = [*TINY, "model.block_out_channels=[16,32]", "split=exact", "split.n_members=16", "split.n_nonmembers=32"]
    line += ["attack=loss", "attack.t=100", "training.steps=100", "training.batch_size=64", "training.label_dropout=0.2"]
    knowing, ignorant = (conditional(tmp_path, *line, f"threat_model.knows_label={knows}") for knows in ("true", "false"))
    assert knowing["train_key"] == ignorant["train_key"]
    assert knowing["auc_ci"][0] > 0.5
    assert ignorant["auc_ci"][0] > 0.5
    assert knowing["nfe_per_image"] == ignorant["nfe_per_image"] == 1

    architecture = {k: v for k, v in composed(*line)["model"].items() if k not in ("name", "_target_")}
    net = UNet2DModel(**architecture, num_class_embeds=11).eval()
    entry = tmp_path / "models" / knowing["train_key"]
    net.load_state_dict(load_file(entry / "ema.safetensors"))
    diffusion = Diffusion(net, linear(1000), n_classes=10)
    source, scored = digits(), table(knowing)
    x = torch.from_numpy(source.take(scored.sample_id)).double() / 127.5 - 1
    assert source.labels is not None
    ids = torch.from_numpy(scored.sample_id)
    access = Loss.access(diffusion)
    for result, labels in ((knowing, source.labels(scored.sample_id)[0]), (ignorant, np.full(len(x), 10))):
        expected = []
        for i, label in enumerate(labels[:9]):
            with given(int(label)):
                expected.append(float(Loss(t=100).score(access, x[i : i + 1], ids[i : i + 1])[0]))
        np.testing.assert_allclose(table(result).score[:9], expected, rtol=1e-5)


def test_parts_put_together_are_the_whole(quick: list[str], tmp_path: Path) -> None:
    line = [*quick, "attack=pia", "evaluation.batch_size=8"]
    whole = conditional(tmp_path / "whole", *line)
    for part in ("1/2", "2/2"):
        assert conditional(tmp_path / "parts", *line, f"part={part}")["status"] == "measured"
    parts = conditional(tmp_path / "parts", *line)
    np.testing.assert_allclose(table(parts).score, table(whole).score, rtol=1e-5)
    assert parts["nfe_per_image"] == whole["nfe_per_image"] == 2


def test_a_checkpoint_is_attacked_as_the_model_that_it_came_from(quick: list[str], tmp_path: Path) -> None:
    trained = conditional(tmp_path / "a", *quick, "training.label_dropout=0.25")
    entry = tmp_path / "a" / "models" / trained["train_key"]
    weights = entry / "ema.safetensors"
    assert load_file(weights)["class_embedding.weight"].shape == (3, 32)
    assert json.loads((entry / "training.json").read_text())["recipe"]["label_dropout"] == 0.25
    audited = conditional(tmp_path / "b", *quick, f"checkpoint={weights}")
    assert not (tmp_path / "b" / "models").exists()
    assert audited["scores_sha256"] == trained["scores_sha256"]
    with pytest.raises(ConfigError, match="does not fit model=tiny"):
        conditional(tmp_path / "b", *quick, f"checkpoint={weights}", "diffusion.conditional=false")


OTHERS = {
    "shadows": ["attack=lira", "split.n_models=3", "threat_model.shadow_training={steps: 2}"],
    "gradients": ["attack=gsa1", "threat_model=white_box", "attack.n_timesteps=2", "split.n_models=2"],
    "surrogate": ["attack=surrogate", "attack@attack.host=loss", "threat_model=samples_only", "attack.n_samples=16", "attack.steps=2"],
    "variations": ["attack=rediffuse", "threat_model=variation_api"],
    "controls": ["attack=loss", "evaluation.controls=[untrained,held_out,generated]"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_attack_goes_the_whole_way(name: str, quick: list[str], tmp_path: Path) -> None:
    result = conditional(tmp_path, *quick, *OTHERS[name])
    assert np.isfinite(table(result).score).all()
    stored = [f.read_text() for f in tmp_path.glob("models/*/spec.yaml")]
    assert all("num_class_embeds: 3" in spec and "n_classes: 2" in spec and "labels: " in spec for spec in stored)
    if name == "surrogate":
        assert len(stored) == 2
    if name == "controls":
        assert set(result["controls"]) == {"untrained", "held_out", "generated"}


def test_more_embeddings_than_classes_may_be_asked_for(tmp_path: Path) -> None:
    net = experiment(tmp_path, *TINY, "+model.num_class_embeds=20").net(0)
    assert net.class_embedding.weight.shape[0] == 20  # type: ignore[union-attr]
