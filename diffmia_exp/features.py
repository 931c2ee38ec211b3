"""Feature spaces in which attacks compare images: the pixels, or what a network makes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmia_exp.errors import ConfigError

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
