"""What a GPU must not change: noise, scores, training, private gradients, the store, and what a kill leaves."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffmia_exp import lit, noise
from diffmia_exp.data import Images
from diffmia_exp.defenses.dp_sgd import DPSGD
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.evaluation import Evaluation, in_float32, measure
from diffmia_exp.recipe import Recipe, TrainerOptions
from tests.attacks.conftest import random_net
from tests.attacks.test_contract import MEASURING, AtHome, built, pixels, untrained
from tests.composing import CONF
from tests.defenses.toy import canaries, made

RECIPE = Recipe(steps=60, batch_size=16, lr=2e-3, warmup_steps=5, flip=True)
RUN = ["attack=pia", "training.batch_size=32", "training.steps=600", "split.pool=64", "tracking=none", "utility=none"]


def test_noise_is_that_of_the_cpu() -> None:
    ids = torch.tensor([0, 7, 2**40 + 5])
    assert torch.equal(noise.words(3, ids), noise.words(3, ids.cuda()).cpu())
    drawn, there = noise.gaussian(3, ids, (3, 32, 32), 11), noise.gaussian(3, ids.cuda(), (3, 32, 32), 11).cpu()
    torch.testing.assert_close(there, drawn, rtol=0, atol=1e-13)  # the device's own logarithm and cosine


@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-3)])
def test_a_signal_is_that_of_the_cpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Relative to the signal's size over the images. The network's embedding of timesteps is of float32, whatever its weights are."""
    images = Images(pixels(70), np.arange(70))

    def signal_on(device: str) -> np.ndarray:
        def on(diffusion: Diffusion) -> Diffusion:
            net = copy.deepcopy(diffusion.net).to(dtype)
            return Diffusion(net, linear(1000), image_shape=(1, 8, 8)).to(device)

        attack, access = built(name), built(name).access(on(untrained(0)))
        home: Any = AtHome(lambda _: on(untrained(5)))
        return measure(attack, access, home, images, Evaluation(), torch.device(device), name)[0]

    here, there = signal_on("cpu"), signal_on("cuda")
    assert there.dtype == np.float64
    scale = np.maximum(np.abs(here), np.abs(here).mean(0)) + 1e-3 * np.abs(here).mean()  # the gradient of some biases is but rounding
    assert (np.abs(there - here) / scale).max() <= tolerance


def trained(folder: Path, recipe: Recipe = RECIPE, **options: Any) -> dict[str, Tensor]:
    folder.mkdir()
    chosen = TrainerOptions(**{"accelerator": "gpu", "checkpoint_every": 20} | options)
    lit.train(folder, Diffusion(random_net(0).train(), linear(1000)), pixels(24), recipe, chosen, seed=0)
    return load_file(folder / "raw.safetensors")


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Distance of two sets of weights, relative to how far training took them."""
    start = random_net(0).state_dict()
    apart = sum((one[k].double() - other[k].double()).square().sum() for k in start).sqrt()
    return float(apart / sum((one[k].double() - start[k].double()).square().sum() for k in start).sqrt())


def test_training_is_that_of_the_cpu(tmp_path: Path) -> None:
    """The same draws and arithmetic: after 10 steps the weights are the CPU's, as far as TF32 convolutions allow."""
    short = Recipe(steps=10, batch_size=16, lr=2e-3, warmup_steps=5, flip=True)
    cpu = trained(tmp_path / "cpu", short, accelerator="cpu")
    with in_float32():
        assert far(cpu, trained(tmp_path / "float32", short)) < 1e-2
    assert far(cpu, trained(tmp_path / "tf32", short)) < 0.2
    assert far(cpu, trained(tmp_path / "other", short, precision="bf16-mixed")) < 0.5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_every_precision_learns(precision: str, tmp_path: Path) -> None:
    weights = trained(tmp_path / precision, precision=precision)
    assert all(v.dtype == torch.float32 and bool(v.isfinite().all()) for v in weights.values())
    net = random_net(0)
    losses = []
    for state in (net.state_dict(), weights):
        net.load_state_dict(state)
        x, ids = torch.from_numpy(pixels(24)).float() / 127.5 - 1, torch.arange(24)
        with torch.no_grad():
            losses.append(float(Diffusion(net, linear(1000)).loss(x, 200, noise.gaussian(0, ids, (1, 8, 8)).float()).mean()))
    assert losses[1] < 0.5 * losses[0]


def test_private_gradients_are_those_of_the_cpu() -> None:
    images = canaries(6)

    def total(device: str) -> list[Tensor]:
        module = made(random_net(0), images, Recipe(steps=1, batch_size=3), DPSGD(epsilon=None, noise_multiplier=1.0))
        index = torch.tensor([0, 2, 3, 5]).to(device)
        x0 = torch.from_numpy(images).to(device)[index].float() / 127.5 - 1
        eps = noise.gaussian(0, index, (1, 8, 8)).float()
        with in_float32():
            module.to(device)
            module._accumulate(x0, torch.full((4,), 200, device=device), eps, index)
        return [p.grad.cpu() for p in module.diffusion.net.parameters()]

    for here, there in zip(total("cpu"), total("cuda"), strict=True):
        assert (here - there).norm() <= 1e-4 * max(1e-3, float(here.norm()))


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "run.py", *RUN, f"output_dir={out}", *more]


def done(out: Path, *more: str) -> dict[str, Any]:
    """The result of the one run in `out`."""
    ran = subprocess.run(command(out, *more), cwd=CONF.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (result,) = [json.loads(f.read_text()) for f in (out / "runs").glob("*/metrics.json")]
    return result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed")
    return out, done(out, "trainer=gpu")


def test_a_run_on_the_gpu_finds_the_members(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    assert undisturbed[1]["auc"] > 0.9


def test_a_model_of_the_gpu_is_attacked_on_the_cpu_without_training_again(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, result = undisturbed
    (model,) = (out / "models").iterdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / model.name).symlink_to(model)
    there = done(tmp_path, "trainer=cpu", "evaluation.device=cpu")
    assert there["train_key"] == result["train_key"]
    assert there["auc"] == pytest.approx(result["auc"], abs=2e-3)


def test_a_killed_training_goes_on(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """SIGTERM saves at once; what goes on from there ends where the undisturbed one does, up to the order of the GPU's sums."""
    process = subprocess.Popen(command(tmp_path, "trainer=gpu"), cwd=CONF.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("models/*.partial/last.ckpt")):
        assert process.poll() is None, "over before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    result = done(tmp_path, "trainer=gpu")
    (facts,) = (json.loads(f.read_text()) for f in tmp_path.glob("models/*/training.json"))
    assert facts["resumed"]
    assert result["auc"] == pytest.approx(undisturbed[1]["auc"], abs=0.05)


def test_memory_on_the_gpu_does_not_grow_with_the_images() -> None:
    peaks = []
    for n in (600, 1800):
        torch.cuda.reset_peak_memory_stats()
        attack = built("pia")
        drawn = np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8)).astype(np.uint8)
        home: Any = AtHome(lambda _: untrained())
        measure(attack, attack.access(untrained().to("cuda")), home, Images(drawn, np.arange(n)), Evaluation(), torch.device("cuda"), "pia")
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.05 * peaks[0]


def test_ddp_of_one_gpu_is_one_gpu(undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    result = done(tmp_path, "trainer=ddp", "trainer.accelerator=gpu")
    assert result["train_key"] == undisturbed[1]["train_key"]
    assert result["auc"] == pytest.approx(undisturbed[1]["auc"], abs=0.05)
