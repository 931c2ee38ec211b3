"""Every random draw of the project, as a pure function of names and numbers.

`derive` turns (seed, purpose, indices) into a sub-seed. `gaussian` draws noise that belongs to a sample id: a
counter-based generator (Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is evaluated
for all images at once, so that a score depends neither on batch size and order nor on which other images are audited, and
is the same on CPU and GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

# Never renumber: the numbers are part of every stored result.
PURPOSES = {"pool": 1, "split": 2, "init": 3, "order": 4, "step": 5, "score": 6, "sample": 7, "vary": 8, "public": 9, "surrogate": 10}
PURPOSES |= {"augment": 11, "labels": 12, "private": 13, "halves": 14, "answer": 15, "copies": 16, "utility": 17}

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _sequence(seed: int, purpose: str, index: tuple[int, ...]) -> np.random.SeedSequence:
    # As a spawn key: plain entropy is padded with zeros, so that (seed, purpose) and (seed, purpose, 0) would be one.
    return np.random.SeedSequence(seed, spawn_key=(PURPOSES[purpose], *index))


def derive(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit sub-seed for `purpose`, independent of every other one (numpy's SeedSequence)."""
    return int(_sequence(seed, purpose, index).generate_state(1, np.uint64)[0]) >> 1


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A numpy generator for `purpose`."""
    return np.random.default_rng(_sequence(seed, purpose, index))


def initialised(make: Callable[[], nn.Module], seed: int, model_index: int) -> nn.Module:
    """The net that `make()` builds, its initial weights a function of (seed, model index), the global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init", model_index))
        return make()


def whole_numbers(of: int | Tensor, device: torch.device) -> Tensor:
    """Int64 [1], or [B] of a tensor [B]. A number is written on the device: a copy would wait for all that a GPU has yet to do."""
    return of.to(device).reshape(-1) if isinstance(of, Tensor) else torch.full((1,), of, dtype=torch.int64, device=device)


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words (in int64 tensors) for each counter of four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The signed 64-bit product wraps, but its bits are those of the unsigned one.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p >> 32).bitwise_and_(_MASK).bitwise_xor_(c).bitwise_xor_(k) for p, c, k in ((p1, c1, k0), (p0, c3, k1)))
        c1, c3 = p1.bitwise_and_(_MASK), p0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: int, sample_id: Tensor) -> Tensor:
    """Uniform whole numbers below 2**32, int64 [B], that are a pure function of (seed, sample id); arguments as in `gaussian`."""
    ids, zero = sample_id.to(torch.int64), torch.zeros_like(sample_id, dtype=torch.int64)
    return philox((seed & _MASK, seed >> 32 & _MASK), (ids & _MASK, ids >> 32 & _MASK, zero, zero))[0]


def gaussian(seed: int, sample_id: Tensor, shape: tuple[int, ...], draw: int | Tensor = 0) -> Tensor:
    """Standard normal noise that is a pure function of (seed, sample id, draw).

    Args:
        seed: a 63-bit seed, as `derive` gives it.
        sample_id: int64 [B].
        shape: shape of one image, (C, H, W).
        draw: which of the image's noises, 0 to 2**32 - 1; one for all, or int64 [B].

    Returns:
        float64 [B, *shape].
    """
    n = math.prod(shape)
    ids = sample_id.to(torch.int64)[:, None]
    block = torch.arange((n + 3) // 4, device=ids.device)[None, :].expand(len(ids), -1)
    draws = whole_numbers(draw, ids.device)[:, None].expand_as(block)
    counter = ((ids & _MASK).expand_as(block), (ids >> 32 & _MASK).expand_as(block), draws, block)
    u = [word.to(torch.float64).add_(0.5).div_(2**32) for word in philox((seed & _MASK, seed >> 32 & _MASK), counter)]
    normals = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):  # Box-Muller
        r, angle = radius.log_().mul_(-2.0).sqrt_(), angle.mul_(2.0 * math.pi)
        normals += [angle.cos().mul_(r), angle.sin().mul_(r)]
    return torch.stack(normals, dim=-1).flatten(1)[:, :n].reshape(len(ids), *shape)
