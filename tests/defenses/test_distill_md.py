"""DistillMD: the student learns each image from the teacher that has not seen it, and is all there is to attack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffmia_exp.config import checked
from diffmia_exp.defenses.distill_md import Distilled, DistillMD
from diffmia_exp.errors import ConfigError
from diffmia_exp.experiment import Experiment
from diffmia_exp.noise import initialised
from diffmia_exp.recipe import Recipe
from tests.composing import composed
from tests.defenses.toy import Toy, canaries, killed_at, made, trained

RECIPE = Recipe(steps=8, batch_size=4, lr=1e-2, grad_clip=0.01, weight_decay=0.01, snapshots=[6])
DEFENSE = DistillMD(share=0.5)


def parts(dropout: float = 0.0) -> nn.Module:
    return initialised(lambda: DEFENSE.network(lambda: Toy(dropout=dropout)), 0, 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("distilled"), parts(0.2), canaries(8), RECIPE, DEFENSE)


def test_the_students_target_is_what_the_other_teacher_says() -> None:
    net, pixels = parts(dropout=0.5), canaries(8)
    assert isinstance(net, Distilled)
    module = made(net, pixels, RECIPE, DEFENSE)
    index, t, noise, _ = module.draws(0)
    x0 = torch.from_numpy(pixels)[index].float() / 127.5 - 1
    net.student.dropout.p = 0.0
    loss = module.distilled(x0, t, noise, index)
    x_t = module.diffusion.q_sample(x0, t, noise)
    seen_by_b = module.second(index)
    assert 0 < int(seen_by_b.sum()) < 4
    for i in range(4):
        teacher = net.a if seen_by_b[i] else net.b
        said = teacher.eval()(x_t[i : i + 1], t[i : i + 1])  # without dropout
        torch.testing.assert_close(loss[i], (net.student(x_t[i : i + 1], t[i : i + 1]) - said).square().mean())
    loss.sum().backward()
    assert all(p.grad is None for p in [*net.a.parameters(), *net.b.parameters()])
    assert all(p.grad is not None for p in net.student.parameters())


def test_teachers_learn_first_and_then_stand_still(undisturbed: Path) -> None:
    begun, end = load_file(undisturbed / "step0000006-raw.safetensors"), load_file(undisturbed / "raw.safetensors")
    initial = parts(0.2).state_dict()
    for name, value in end.items():
        teacher = name[0] in "ab"
        assert torch.equal(begun[name], value) is teacher, name
        assert not torch.equal(initial[name], value), name
    facts = json.loads((undisturbed / "training.json").read_text())
    one = sum(p.numel() for p in Toy().parameters())
    assert (facts["parameters"], facts["defense"]) == (3 * one, {"halves": [4, 4], "parameters_in_use": one, "teacher_steps": 4})


def test_an_image_reaches_the_student_through_the_other_teacher_alone(tmp_path: Path) -> None:
    """With the loss of the student's phase, the teacher that knows an image plays no part where only such images are trained on."""
    net, pixels = parts(), canaries(8)
    assert isinstance(net, Distilled)
    module = made(net, pixels, RECIPE, DEFENSE)
    second = module.second(torch.arange(8))
    index = second.nonzero()[:, 0]
    x0, g = torch.from_numpy(pixels)[index].float() / 127.5 - 1, torch.Generator().manual_seed(0)
    t, noise = torch.randint(1000, (len(index),), generator=g), torch.randn(x0.shape, generator=g)
    before = module.distilled(x0, t, noise, index)
    nn.init.zeros_(net.b.last.weight)
    assert torch.equal(module.distilled(x0, t, noise, index), before)
    nn.init.zeros_(net.a.last.weight)
    assert not torch.equal(module.distilled(x0, t, noise, index), before)


@pytest.mark.parametrize("step", [3, 7])
def test_a_kill_changes_no_bit(tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from diffmia_exp.defenses.halves_training import LitDistillMD

    with monkeypatch.context() as patch:
        killed_at(step, patch, LitDistillMD)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trained(tmp_path, parts(0.2), canaries(8), RECIPE, DEFENSE)
    trained(tmp_path, parts(0.2), canaries(8), RECIPE, DEFENSE)
    assert json.loads((tmp_path / "training.json").read_text())["resumed"] is True
    for path in undisturbed.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_the_student_alone_is_handed_out() -> None:
    net = parts().eval()
    assert isinstance(net, Distilled)
    assert DEFENSE.served(net) is net.student
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 500, 999])
    assert torch.equal(net(x, t), net.student(x, t))


def test_the_average_forgets_the_students_initialisation() -> None:
    module = made(parts(), canaries(8), Recipe(steps=1000, batch_size=4), DistillMD(share=0.9))
    left = 1.0
    for step in range(901, 1001):
        left *= module.ema_decay(step)
    assert left < 1e-3
    assert module.ema_decay(900) == Recipe(steps=1000, batch_size=4).ema_decay_at(900)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["defense.share=0"], "defense.share=0: must be a number above 0"),
        (["defense.share=1"], "defense.share=1: must be below 1"),
        (["defense.share=0.99"], "defense.share=0.99: leaves no step of 4 for the student"),
        (["training.snapshots=[2]"], "training.snapshots=2: must be above 2 with defense=distill_md"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(tmp_path: Path, settings: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as told:
        Experiment(checked(composed("debug=quick", "split.pool=32", "defense=distill_md", f"output_dir={tmp_path}", *settings))).load()
    assert str(told.value).startswith(line)
