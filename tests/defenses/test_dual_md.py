"""DualMD: no image reaches the other half's network, and the two take turns by timestep alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffmia_exp.attacks.gsa1 import GSA1
from diffmia_exp.attacks.pia import PIA
from diffmia_exp.defenses.dual_md import DualMD, Halves, turns
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.noise import derive, gaussian, initialised
from diffmia_exp.per_sample import gradients
from diffmia_exp.recipe import Recipe, TrainerOptions
from diffmia_exp.threat_models import GrayBox, WhiteBox
from tests.attacks.conftest import random_net
from tests.defenses.toy import Toy, canaries, killed_at, made, trained
from tests.test_pipeline import quick

RECIPE = Recipe(steps=8, batch_size=4, lr=1e-2, grad_clip=0.01, weight_decay=0.01)


def halves(seed: int = 0) -> torch.nn.Module:
    return initialised(lambda: DualMD().network(Toy), seed, 0)


def unets() -> Halves:
    made = iter((random_net(0, (8, 16)), random_net(1, (8, 16))))
    return Halves(lambda: next(made)).eval()


def test_the_networks_are_initialised_apart_and_the_same_each_time() -> None:
    net, again = halves(), halves()
    assert isinstance(net, Halves)
    assert not torch.equal(net.a.first.weight, net.b.first.weight)
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), again.parameters(), strict=True))
    assert not torch.equal(net.a.first.weight, halves(1).a.first.weight)


def test_each_image_has_gradients_in_the_network_of_its_half_alone() -> None:
    net, pixels = halves(), canaries(7)
    module = made(net, pixels, RECIPE, DualMD())
    second = module.second(torch.arange(7))
    assert int(second.sum()) == 3
    assert module.facts() == {"halves": [4, 3], "parameters_in_use": sum(p.numel() for p in net.parameters())}
    assert not torch.equal(second, made(halves(), pixels, RECIPE, DualMD(), seed=1).second(torch.arange(7)))
    _, t, noise, _ = module.draws(0)
    x = torch.from_numpy(pixels).float() / 127.5 - 1
    for half, mine, other in ((False, net.a, net.b), (True, net.b, net.a)):
        index = (second == half).nonzero()[:3, 0]
        net.zero_grad()
        loss = module.loss(x[index], t[:3], noise[:3], index)
        torch.testing.assert_close(loss, Diffusion(mine, linear(1000)).loss(x[index], t[:3], noise[:3]))
        loss.sum().backward()
        assert all(p.grad is None for p in other.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mine.parameters())


def test_no_image_of_one_half_changes_a_bit_of_the_other_network(tmp_path: Path) -> None:
    """Neither by its loss nor through clipping, momentum or averages."""
    pixels = canaries(8)
    changed = pixels.copy()
    of_a = int((~made(halves(), pixels, RECIPE, DualMD()).second(torch.arange(8))).nonzero()[0, 0])
    changed[of_a] = 255 - changed[of_a]
    one, two = (trained(tmp_path / n, halves(), p, RECIPE, DualMD()) for n, p in (("one", pixels), ("two", changed)))
    for kind in ("raw", "ema"):
        a, b = load_file(one / f"{kind}.safetensors"), load_file(two / f"{kind}.safetensors")
        assert {name for name in a if not torch.equal(a[name], b[name])} == {name for name in a if name.startswith("a.")}
        assert all(not torch.equal(a[name], value) for name, value in halves().state_dict().items() if kind == "raw" or "bias" in name)
    facts = json.loads((one / "training.json").read_text())
    assert facts["parameters"] == 2 * sum(p.numel() for p in Toy().parameters())


def test_a_kill_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffmia_exp.defenses.halves_training import LitDualMD

    whole = trained(tmp_path / "whole", halves(), canaries(8), RECIPE, DualMD())
    with monkeypatch.context() as patch:
        killed_at(5, patch, LitDualMD)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trained(tmp_path / "killed", halves(), canaries(8), RECIPE, DualMD())
    trained(tmp_path / "killed", halves(), canaries(8), RECIPE, DualMD())
    assert json.loads((tmp_path / "killed" / "training.json").read_text())["resumed"] is True
    for kind in ("raw", "ema"):
        assert (whole / f"{kind}.safetensors").read_bytes() == (tmp_path / "killed" / f"{kind}.safetensors").read_bytes()


def test_the_networks_take_turns_by_a_hash_of_the_timestep() -> None:
    net, x = unets(), torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    turn = turns(torch.arange(1000))
    assert 450 < int(turn.sum()) < 550
    for stride in (2, 10, 50):
        assert len(set(turn[::stride].tolist())) == 2, "a strided sampler meets both"
    both = [int(turn.nonzero()[0, 0]), int((~turn).nonzero()[0, 0])]
    for t, own in zip(both, (net.b, net.a), strict=True):
        steps = torch.full((5,), t)
        expected = own(x, steps).sample
        assert torch.equal(net(x, steps), expected), "with gradients"
        with torch.no_grad():
            assert torch.equal(net(x, steps), expected)
    mixed = torch.tensor([both[0], both[1], both[1], both[0], 7])
    with torch.inference_mode():
        together = net(x, mixed)
        alone = torch.cat([net(x[i : i + 1], mixed[i : i + 1]) for i in range(5)])
        assert torch.equal(together, net(x, mixed))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    access = GrayBox(Diffusion(net, linear(1000)))
    assert torch.equal(access.eps(x, mixed)[:2], access.eps(x[:2], mixed[:2])), "to the bit through the access that attacks have"


def test_white_box_attacks_see_both_networks() -> None:
    """Norms of GSA1 by autograd, image by image; a network whose turn it is at no timestep has none."""
    net = unets()
    diffusion, ids = Diffusion(copy.deepcopy(net).double(), linear(1000)), torch.tensor([3, 8])
    x = torch.from_numpy(canaries(2)).double() / 127.5 - 1
    found = GSA1(n_timesteps=4).signal(WhiteBox(diffusion), x, ids)
    t = torch.tensor([0, 333, 666, 999])
    assert len(set(turns(t).tolist())) == 2
    for image in range(2):
        eps = gaussian(derive(0, "score"), ids[image].expand(4), (1, 8, 8), t)
        grads = torch.autograd.grad(diffusion.loss(x[image].expand(4, 1, 8, 8), t, eps).mean(), [*diffusion.net.parameters()])
        np.testing.assert_allclose(found[image], [float(v.norm()) for v in grads], rtol=1e-8, atol=1e-15)
    once = t[turns(t)][:1]
    norms = gradients(diffusion.net, diffusion.loss, (x[:1], once, torch.ones_like(x[:1]))).norms[0]
    names = [name for name, _ in diffusion.net.named_parameters()]
    assert {name[0] for name, norm in zip(names, norms.tolist(), strict=True) if norm > 0} == {"b"}
    toy = Diffusion(halves().eval(), linear(1000))
    by_layer = gradients(toy.net, toy.loss, (x.float(), t[:2], x.float())).norms
    toy.net.register_parameter("more", torch.nn.Parameter(torch.ones(())))  # which sends it through vmap as a whole
    torch.testing.assert_close(gradients(toy.net, toy.loss, (x.float(), t[:2], x.float())).norms[:, 1:], by_layer)
    assert PIA(t=200).score(GrayBox(diffusion), x, ids).shape == (2,)


def test_several_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trainer.devices=2: must be 1 with this defence"):
        trained(tmp_path, halves(), canaries(8), RECIPE, DualMD(), options=TrainerOptions(accelerator="cpu", devices=2))


@pytest.mark.parametrize("defense", ["dual_md", "distill_md"])
def test_a_run_attacks_what_is_put_to_use(tmp_path: Path, defense: str) -> None:
    small = ["split.pool=16", "model.block_out_channels=[8,16]", "split.n_models=2", "threat_model=white_box", f"defense={defense}"]
    result = quick(tmp_path, *small, "attack=gsa1", "attack.n_timesteps=2", "evaluation=default", "evaluation.controls=[untrained]")
    assert result["status"] == "done"
    specs = [path.read_text() for path in tmp_path.glob("models/*/spec.yaml")]
    assert len(specs) == 2
    assert all("defenses" in spec for spec in specs)
    kept = load_file(tmp_path / "models" / result["train_key"] / "raw.safetensors")
    assert result["parameters"] == sum(v.numel() for v in kept.values())
    attacked = {"dual_md": ("a.", "b."), "distill_md": ("student.",)}[defense]
    assert {name.split(".")[0] for name in kept} == {"a", "b"} | {name[:-1] for name in attacked}
    widths = {np.load(path).shape[1] for path in tmp_path.glob("signals/*/signals.npy")}
    assert widths == {sum(name.startswith(attacked) for name in kept)}, "target, shadow and untrained network alike"
    assert quick(tmp_path, *small, "attack=pia")["train_key"] == result["train_key"]
