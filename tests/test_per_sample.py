from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffmia_exp import per_sample
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.per_sample import gradients
from tests.attacks.conftest import random_net


def attention_net() -> nn.Module:
    torch.manual_seed(1)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()


class Classes(nn.Module):
    """A conditional UNet, each image's class following from its noise level, so that the rows of a sample have several."""

    def __init__(self, embedding: nn.Embedding | None = None) -> None:
        super().__init__()
        self.unet = random_net(0, n_classes=4)
        if embedding is not None:
            self.unet.class_embedding = embedding

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, t % 2).sample


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5, -0.5, 2.0]).reshape(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.tanh()


class Tokens(nn.Module):
    """Layers on an image, then on its pixels as tokens; `middle` is the layer under test."""

    def __init__(self, middle: nn.Module, twice: bool = False, by_weight: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.middle, self.last = nn.Conv2d(1, 3, 3, padding=1), middle, nn.Conv2d(3, 1, 1)
        self.tokens, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
        self.twice, self.by_weight = twice, by_weight

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        size = x.shape[2:]
        x = nn.functional.relu(self.first(x), inplace=True) + t.to(x)[:, None, None, None] / 1000
        x = self.middle(self.middle(x)) if self.twice else self.middle(x)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = nn.functional.linear(tokens, self.tokens.weight, self.tokens.bias) if self.by_weight else self.tokens(tokens)
        x = self.last(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))
        return nn.functional.interpolate(x, size=size)


NETS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "unet": (lambda: random_net(0), True),
    "attention": (attention_net, True),
    "classes": (Classes, True),
    "classes, one unlearned": (lambda: Classes(nn.Embedding(5, 64, padding_idx=1)), False),
    "strided": (lambda: Tokens(nn.Conv2d(3, 3, 3, stride=2, padding=1)), True),
    "dilated": (lambda: Tokens(nn.Conv2d(3, 3, (3, 2), padding=(2, 1), dilation=2, bias=False)), True),
    "parametrised": (lambda: Tokens(Scale()), False),
    "grouped": (lambda: Tokens(nn.Conv2d(3, 3, 3, padding=1, groups=3)), False),
    "twice": (lambda: Tokens(nn.Conv2d(3, 3, 3, padding=1), twice=True), False),
    "by weight": (lambda: Tokens(nn.Conv2d(3, 3, 1), by_weight=True), False),
}


def case(name: str, dtype: torch.dtype, samples: int, together: int) -> tuple[Diffusion, list[Tensor]]:
    torch.manual_seed(4)
    diffusion = Diffusion(NETS[name][0]().to(dtype), linear(1000))
    generator = torch.Generator().manual_seed(3)
    rows = samples * together
    x, eps = (torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return diffusion, [x, torch.randint(0, 1000, (rows,), generator=generator), eps]


def reference(diffusion: Diffusion, inputs: list[Tensor], together: int) -> Tensor:
    """One sample at a time."""
    norms = []
    for rows in zip(*(v.split(together) for v in inputs), strict=True):
        found = torch.autograd.grad(diffusion.loss(*rows).mean(), list(diffusion.net.parameters()))
        norms.append(torch.stack([g.double().norm() for g in found]))
    return torch.stack(norms)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-6)])
def test_norms_equal_autograd_on_one_sample_at_a_time(
    name: str, together: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusion, inputs = case(name, dtype, 3, together)
    used = []
    whole = per_sample._as_a_whole
    monkeypatch.setattr(per_sample, "_as_a_whole", lambda *args: used.append(1) or whole(*args))
    found = gradients(diffusion.net, diffusion.loss, tuple(inputs), together)
    assert bool(used) != NETS[name][1]
    # Against float64: what rounds is then one side alone (autograd in float32, one at a time, is off by up to 1e-6 itself).
    # The gradient of a key's bias is 0 but for rounding (softmax).
    exact, _ = case(name, torch.float64, 3, together)
    exact.net.load_state_dict(diffusion.net.state_dict())
    expected = reference(exact, inputs, together)
    torch.testing.assert_close(found.norms, expected, rtol=tolerance, atol=tolerance / 10 * float(expected.max()))
    torch.testing.assert_close(found.loss, exact.loss(*inputs).detach(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("together", [1, 3])
def test_clipped_gradients_equal_autograd_on_one_sample_at_a_time(name: str, together: int) -> None:
    """The sum of what is left of each sample's gradient; a parameter that is not trained is no part of its norm."""
    diffusion, inputs = case(name, torch.float64, 3, together)
    parameters = list(diffusion.net.parameters())
    for p in parameters[:3]:  # a whole layer, and a part of another
        p.requires_grad_(False)
    if not NETS[name][1]:
        with pytest.raises(per_sample.Unsupported):
            per_sample.clipped(diffusion.net, diffusion.loss, tuple(inputs), 1.0, together)
        return
    trained = [p for p in parameters if p.requires_grad]
    each = []
    for rows in zip(*(v.split(together) for v in inputs), strict=True):
        each.append(torch.autograd.grad(diffusion.loss(*rows).mean(), trained, materialize_grads=True))
    norms = [float(torch.stack([g.norm() for g in grads]).norm()) for grads in each]
    most = sorted(norms)[1] * 0.99  # one is not clipped
    expected = [sum(g * min(1, most / norm) for g, norm in zip(of, norms, strict=True)) for of in zip(*each, strict=True)]
    found = per_sample.clipped(diffusion.net, diffusion.loss, tuple(inputs), most, together)
    torch.testing.assert_close(found.total, expected, rtol=1e-9, atol=1e-9 * most)
    torch.testing.assert_close(found.norms.norm(dim=1), torch.tensor(norms, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.loss, diffusion.loss(*inputs).detach(), rtol=1e-9, atol=0)
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("name", ["unet", "parametrised"])
def test_gradient_of_the_input(name: str) -> None:
    diffusion, inputs = case(name, torch.float64, 3, 2)
    x = inputs[0].clone().requires_grad_()
    expected = torch.autograd.grad(diffusion.loss(x, *inputs[1:]).sum(), x)[0]
    found = gradients(diffusion.net, diffusion.loss, tuple(inputs), 2, of_input=True)
    torch.testing.assert_close(found.of_input, expected, rtol=1e-9, atol=1e-15)
    assert not any(v.requires_grad for v in (found.loss, found.norms, found.of_input))


@pytest.mark.parametrize("together", [1, 3])
def test_the_net_sees_no_more_rows_than_memory_is_granted_for(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of several chunks gives what its samples give alone, whole samples to a chunk, and all of small images to one call."""
    diffusion, inputs = case("unet", torch.float64, 150, together)
    rows: list[int] = []
    diffusion.net.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    one_by_one = [
        gradients(diffusion.net, diffusion.loss, tuple(v[n : n + together] for v in inputs), together) for n in (0, 149 * together)
    ]
    padded = {1: 64, 3: 192}[together]
    assert rows == [padded] * 2
    for images, expected in ((256, {1: [192], 3: [192, 192, 192]}), (128, {1: [128, 64], 3: [192, 192, 192]})):
        rows.clear()
        monkeypatch.setattr(per_sample, "PIXELS", images * 64)
        found = gradients(diffusion.net, diffusion.loss, tuple(inputs), together)
        assert rows == expected[together]
        torch.testing.assert_close(found.norms[[0, -1]], torch.cat([one.norms for one in one_by_one]), rtol=1e-9, atol=0)
        assert found.loss.shape == (150 * together,)


@pytest.mark.parametrize("name", ["unet", "parametrised"])
def test_the_net_is_left_as_it_was(name: str) -> None:
    diffusion, inputs = case(name, torch.float32, 2, 1)
    parameters = list(diffusion.net.parameters())
    parameters[1].requires_grad_(False)
    before = [p.requires_grad for p in parameters]

    def broken(*rows: Tensor) -> Tensor:
        diffusion.loss(*rows)
        raise KeyError

    gradients(diffusion.net, diffusion.loss, tuple(inputs))
    with pytest.raises(KeyError):
        gradients(diffusion.net, broken, tuple(inputs))
    with torch.no_grad():
        gradients(diffusion.net, diffusion.loss, tuple(inputs))
    assert [p.requires_grad for p in parameters] == before
    assert all(p.grad is None for p in parameters)
    assert not any(module._forward_hooks for module in diffusion.net.modules())
