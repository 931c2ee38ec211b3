from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffmia_exp.config import build
from diffmia_exp.errors import ConfigError
from diffmia_exp.features import EfficientNetLite0, Network, Pixels, chosen


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


@pytest.fixture(scope="module")
def imagenet() -> EfficientNetLite0:
    pytest.importorskip("efficientnet_lite_pytorch")
    return EfficientNetLite0(64)


@pytest.mark.usefixtures("imagenet")
def test_the_imagenet_network_knows_a_flower() -> None:
    """Weights, scaling and channels are right: the features of a photograph, through the network's own last layer, name it."""
    from sklearn.datasets import load_sample_image

    photograph = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None, :, :, 106:533].double() / 127.5 - 1
    large = EfficientNetLite0(224)
    top = large._loaded()._fc(large(photograph).float())[0].topk(5).indices  # type: ignore[operator]
    assert 985 in top, "daisy"


def test_imagenet_features_are_those_of_the_network_on_scaled_images(imagenet: EfficientNetLite0) -> None:
    x = torch.rand(3, 1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1  # of its size: not resized
    p = (x + 1) / 2 * 255
    with torch.no_grad():
        maps = imagenet._loaded().extract_features(((p - 127) / 128).float().expand(-1, 3, -1, -1))
    out = imagenet(x)
    assert (out.shape, out.dtype) == ((3, 1280), torch.float64)
    torch.testing.assert_close(out, maps.double().mean((2, 3)), rtol=1e-4, atol=1e-4)
    assert out.std(0).max() > 0.1, "images differ in them"


def test_imagenet_features_depend_on_the_image_alone(imagenet: EfficientNetLite0) -> None:
    x = torch.rand(19, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    out, state = imagenet(x), torch.get_rng_state()
    torch.testing.assert_close(imagenet(x[13:18]), out[13:18], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(imagenet(x.flip(0)).flip(0), out, rtol=1e-6, atol=1e-6)
    grey = x[:2, :1]
    torch.testing.assert_close(imagenet(grey), imagenet(grey.expand(-1, 3, -1, -1)), rtol=0, atol=0)
    EfficientNetLite0(32)._loaded()
    assert torch.equal(torch.get_rng_state(), state), "loading draws nothing"


def test_what_the_imagenet_network_cannot_do_is_told_in_one_line(imagenet: EfficientNetLite0, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot take images of shape 2x8x8; it takes 1 or 3 channels"):
        imagenet.check((2, 8, 8))
    monkeypatch.setattr("diffmia_exp.features.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs efficientnet_lite_pytorch; install it with pip install -e '\.\[utility\]'") as e:
        build("utility", {"_target_": "diffmia_exp.utility.Utility", "features": {"_target_": "diffmia_exp.features.EfficientNetLite0"}})
    assert str(e.value).startswith("utility.features=EfficientNetLite0: ")
