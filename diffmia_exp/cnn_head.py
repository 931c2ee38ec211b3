"""A small residual network that tells error maps of members from others', with scikit-learn's interface.

The published attacks with such a head (SecMI-NNs, arXiv 2302.01316; ReDiffuse, arXiv 2405.20771) train a ResNet-18 on 32 x 32
maps; depth and width are settings here, so that small maps need no GPU.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor, nn
from torch.nn import functional as F

from diffmia_exp.errors import ConfigError, number, whole

CHUNK = 1024  # maps per forward pass when predicting


class ResNetHead(BaseEstimator, ClassifierMixin):
    """A residual CNN on square maps, trained with AdamW on the logistic loss, on the CPU.

    Error maps are heavy-tailed: v becomes sign(v) log(1 + |v| / m), m the mean of |v| over the training set, and is then standardised
    by the training set's mean and standard deviation, per channel. Equal settings and data give equal weights; torch's global
    generator is not touched. Prediction runs in float64, so that it does not depend on the batch.

    Args:
        channels: of a map; D = channels * s * s features are read as [channels, s, s].
        width: channels of the first residual block; doubled by every further one, which halves the map.
        depth: residual blocks of two convolutions.
        epochs: passes over the training set.
        lr: learning rate.
        batch_size: maps per step.
        seed: of initial weights and order.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 8,
        depth: int = 3,
        epochs: int = 20,
        lr: float = 1e-3,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        self.channels = whole("channels", channels, least=1)
        self.width = whole("width", width, least=1)
        self.depth = whole("depth", depth, least=1)
        self.epochs = whole("epochs", epochs, least=1)
        number("lr", lr, above=0)
        self.lr = lr  # as given: scikit-learn's `clone` insists on it
        self.batch_size = whole("batch_size", batch_size, least=1)
        self.seed = whole("seed", seed, least=0)

    def fit(self, features: NDArray[Any], labels: NDArray[Any]) -> ResNetHead:
        """Train on maps [m, channels * s * s] and whether each is a member's [m].

        Raises:
            ConfigError: if the maps are not square.
        """
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            maps = self._maps(features)
            self.magnitude_ = maps.abs().mean().clamp(min=1e-300)
            squashed = self._squashed(maps)
            self.mean_ = squashed.mean((0, 2, 3), keepdim=True)
            self.std_ = squashed.std((0, 2, 3), keepdim=True, correction=0).clamp(min=1e-12)
            x, y = ((squashed - self.mean_) / self.std_).float(), torch.from_numpy(np.asarray(labels, dtype=np.float32))
            net = _network(self.channels, self.width, self.depth)
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs
            optimiser = torch.optim.AdamW(net.parameters(), self.lr)
            for _ in range(self.epochs):
                for at in torch.randperm(len(x)).split(self.batch_size):
                    optimiser.zero_grad()
                    F.binary_cross_entropy_with_logits(net(x[at].contiguous(memory_format=torch.channels_last))[:, 0], y[at]).backward()
                    optimiser.step()
            self.net_ = net.eval().double().requires_grad_(False)
        self.classes_ = np.array([0, 1])
        return self

    @torch.no_grad()
    def predict_proba(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Probabilities float64 [n, 2] that maps [n, channels * s * s] are not, and are, a member's."""
        x = (self._squashed(self._maps(features)) - self.mean_) / self.std_
        logit = torch.cat([self.net_(some)[:, 0] for some in x.split(CHUNK)])
        return torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)], 1).numpy()

    def predict(self, features: NDArray[Any]) -> NDArray[np.integer]:
        """The likelier class, 0 or 1 [n]."""
        return self.predict_proba(features).argmax(1)

    def _maps(self, features: NDArray[Any]) -> Tensor:
        flat = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
        side = math.isqrt(flat.shape[1] // self.channels)
        if self.channels * side * side != flat.shape[1]:
            raise ConfigError("channels", self.channels, f"does not make square maps of {flat.shape[1]} features; give dataset.channels")
        return flat.reshape(-1, self.channels, side, side)

    def _squashed(self, maps: Tensor) -> Tensor:
        return maps.sign() * torch.log1p(maps.abs() / self.magnitude_)


class _Block(nn.Module):
    """relu(x' + conv(relu(conv(x)))), each convolution batch-normalised; x' is x, or x convolved 1 x 1 where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv(before, after, 3, stride), _conv(after, after, 3)
        self.skip = _conv(before, after, 1, stride) if before != after or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.second(F.relu(self.first(x))))


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, size, stride, size // 2, bias=False), _Norm(after))


class _Norm(nn.BatchNorm2d):
    """Batch normalisation that falls back on its running statistics for a batch of a single value, which has no variance."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)
        return super().forward(x)


def _network(channels: int, width: int, depth: int) -> nn.Sequential:
    widths = [width * 2**i for i in range(depth)]
    blocks = [_Block(a, b, 2) for a, b in pairwise(widths)]
    stem = [_conv(channels, width, 3), nn.ReLU(), _Block(width, width, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))
