"""DualMD: two networks, each trained on one half of the images, take turns.

"Dual-Model Defense: Safeguarding Diffusion Models from Membership Inference Attacks through Disjoint Data Splitting", 2024
(arXiv 2410.16657).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffmia_exp.data import Images
from diffmia_exp.defenses.base import Defense
from diffmia_exp.noise import philox

if TYPE_CHECKING:
    from diffmia_exp.lit import LitDiffusion


class Halves(nn.Module):
    """Two networks of one architecture, initialised apart.

    Args:
        make: gives a fresh one at each call.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b = make(), make()

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction [B, C, H, W] of the network whose turn it is at each t, int64 [B]."""
        second = turns(t)
        if not torch.is_grad_enabled() and bool((second == second[:1]).all()):  # what `torch.func.vmap` could not ask
            return predicted(self.b if bool(second[0]) else self.a, x_t, t)
        # All rows through both, for kernels round differently for other batch sizes.
        return torch.where(second.reshape(-1, 1, 1, 1), predicted(self.b, x_t, t), predicted(self.a, x_t, t))

    def each(self, x_t: Tensor, t: Tensor, second: Tensor) -> Tensor:
        """The predictions [B, C, H, W] of `b` where `second`, bool [B], and of `a` elsewhere; no row enters the other network."""
        out = torch.empty_like(x_t)
        for net, rows in ((self.a, ~second), (self.b, second)):
            if bool(rows.any()):
                out = out.index_put((rows.nonzero()[:, 0],), predicted(net, x_t[rows], t[rows]))
        return out


class DualMD(Defense):
    """The members are halved at random; each half trains a network of its own, and the service alternates between the two.

    eps_t(x_t) = eps^b_t(x_t) where a fixed hash of t is odd, else eps^a_t(x_t). An image is unknown to the network that answers at
    half of the timesteps. In the paper the networks take turns from one sampling step to the next; the hash stands in for that,
    being a function of t alone: a strided sampler meets both, and the service gives one answer to one question.
    """

    heeds_labels = False

    def network(self, make: Callable[[], nn.Module]) -> nn.Module:
        """See `Defense`."""
        return Halves(make)

    def lit(self, public: Images) -> Callable[..., LitDiffusion]:
        """See `Defense`."""
        from diffmia_exp.defenses.halves_training import LitDualMD  # seconds to import

        return LitDualMD


def turns(t: Tensor) -> Tensor:
    """Whether it is the second network's turn at each timestep, bool as t: a hash, the same in every model."""
    zeros = torch.zeros_like(t, dtype=torch.int64)
    return philox((0, 0), (t.long(), zeros, zeros, zeros))[0] % 2 == 1


def predicted(net: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    """What a network says, whether or not it wraps it as diffusers does."""
    out = net(x_t, t)
    return out if isinstance(out, Tensor) else out.sample
