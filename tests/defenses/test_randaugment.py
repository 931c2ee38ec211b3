from __future__ import annotations

import sys

import pytest
import torch

from diffmia_exp.config import build
from diffmia_exp.defenses.randaugment import RandAugment
from diffmia_exp.errors import ConfigError, UserError

pytest.importorskip("kornia")


def images(n: int, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def augmented(x: torch.Tensor, seed: int = 5, **settings: int) -> torch.Tensor:
    return RandAugment(**settings).augmented(x, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (1, 32), (3, 32)])
def test_images_stay_images(channels: int, size: int) -> None:
    x = images(48, channels, size)
    out = augmented(x, magnitude=29)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.abs().max() <= 1
    assert (out - x).abs().flatten(1).amax(1).gt(0.05).float().mean() > 0.7


def test_draws_are_the_generators_alone() -> None:
    x = images(32)
    torch.manual_seed(1)
    a = augmented(x)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(augmented(x), a)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(augmented(x, seed=6), a)


def test_each_image_gets_an_operation_of_its_own() -> None:
    x = images(1).expand(300, 1, 8, 8)
    out = augmented(x, n_ops=1)
    inverted = (out + x).abs().flatten(1).amax(1) < 1e-5
    assert 5 <= int(inverted.sum()) <= 40  # 300 / 15
    assert len(out.unique(dim=0)) >= 12


def test_without_kornia_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation.auto", None)
    with pytest.raises(UserError, match=r"^defense=randaugment: needs kornia; install it with pip install -e '\.\[augment\]'$"):
        build("defense", {"_target_": "diffmia_exp.defenses.randaugment.RandAugment", "n_ops": 2, "magnitude": 9})


@pytest.mark.parametrize("change", [{"n_ops": 0}, {"n_ops": -1}, {"magnitude": 0}, {"magnitude": 30}])
def test_settings_are_checked(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(change))}="):
        RandAugment(**change)
