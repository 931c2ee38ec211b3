"""Training: what it draws, what it averages, and that no kill changes a bit of its outcome."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffmia_exp import lit
from diffmia_exp.data import digits
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.lit import LitDiffusion
from diffmia_exp.recipe import Recipe, TrainerOptions
from diffmia_exp.store import Store
from tests.attacks.conftest import random_net

RECIPE = Recipe(steps=40, batch_size=16, lr=2e-3, warmup_steps=5, flip=True, snapshots=[10, 40])
OPTIONS = TrainerOptions(accelerator="cpu", checkpoint_every=3)


def pixels(n: int = 24) -> np.ndarray:
    return digits().take(np.arange(n))


def module(recipe: Recipe = RECIPE, seed: int = 0, index: int = 0, n: int = 24) -> LitDiffusion:
    return LitDiffusion(Diffusion(random_net(0), linear(1000)), pixels(n), recipe, seed, index)


def train(folder: Path, options: TrainerOptions = OPTIONS, recipe: Recipe = RECIPE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lit.train(folder, Diffusion(random_net(0).train(), linear(1000)), pixels(), recipe, options, seed=0)
    return folder


def weights(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("undisturbed"))


def test_it_leaves_weights_snapshots_and_facts(undisturbed: Path) -> None:
    names = {f"{prefix}{kind}.safetensors" for prefix in ("", "step0000010-", "step0000040-") for kind in ("raw", "ema")}
    assert {p.name for p in undisturbed.iterdir()} == names | {"training.json"}
    found = weights(undisturbed)
    assert found["raw.safetensors"] == found["step0000040-raw.safetensors"] != found["step0000010-raw.safetensors"]
    assert found["ema.safetensors"] == found["step0000040-ema.safetensors"] != found["raw.safetensors"]
    facts = json.loads((undisturbed / "training.json").read_text())
    assert facts["epochs"] == pytest.approx(40 * 16 / 24)
    assert facts["n_members"] == 24


def test_it_equals_a_bare_loop(undisturbed: Path) -> None:
    """Lightning adds nothing to the arithmetic: a plain PyTorch loop with the same draws ends with the same bits."""
    torch.set_num_threads(1)
    m = module()
    net, n = m.diffusion.net.train(), 24
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0, fused=True)
    average = [p.detach().clone() for p in net.parameters()]
    x = torch.from_numpy(pixels()).float() / 127.5 - 1
    for step in range(40):
        index, t, noise, flips = m.draws(step)
        assert set(index.tolist()) <= set(range(n))
        x0 = torch.where(flips[:, None, None, None], x[index].flip(-1), x[index])
        a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
        x_t = a.sqrt().float()[:, None, None, None] * x0 + (1 - a).sqrt().float()[:, None, None, None] * noise
        loss = (net(x_t, t).sample - noise).square().flatten(1).mean(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 5)
        optimizer.step()
        decay = min(1 - 20 / 40, (1 + step + 1) / (10 + step + 1))
        torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 1 - decay)
    names = [name for name, _ in net.named_parameters()]
    for kind, expected in (("raw", net.parameters()), ("ema", average)):
        found = load_file(undisturbed / f"{kind}.safetensors")
        for name, value in zip(names, expected, strict=True):
            assert torch.equal(found[name], value.detach()), f"{kind} {name}"


def test_mixed_precision_trains_with_clipping(tmp_path: Path, undisturbed: Path) -> None:
    """Lightning clips in mixed precision only where the optimiser leaves the gradients' scale alone."""
    assert RECIPE.grad_clip > 0
    folder = train(tmp_path / "bf16", TrainerOptions(accelerator="cpu", precision="bf16-mixed"))
    found, exact = (load_file(f / "raw.safetensors") for f in (folder, undisturbed))
    start = random_net(0).state_dict()
    moved = [sum((w[k] - start[k]).square().sum() for k in start).sqrt() for w in (found, exact)]
    apart = sum((found[k] - exact[k]).square().sum() for k in start).sqrt()
    assert all(v.dtype == torch.float32 for v in found.values())
    assert 0 < apart < max(moved)


def _train_in_store(root: Path) -> None:
    torch.set_num_threads(1)
    Store(root, "models").get_or_make({"what": "a model"}, lambda folder: train(folder) and None)


def test_kill_at_ten_random_moments_changes_no_bit(tmp_path: Path, undisturbed: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffmia_exp.lit", "tests.test_training"])
    rng = random.Random(0)
    expected = weights(undisturbed)

    def start(root: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_train_in_store, args=(root,))
        process.start()
        return process

    resumed = 0
    for trial in range(10):
        root = tmp_path / str(trial)
        victim = start(root)
        seen: set[int] = set()
        checkpoints = rng.randint(0, 12)  # kill after so many checkpoints, and a little
        while victim.exitcode is None and len(seen) < checkpoints:
            seen |= {p.stat().st_mtime_ns for p in root.glob("models/*.partial/last.ckpt")}
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        victim.kill()  # SIGKILL
        victim.join()
        heir = start(root)
        heir.join()
        assert heir.exitcode == 0
        (entry,) = (root / "models").iterdir()
        assert weights(entry) == expected, f"trial {trial}, killed after {len(seen)} checkpoints"
        assert (entry / "DONE").exists()
        resumed += json.loads((entry / "training.json").read_text())["resumed"]
    assert resumed >= 5, "the kills must fall within training for this test to mean something"


def test_two_processes_train_the_same_model(tmp_path: Path, undisturbed: Path) -> None:
    train(tmp_path / "ddp", TrainerOptions(accelerator="cpu", devices=2, strategy="ddp_spawn", checkpoint_every=100))
    one, two = load_file(undisturbed / "raw.safetensors"), load_file(tmp_path / "ddp" / "raw.safetensors")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)
    moved = sum(float((one[k] - v).abs().sum()) for k, v in random_net(0).state_dict().items())
    apart = sum(float((one[k] - two[k]).abs().sum()) for k in one)
    assert apart < 0.02 * moved


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path: Path) -> None:
    options = TrainerOptions(accelerator="cpu", devices=2, strategy="ddp_spawn")
    with pytest.raises(ConfigError, match=r"^training.batch_size=15: must divide over 2 devices$"):
        train(tmp_path, options, Recipe(steps=2, batch_size=15))


def test_draws_are_a_function_of_seed_model_and_step() -> None:
    a, b = module(), module()
    b.draws(7)  # whatever was drawn before
    for one, two in zip(a.draws(3), b.draws(3), strict=True):
        assert torch.equal(one, two)
    for other in (module(seed=1), module(index=1)):
        assert not torch.equal(a.draws(3)[2], other.draws(3)[2])
    assert not torch.equal(a.draws(3)[2], a.draws(4)[2])


@pytest.mark.parametrize(("n", "batch"), [(24, 16), (10, 32), (16, 16), (7, 1)])
def test_every_epoch_visits_every_member_once(n: int, batch: int) -> None:
    m = module(Recipe(steps=100, batch_size=batch), n=n)
    stream = torch.cat([m.draws(step)[0] for step in range(-(-4 * n // batch))])
    epochs = [stream[e * n : (e + 1) * n].tolist() for e in range(4)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4, "epochs must not repeat one order"


def test_timesteps_and_flips_are_uniform() -> None:
    m = module(Recipe(steps=1, batch_size=20000))
    _, t, noise, flips = m.draws(0)
    assert t.min() >= 0
    assert t.max() == 999
    assert np.bincount(t // 100, minlength=10).min() > 1800
    assert abs(float(flips.float().mean()) - 0.5) < 0.02
    assert abs(float(noise.std()) - 1) < 0.01


@pytest.mark.parametrize(("steps", "expected"), [(10, 0.0), (40, 0.5), (1000, 0.98), (800000, 0.9999)])
def test_average_fits_the_length_of_the_run(steps: int, expected: float) -> None:
    recipe = Recipe(steps=steps, batch_size=1)
    assert recipe.ema_decay_at(10**7) == pytest.approx(expected, abs=1e-9)
    assert recipe.ema_decay_at(0) == min(expected, 0.1)
    assert Recipe(steps=steps, batch_size=1, ema_decay=0.9999).ema_decay_at(10**7) == 0.9999


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": -1}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"lr": 0}, "lr"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"snapshots": [41]}, "snapshots"),
        ({"snapshots": 10}, "snapshots"),
        ({"flip": "yes"}, "flip"),
        ({"grad_clip": -1}, "grad_clip"),
    ],
)
def test_a_recipe_checks_itself(change: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}="):
        Recipe(**({"steps": 40, "batch_size": 16} | change))
