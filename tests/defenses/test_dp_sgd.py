"""DP-SGD: gradients image by image, clipping, noise, sampling and accounting as stated; and an audit that finds out where they are not."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import integrate, stats
from torch import Tensor, nn

from diffmia_exp import audit, epsilon
from diffmia_exp.config import build, checked
from diffmia_exp.defenses.dp_sgd import DPSGD, ORDERS, Account, calibrated
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.experiment import Experiment
from diffmia_exp.recipe import Recipe, TrainerOptions
from diffmia_exp.scores import ScoreTable
from tests.bench_statistics import gaussian_epsilon
from tests.composing import composed
from tests.defenses.toy import Toy, canaries, killed_at, made, trained
from tests.test_pipeline import quick

pytest.importorskip("opacus")

RECIPE = Recipe(steps=8, batch_size=2, lr=1e-2, warmup_steps=3, grad_clip=0, weight_decay=0.01, flip=True, snapshots=[3])
DEFENSE = DPSGD(epsilon=None, noise_multiplier=0.5, max_grad_norm=0.01, draws_per_image=3, physical_batch=7)


def toy(seed: int = 0, dropout: float = 0.0) -> Toy:
    torch.manual_seed(seed)
    return Toy(dropout=dropout)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("dp"), toy(dropout=0.2), canaries(6), RECIPE, DEFENSE)


SMALLER: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": [8, 16]},
    "small": {"block_out_channels": [8, 16, 16], "attention_head_dim": 8, "sample_size": 16},
    "standard": {"block_out_channels": [8, 16, 16, 16], "attention_head_dim": 16, "norm_num_groups": 4, "sample_size": 16, "dropout": 0.0},
}


@pytest.mark.parametrize("name", SMALLER)
def test_gradients_are_those_of_one_image_at_a_time(name: str) -> None:
    """The shipped networks, narrowed: convolutions, attention, group norms and timestep embeddings, three draws of each image."""
    torch.manual_seed(0)
    net = build("model", composed(f"model={name}")["model"] | SMALLER[name])
    size, K = SMALLER[name].get("sample_size", 8), 3
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, size, size)).astype(np.uint8)
    module = made(net, pixels, Recipe(steps=1, batch_size=3), DPSGD(epsilon=None, noise_multiplier=1.0, draws_per_image=K))
    index = torch.tensor([0, 2, 3]).repeat_interleave(K)
    x0, g = torch.from_numpy(pixels)[index].float() / 127.5 - 1, torch.Generator().manual_seed(1)
    t, noise = torch.randint(1000, (3 * K,), generator=g), torch.randn(x0.shape, generator=g)
    each = []
    for at in (slice(image * K, (image + 1) * K) for image in range(3)):
        each.append(torch.autograd.grad(module.diffusion.loss(x0[at], t[at], noise[at]).mean(), [*net.parameters()]))
    norms = [float(torch.stack([v.norm() for v in one]).norm()) for one in each]
    C = 0.99 * sorted(norms)[1]
    assert min(norms) < C, "one is not clipped"
    module.private.max_grad_norm = C
    loss = module._accumulate(x0, t, noise, index)
    total = [sum(v * min(1.0, C / norm) for v, norm in zip(of, norms, strict=True)) for of in zip(*each, strict=True)]
    for (parameter, p), v in zip(net.named_parameters(), total, strict=True):
        assert p.grad is not None
        assert (p.grad - v).norm() <= 1e-5 * C, parameter
    torch.testing.assert_close(loss, module.diffusion.loss(x0, t, noise).sum().detach())


def test_it_equals_a_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image's gradient by autograd alone, in float64: clipped over all parameters, summed, noised, over the expected batch."""
    pixels, net = canaries(6), toy().double()
    names = [name for name, _ in net.named_parameters()]
    seen: list[list[Tensor]] = []
    step_of_adam = torch.optim.AdamW.step

    def step_seen(self: torch.optim.AdamW) -> None:
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        step_of_adam(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_seen)
        folder = trained(tmp_path, toy(), pixels, RECIPE, DEFENSE, seed=1)
    module = made(toy(), pixels, RECIPE, DEFENSE, seed=1)  # a seed with an empty batch and large ones
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.01)
    diffusion, x = Diffusion(net, linear(1000)), torch.from_numpy(pixels).double() / 127.5 - 1
    average, sizes, clipped = [p.detach().clone() for p in net.parameters()], [], 0
    for step in range(8):
        index, t, noise, flips = module.draws(step)
        total = [torch.zeros_like(p) for p in net.parameters()]
        sizes.append(len(index) // 3)
        for i in range(sizes[-1]):
            at = slice(3 * i, 3 * i + 3)
            assert len(set(index[at].tolist())) == 1
            x0 = torch.stack([x[k].flip(-1) if f else x[k] for k, f in zip(index[at], flips[at], strict=True)])
            grads = torch.autograd.grad(diffusion.loss(x0, t[at], noise[at].double()).mean(), [*net.parameters()])
            norm = math.sqrt(sum(float(v.square().sum()) for v in grads))
            clipped += norm > 0.01
            total = [a + v * min(1.0, 0.01 / norm) for a, v in zip(total, grads, strict=True)]
        g = torch.Generator().manual_seed(module._derived(step, 2))
        for (name, p), v in zip(net.named_parameters(), total, strict=True):
            p.grad = (v + torch.normal(0, 0.5 * 0.01, p.shape, generator=g).double()) / 2
            # Here, for Adam would forgive another divisor.
            torch.testing.assert_close(seen[step][names.index(name)].double(), p.grad, rtol=0, atol=3e-6)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 3)
        optimizer.step()
        decay = min(max(0.0, 1 - 20 / 8), (2 + step) / (11 + step))
        average = [a * decay + p.detach() * (1 - decay) for a, p in zip(average, net.parameters(), strict=True)]
    assert clipped > 5
    assert min(sizes) == 0, "an empty batch, which is a step of noise"
    assert max(sizes) > 7 // 3, "a batch that is taken apart for memory"
    for kind, expected in (("raw", net.parameters()), ("ema", average)):
        found = load_file(folder / f"{kind}.safetensors")
        assert set(found) == set(names), "the plain network's names"
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name].double(), value.detach(), rtol=0, atol=2e-4)
    moved = max(float((a - b.detach()).abs().max()) for a, b in zip(toy().double().state_dict().values(), net.parameters(), strict=True))
    assert moved > 0.02


def test_with_fewer_members_than_a_batch_all_are_drawn_and_sampling_gains_nothing() -> None:
    recipe = Recipe(steps=20, batch_size=8)
    module = made(toy(), canaries(6), recipe, DPSGD(epsilon=None, noise_multiplier=4.0))
    assert sorted(module.draws(0)[0].tolist()) == [*range(6)]
    # One step of variance 16 / 20: the same mechanism twenty times, whose divergence of order a is 20 a / (2 sigma^2).
    expected = min(20 * a / 32 + math.log1p(-1 / a) - (math.log(1e-5) + math.log(a)) / (a - 1) for a in ORDERS)
    assert module.account.epsilon(20) == pytest.approx(expected, rel=1e-6)


def test_members_are_drawn_independently() -> None:
    module = made(toy(), canaries(10), Recipe(steps=1, batch_size=3), DPSGD(epsilon=None, noise_multiplier=1.0, draws_per_image=2))
    drawn = np.zeros((3000, 10))
    for step in range(3000):
        index = module.draws(step)[0]
        drawn[step, index] = 1
        assert torch.equal(index[0::2], index[1::2])
    times = drawn.sum(0)
    assert all(stats.binomtest(int(n), 3000, 0.3).pvalue > 1e-4 for n in times)
    observed = np.bincount(drawn.sum(1).astype(int), minlength=11)
    expected = stats.binom.pmf(range(11), 10, 0.3) * 3000
    assert stats.chisquare([*observed[:7], observed[7:].sum()], [*expected[:7], expected[7:].sum()]).pvalue > 1e-4
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.03
    other = made(toy(), canaries(10), Recipe(steps=1, batch_size=3), module.private, seed=1)
    assert any(not torch.equal(module.draws(step)[0], other.draws(step)[0]) for step in range(5))


@pytest.mark.parametrize("step", [3, 5])
def test_a_kill_changes_no_bit(tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from diffmia_exp.defenses.dp_training import LitDPSGD

    with monkeypatch.context() as patch:
        killed_at(step, patch, LitDPSGD)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trained(tmp_path, toy(dropout=0.2), canaries(6), RECIPE, DEFENSE)
    assert (tmp_path / "last.ckpt").exists()
    trained(tmp_path, toy(dropout=0.2), canaries(6), RECIPE, DEFENSE)
    assert json.loads((tmp_path / "training.json").read_text())["resumed"] is True
    for path in undisturbed.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_it_says_what_the_accountant_says(undisturbed: Path) -> None:
    told = json.loads((undisturbed / "training.json").read_text())["defense"]
    account = Account(0.5, 2 / 6, 1e-5, "rdp")
    assert told["epsilon"] == account.epsilon(8) > told["snapshots"]["3"] == account.epsilon(3)
    assert (told["sample_rate"], told["noise_multiplier"], told["steps"], told["accountant"]) == (2 / 6, 0.5, 8, "rdp")


@pytest.mark.parametrize(("sigma", "steps"), [(10.0, 100), (40.0, 500)])
def test_epsilon_of_whole_batches_is_just_above_the_exact_one(sigma: float, steps: int) -> None:
    """With q = 1, T steps of noise sigma are one Gaussian mechanism of noise sigma / sqrt(T), whose epsilon is known."""
    exact = gaussian_epsilon(sigma / math.sqrt(steps), 1e-5)
    assert exact <= Account(sigma, 1.0, 1e-5, "prv").epsilon(steps) <= exact + 0.03
    assert exact <= Account(sigma, 1.0, 1e-5, "rdp").epsilon(steps) <= 1.2 * exact


def test_epsilon_of_poisson_batches_equals_the_integral() -> None:
    """Renyi divergences of a sampled Gaussian by numerical integration (Mironov et al. 2019, equation 4), turned into epsilon."""
    q, sigma, steps, delta = 0.05, 1.3, 200, 1e-5

    def divergence(alpha: int) -> float:
        def moment(x: float) -> float:
            ratio = np.logaddexp(math.log(1 - q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
            return math.exp(stats.norm.logpdf(x, 0, sigma) + alpha * ratio)

        return math.log(integrate.quad(moment, -15, 60, limit=500)[0]) / (alpha - 1)

    orders = [a for a in ORDERS if a <= 30]
    expected = min(steps * divergence(a) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders)
    assert Account(sigma, q, delta, "rdp").epsilon(steps) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_the_least_noise_that_keeps_to_epsilon_is_found(accountant: str) -> None:
    sigma = calibrated(3.0, 1e-5, 0.2, 50, accountant)
    assert 0.985 * 3 <= Account(sigma, 0.2, 1e-5, accountant).epsilon(50) <= 3


class _Mixing(Toy):
    """Subtracts the batch's mean without a layer that anyone could know."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x - x.mean(0), t)


class _Functional(Toy):
    """Uses a layer's weight without calling the layer."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + (x.flatten(1) @ self.last.weight[:, :1]).reshape(-1, 1, 1, 1)


class _Normed(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(self.norm(x), t)


class _Grouped(Toy):
    """Has a layer whose per-image gradients nobody here knows."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(2, 2, 1, groups=2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(self.grouped(x.expand(-1, 2, -1, -1))[:, :1], t)


class _Remembering(Toy):
    """Keeps statistics of its images in a buffer, beyond all noise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(1, track_running_stats=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(self.norm(x), t)


@pytest.mark.parametrize("net", [_Normed, _Mixing, _Functional, _Grouped, _Remembering])
def test_networks_whose_images_have_no_gradients_of_their_own_are_refused(net: type[nn.Module]) -> None:
    line = "BatchNorm cannot" if net is _Normed else "images do not have gradients of their own"
    with pytest.raises(ConfigError, match=f"^defense=dp_sgd: cannot train this network: {line}"):
        made(net(), canaries(6), RECIPE, DEFENSE)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["defense.epsilon=0"], "defense.epsilon=0: must be a number above 0"),
        (["defense.epsilon=-1"], "defense.epsilon=-1: must be a number above 0"),
        (["defense.delta=0"], "defense.delta=0: must be a number above 0"),
        (["defense.delta=1"], "defense.delta=1: must be below 1"),
        (["defense.epsilon=null"], "defense.epsilon=null: must be given, or noise_multiplier"),
        (["defense.noise_multiplier=1"], "defense.epsilon=10.0: must be given, or noise_multiplier, but not both"),
        (["defense.epsilon=null", "defense.noise_multiplier=0"], "defense.noise_multiplier=0: must be a number of at least 0.001"),
        (["defense.draws_per_image=0"], "defense.draws_per_image=0: must be a whole number of at least 1"),
        (["defense.accountant=gdp"], "defense.accountant=gdp: must be one of rdp, prv"),
        (["defense.max_grad_norm=0"], "defense.max_grad_norm=0: must be a number above 0"),
        (["defense.epsilon=0.0001"], "defense.epsilon=0.0001: cannot be reached by the accountant rdp"),
        (["defense.epsilon=500", "defense.accountant=prv"], "defense.accountant=prv: must be rdp where epsilon is above 100, here 500"),
        (["trainer.devices=2"], "trainer.devices=2: must be 1 with defense=dp_sgd"),
        (["trainer.precision=bf16-mixed"], "trainer.precision=bf16-mixed: must be 32-true"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(tmp_path: Path, settings: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as told:
        Experiment(checked(composed("debug=quick", "split.pool=32", "defense=dp_sgd", f"output_dir={tmp_path}", *settings))).load()
    assert str(told.value).startswith(line)
    assert not list(tmp_path.glob("models/*"))


def test_without_opacus_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ConfigError, match=r"^defense=dp_sgd: needs Opacus; install it with pip install -e '.\[dp\]'$"):
        Experiment(checked(composed("debug=quick", "defense=dp_sgd", f"output_dir={tmp_path}"))).load()


def audited(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """What a run would say of the privacy of a small network that learns canaries by heart, where it may."""
    half = torch.tensor([0.5], dtype=torch.float64)  # one timestep, at which an image is as strong as its noise
    recipe = Recipe(steps=250, batch_size=24, lr=1e-2, grad_clip=0)
    torch.manual_seed(0)
    net, defense = Toy(width=128), experiment.defense
    trained(
        folder, net, experiment.training_images(0).pixels, recipe, defense, alphas_cumprod=half, options=TrainerOptions(accelerator="cpu")
    )
    net.load_state_dict(load_file(folder / "raw.safetensors"))
    images = experiment.images.where(experiment.audited)
    x, g = torch.from_numpy(images.pixels).float() / 127.5 - 1, torch.Generator().manual_seed(0)
    t = torch.zeros(len(x), dtype=torch.int64)
    with torch.no_grad():
        losses = [Diffusion(net, half).loss(x, t, torch.randn(x.shape, generator=g)) for _ in range(8)]
    table = ScoreTable(images.sample_id, experiment.keep[experiment.audited], -torch.stack(losses).mean(0).double().numpy())
    told = epsilon.accounted(experiment, table, json.loads((folder / "training.json").read_text()))
    assert told is not None
    return told


def test_the_audit_finds_training_without_noise_and_passes_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "canaries.npz", images=canaries(96))
    data = ["dataset=arrays", f"dataset.path={tmp_path / 'canaries.npz'}", "dataset.image_size=8", "dataset.channels=1"]
    e = Experiment(
        checked(
            composed(*data, "split.pool=96", "training.batch_size=24", "defense=dp_sgd", "defense.epsilon=0.5", f"output_dir={tmp_path}")
        )
    )
    e.load()
    right = audited(tmp_path / "right", e)
    assert right["audited"] < right["epsilon"] == pytest.approx(0.5, rel=0.02)
    assert right["refuted"] is None

    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping

    def forget(self: Any) -> None:
        for p in self.params:
            p.grad = p.summed_grad.clone()

    monkeypatch.setattr(DPOptimizerFastGradientClipping, "add_noise", forget)
    wrong = audited(tmp_path / "wrong", e)
    assert wrong["epsilon"] == right["epsilon"], "the accountant believes the config"
    assert wrong["audited"] > 1
    assert wrong["refuted"].startswith(f"privacy: the audit's lower bound {wrong['audited']:.3g} exceeds the accountant's epsilon 0.")


def test_a_run_shows_both_bounds_and_a_refuted_claim_makes_it_unsound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffmia_exp import summary

    settings = ["defense=dp_sgd", "model.block_out_channels=[8,16]", "defense.epsilon=2", "training.snapshots=[2]"]
    result = quick(tmp_path, *settings)
    assert result["privacy"]["epsilon"] <= 2
    assert result["privacy"]["audited"] == result["epsilon"]["one_run"]["epsilon"]
    assert result["privacy"]["refuted"] is None
    assert quick(tmp_path, *settings, "snapshot=2", "weights=raw")["privacy"]["epsilon"] < result["privacy"]["epsilon"]
    summary.single(result)
    assert f"{result['privacy']['audited']:.2f} to {result['privacy']['epsilon']:.2f}" in capsys.readouterr().out
    # The scores of a model that knows everything, in place of this one's.
    monkeypatch.setattr(audit, "p_value", lambda images, guesses, correct, epsilon, delta=0.0: float(epsilon > 3))
    claimed = quick(tmp_path, *settings, "name=claimed")
    assert claimed["sound"] is False
    assert claimed["unsound"][0].startswith("privacy: the audit's lower bound 3 exceeds the accountant's epsilon")
    assert claimed.folder is not None
    assert (claimed.folder / "run.log").read_text().startswith("UNSOUND: privacy: the audit's lower bound")
    summary.single(claimed)
    assert capsys.readouterr().out.startswith("UNSOUND: privacy: the audit's lower bound")
