from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffmia_exp.config import build
from diffmia_exp.errors import ConfigError
from diffmia_exp.features import Network, Pixels, chosen


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())


def test_pixels_are_the_pixels() -> None:
    x = torch.rand(3, 2, 4, 4)
    assert torch.equal(Pixels()(x), x.reshape(3, 32).double())
    assert isinstance(chosen(None), Pixels)
    with pytest.raises(ConfigError, match="features=3"):
        chosen(3)  # type: ignore[arg-type]


def test_a_network_with_weights_from_a_file(tmp_path: Path) -> None:
    trained = net()
    nn.init.constant_(trained[0].bias, 0.3)
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    features = Network(net(), str(tmp_path / "net.safetensors"))
    x = torch.rand(300, 1, 8, 8, dtype=torch.float64) * 2 - 1
    out = features(x)
    with torch.no_grad():
        expected = trained.double().eval()(x).flatten(1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out.dtype == torch.float64
    assert not out.requires_grad
    torch.testing.assert_close(features(x[7:9]), out[7:9], rtol=1e-12, atol=1e-14)  # eval mode, no batch statistics
    features.check((1, 8, 8))


def test_bad_files_are_told_in_one_line(tmp_path: Path) -> None:
    junk, other = tmp_path / "junk.safetensors", tmp_path / "other.safetensors"
    junk.write_bytes(b"not a safetensors file")
    save_file(nn.Linear(2, 2).state_dict(), other)
    for path, says in ((tmp_path / "none", "no such file"), (junk, "cannot be read"), (other, "does not fit"), (tmp_path, "no such file")):
        with pytest.raises(ConfigError, match=says) as e:
            Network(net(), str(path))
        assert str(e.value).startswith(f"features.weights={path}: ")
        assert "\n" not in str(e.value)


def test_nets_that_do_not_fit_are_told_in_one_line() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean()

    for module, says in ((net(), "cannot take images of shape 3x8x8"), (Pair(), "not tuple"), (Mean(), "one row per image")):
        with pytest.raises(ConfigError, match=says) as e:
            Network(module).check((3, 8, 8))
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        Network(lambda x: x)  # type: ignore[arg-type]


def test_a_config_names_net_and_weights(tmp_path: Path) -> None:
    config = {
        "_target_": "diffmia_exp.attacks.knn.KNN",
        "features": {
            "_target_": "diffmia_exp.features.Network",
            "net": {"_target_": "torch.nn.AvgPool2d", "kernel_size": 2},
            "weights": None,
        },
    }
    assert build("attack", config).features(torch.ones(2, 1, 8, 8)).shape == (2, 16)
    config["features"]["weights"] = str(tmp_path / "none")  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"attack\.features\.weights=.*no such file"):
        build("attack", config)
