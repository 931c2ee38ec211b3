"""Early stopping: when it stops, what it keeps, and that no kill changes a bit of it."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffmia_exp import checkpoints, lit, specs
from diffmia_exp.config import checked
from diffmia_exp.data import Images, digits
from diffmia_exp.defenses.early_stopping import EarlyStopping
from diffmia_exp.defenses.stopping import StoppedEarly, validation_draws
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.experiment import Experiment
from diffmia_exp.lit import LitDiffusion
from diffmia_exp.recipe import Recipe, TrainerOptions
from diffmia_exp.workshop import Workshop
from tests.attacks.conftest import random_net
from tests.composing import composed

PUBLIC = Images(digits().take(np.arange(100, 107)), np.arange(100, 107))
STOPPING = EarlyStopping(every=2, patience=2, min_delta=10.0, draws=3)  # only the first measurement counts as an improvement
RECIPE = Recipe(steps=20, batch_size=8, lr=2e-3, snapshots=[2, 4])
Made = Callable[..., LitDiffusion]


def train(folder: Path, made: Made, devices: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    options = TrainerOptions(accelerator="cpu", devices=devices, checkpoint_every=1 if devices == 1 else 100)
    pixels = digits().take(np.arange(24))
    lit.train(folder, Diffusion(random_net(0, (8, 8)).train(), linear(1000)), pixels, RECIPE, options, seed=0, made=made)
    return folder


def weights(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("stopped"), STOPPING.lit(PUBLIC))


def test_it_keeps_the_best_weights_and_says_when_it_stopped(stopped: Path) -> None:
    told = facts(stopped)
    assert told["defense"]["stopped_at"] == 6
    assert told["defense"]["best_step"] == told["steps"] == 2
    assert told["epochs"] == pytest.approx(2 * 8 / 24)
    found = weights(stopped)
    for kind in ("raw", "ema"):
        assert found[f"{kind}.safetensors"] == found[f"step0000002-{kind}.safetensors"] != found[f"step0000004-{kind}.safetensors"]


def test_until_it_stops_it_is_the_training_without_it(stopped: Path, tmp_path: Path) -> None:
    plain = weights(train(tmp_path / "plain", LitDiffusion))
    found = weights(stopped)
    for name in ("step0000002-raw.safetensors", "step0000004-ema.safetensors"):
        assert plain[name] == found[name]


def test_the_loss_is_that_of_the_averaged_weights(stopped: Path) -> None:
    net = random_net(0, (8, 8)).double()
    net.load_state_dict(load_file(stopped / "ema.safetensors"))
    t, noise = validation_draws(0, PUBLIC, 1000, 3)
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    losses = []
    for n, image in enumerate(torch.from_numpy(PUBLIC.pixels).double() / 127.5 - 1):
        for k in range(3):
            at, z = t[3 * n + k], noise[3 * n + k].double()
            with torch.no_grad():
                out = net((a[at].sqrt() * image + (1 - a[at]).sqrt() * z)[None], at).sample[0]
            losses.append(float((out - z).square().mean()))
    assert facts(stopped)["defense"]["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_it_trains_to_the_end_while_the_loss_falls(tmp_path: Path) -> None:
    told = facts(train(tmp_path / "falling", EarlyStopping(every=19, patience=1, draws=3).lit(PUBLIC)))
    assert told["defense"]["stopped_at"] == told["defense"]["best_step"] == told["steps"] == 20


class Killed(StoppedEarly):
    """A training whose process is gone in the middle of a step."""

    dies_at = 0

    def loss(self, *args: Any) -> torch.Tensor:
        if self.global_step == self.dies_at:
            os._exit(9)
        return super().loss(*args)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_kill_changes_no_bit(step: int, stopped: Path, tmp_path: Path) -> None:
    def victim() -> None:
        Killed.dies_at = step
        train(tmp_path, functools.partial(Killed, public=PUBLIC, stopping=STOPPING))

    process = multiprocessing.get_context("fork").Process(target=victim)
    process.start()
    process.join()
    assert process.exitcode == 9
    train(tmp_path, STOPPING.lit(PUBLIC))
    assert weights(tmp_path) == weights(stopped)
    assert facts(tmp_path)["resumed"]
    assert facts(tmp_path)["defense"] == facts(stopped)["defense"]
    assert not (tmp_path / checkpoints.CHECKPOINT).exists()


def test_two_processes_stop_at_the_same_step(stopped: Path, tmp_path: Path) -> None:
    found = facts(train(tmp_path, STOPPING.lit(PUBLIC), devices=2))["defense"]
    expected = facts(stopped)["defense"]
    assert (found["stopped_at"], found["best_step"]) == (expected["stopped_at"], expected["best_step"])
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-3)


@pytest.mark.parametrize(("n", "draws"), [(7, 3), (50, 4), (1, 10), (300, 1)])
def test_timesteps_are_spread_over_images_and_draws(n: int, draws: int) -> None:
    shown = Images(np.zeros((n, 1, 8, 8), np.uint8), np.arange(n))
    t, noise = validation_draws(0, shown, 1000, draws)
    assert noise.shape == (n * draws, 1, 8, 8)
    assert (np.sort((t.reshape(n, draws).numpy() * draws) // 1000, axis=1) == np.arange(draws)).all()
    assert np.abs(np.sort(t.numpy()) - (np.arange(n * draws) + 0.5) / (n * draws) * 1000).max() <= 1
    again = validation_draws(0, shown, 1000, draws)
    assert torch.equal(t, again[0])
    assert torch.equal(noise, again[1])
    assert not torch.equal(noise, validation_draws(1, shown, 1000, draws)[1])


def experiment(tmp_path: Path, *overrides: str) -> Experiment:
    quick = ["debug=quick", f"output_dir={tmp_path}", "split.pool=16", "model.block_out_channels=[8,8]"]
    e = Experiment(checked(composed(*quick, "defense=early_stopping", *overrides)))
    e.load()
    return e


def test_its_public_images_are_part_of_the_key(tmp_path: Path) -> None:
    few, more = (experiment(tmp_path, f"split.public={n}") for n in (4, 5))
    assert specs.key(few, 0) != specs.key(more, 0)
    with pytest.raises(ConfigError, match=r"^split.public=0: must be at least 1, the public images that defense=early_stopping needs$"):
        experiment(tmp_path)


def test_a_snapshot_past_the_stop_is_told_of(tmp_path: Path) -> None:
    settings = ["split.public=2", "training.snapshots=[1,4]", "defense.every=1", "defense.patience=1", "defense.min_delta=10"]
    Workshop(experiment(tmp_path, *settings, "snapshot=1")).model(0)
    with pytest.raises(ConfigError, match=r"^snapshot=4: must be at most 2, where the training of model 0 was stopped$"):
        Workshop(experiment(tmp_path, *settings, "snapshot=4")).model(0)


@pytest.mark.parametrize("change", [{"every": 0}, {"patience": 0}, {"min_delta": -1}, {"draws": 0}])
def test_settings_are_checked(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(change))}="):
        EarlyStopping(**change)
