"""The mathematics of denoising diffusion (Ho et al. 2020; Song et al., DDIM, 2021): no Lightning, no Hydra, no files.

Notation: `alphas_cumprod[t]` = prod_{s<=t} (1 - beta_s) for t = 0 .. T-1; x_t = sqrt(alphas_cumprod[t]) x_0 +
sqrt(1 - alphas_cumprod[t]) eps. The index t = -1 stands for the clean image, where alphas_cumprod is 1. Images are in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from diffmia_exp.errors import ConfigError, choice, number, whole
from diffmia_exp.noise import derive, gaussian, whole_numbers

Timestep = int | Tensor
Label = int | Tensor | None
PREDICTIONS = ("epsilon", "v", "sample")


def linear(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """`alphas_cumprod` float64 [T] of betas rising linearly (Ho et al. 2020, section 4)."""
    whole("T", T, least=1)
    number("beta_start", beta_start, above=0, most=1)
    number("beta_end", beta_end, least=beta_start, most=0.9999)
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, T, dtype=torch.float64), 0)


def cosine(T: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """`alphas_cumprod` float64 [T] of the cosine schedule, betas capped (Nichol & Dhariwal 2021, equation 17)."""
    whole("T", T, least=1)
    number("s", s, above=0)
    number("max_beta", max_beta, above=0, most=0.9999)
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return torch.cumprod(1 - torch.clamp(1 - f[1:] / f[:-1], max=max_beta), 0)


class Schedule(nn.Module):
    """A noise schedule, and what follows from it without a network.

    Args:
        alphas_cumprod: [T], falling, within (0, 1).

    Raises:
        ConfigError: if the schedule is not such a sequence.
    """

    alphas_cumprod: Tensor

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        a = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        falling = a.ndim == 1 and len(a) > 0 and bool(((a > 0) & (a < 1)).all()) and bool((a.diff() < 0).all())
        if not falling:
            raise ConfigError("alphas_cumprod", f"tensor of shape {tuple(a.shape)}", "must fall strictly, within (0, 1)")
        self.register_buffer("alphas_cumprod", a, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Schedule:
        # `.half()` or `.float()` on a model must not round its schedule: follow the device only.
        exact = self.alphas_cumprod
        super()._apply(fn, recurse)
        self.alphas_cumprod = exact.to(self.alphas_cumprod.device)
        return self

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return len(self.alphas_cumprod)

    def coefficients(self, t: Timestep, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod[t]) and sqrt(1 - alphas_cumprod[t]) as [B or 1, 1, 1, 1], in the precision of x; t = -1 gives 1, 0."""
        t = whole_numbers(t, self.alphas_cumprod.device)
        a = torch.where(t < 0, torch.ones_like(self.alphas_cumprod[0]), self.alphas_cumprod[t.clamp(min=0)])
        shape = (-1,) + (1,) * (x.ndim - 1)
        return a.sqrt().to(x).reshape(shape), (1 - a).sqrt().to(x).reshape(shape)

    def q_sample(self, x0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """x_t = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) noise (Ho et al., equation 4)."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * noise

    def x0_from_eps(self, x_t: Tensor, t: Timestep, eps: Tensor) -> Tensor:
        """x0_hat = (x_t - sqrt(1 - alphas_cumprod[t]) eps) / sqrt(alphas_cumprod[t])."""
        a, s = self.coefficients(t, x_t)
        return (x_t - s * eps) / a

    def ddim(self, x_t: Tensor, t: Timestep, t_next: Timestep, eps: Tensor) -> Tensor:
        """The deterministic move from t to t_next, either way, given eps (Song et al., equation 12 with sigma = 0)."""
        a_next, s_next = self.coefficients(t_next, x_t)
        return a_next * self.x0_from_eps(x_t, t, eps) + s_next * eps


_label: ContextVar[Label] = ContextVar("label", default=None)


@contextmanager
def given(label: Label) -> Iterator[None]:
    """Meanwhile every conditional model is asked under this label: eps_t(x_t | label). Others do not heed it.

    It is no argument of `Diffusion`, so that an attack asks under its image's label, the target as well as models of its own, without
    knowing that there are labels.

    Args:
        label: a class, or one for each image int64 [B]; None for the null label, which says nothing.
    """
    token = _label.set(label)
    try:
        yield
    finally:
        _label.reset(token)


class Diffusion(nn.Module):
    """A network and its schedule: everything that training and attacks ask of a diffusion model.

    Args:
        net: maps (x_t [B, C, H, W], t int64 [B]) to a prediction of the same shape (or an object that holds it as `.sample`); that of a
            conditional model also takes `class_labels` int64 [B].
        alphas_cumprod: [T], see `Schedule`.
        prediction: what the net predicts: `epsilon`, `v` = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho 2022), or `sample` = x0.
        image_shape: (C, H, W), needed by `sample` only.
        n_classes: of a conditional model, whose classes are 0 to n_classes - 1; its null label, which stands for none of them, is
            n_classes (Ho & Salimans 2022, section 3.2). It is asked under what `given` says, the null label if nothing. None for an
            unconditional model.

    All methods compute in the precision of the images they are given; the net always runs in its own.
    """

    def __init__(
        self,
        net: nn.Module,
        alphas_cumprod: Tensor,
        prediction: str = "epsilon",
        image_shape: tuple[int, int, int] | None = None,
        n_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.schedule = Schedule(alphas_cumprod)
        self.prediction = choice("prediction", prediction, PREDICTIONS)
        self.image_shape = image_shape
        self.n_classes = n_classes

    @property
    def alphas_cumprod(self) -> Tensor:
        """float64 [T]."""
        return self.schedule.alphas_cumprod

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return self.schedule.T

    @property
    def device(self) -> torch.device:
        """Where the schedule, and so the net, lives."""
        return self.alphas_cumprod.device

    def forward(self, x_t: Tensor, t: Timestep) -> Tensor:
        """The net's raw prediction at x_t, in the precision of x_t."""
        parameter = next(self.net.parameters(), x_t)
        t = whole_numbers(t, x_t.device).expand(len(x_t))
        condition: dict[str, Tensor] = {}
        if self.n_classes is not None:
            label = _label.get()
            condition["class_labels"] = whole_numbers(self.n_classes if label is None else label, x_t.device).expand(len(x_t))
        out: Any = self.net(x_t.to(parameter.dtype), t, **condition)
        return (out if isinstance(out, Tensor) else out.sample).to(x_t.dtype)

    def q_sample(self, x0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """See `Schedule.q_sample`."""
        return self.schedule.q_sample(x0, t, noise)

    def eps(self, x_t: Tensor, t: Timestep) -> Tensor:
        """The predicted noise eps_t(x_t), whatever the net predicts."""
        out = self(x_t, t)
        if self.prediction == "epsilon":
            return out
        a, s = self.schedule.coefficients(t, x_t)
        return a * out + s * x_t if self.prediction == "v" else (x_t - a * out) / s

    def x0_hat(self, x_t: Tensor, t: Timestep) -> Tensor:
        """The predicted clean image."""
        if self.prediction == "sample":
            return self(x_t, t)
        return self.schedule.x0_from_eps(x_t, t, self.eps(x_t, t))

    def ddim_step(self, x_t: Tensor, t: Timestep, t_next: Timestep) -> Tensor:
        """One deterministic step from t to t_next, down (denoising) or up (inversion)."""
        return self.schedule.ddim(x_t, t, t_next, self.eps(x_t, t))

    def loss(self, x0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """Mean squared error of the prediction, per image [B] (Ho et al., equation 14, for `epsilon`)."""
        return (self(self.q_sample(x0, t, noise), t) - self.target(x0, t, noise)).square().flatten(1).mean(1)

    def target(self, x0: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """What the net is to predict at x_t, [B, C, H, W]."""
        a, s = self.schedule.coefficients(t, x0)
        return {"epsilon": noise, "v": a * noise - s * x0, "sample": x0}[self.prediction]

    @torch.no_grad()
    def sample(self, n: int, steps: int = 50, seed: int = 0, batch_size: int = 256, labels: Tensor | None = None) -> Tensor:
        """Draw images with `steps` deterministic DDIM steps, x0_hat clipped to [-1, 1].

        Args:
            n, steps, seed: how many, in how many steps, and of which noise.
            batch_size: images drawn at once.
            labels: int64 [n], the classes to draw from a conditional model (without guidance); None for each class in turn, image i
                of class i modulo `n_classes`.

        Returns:
            float32 [n, C, H, W] in [-1, 1]; image i is the same for every n and batch size.
        """
        whole("n", n, least=1)
        whole("steps", steps, least=1, most=self.T)
        if self.image_shape is None:
            raise ConfigError("image_shape", None, "must be given to Diffusion before it can sample")
        times = [*torch.linspace(self.T - 1, 0, steps, dtype=torch.float64).round().long().tolist(), -1]
        if self.n_classes is not None:
            labels = (torch.arange(n) % self.n_classes if labels is None else labels).to(self.device)
        drawn = []
        for ids in torch.arange(n, device=self.device).split(batch_size):
            x = gaussian(derive(seed, "sample"), ids, self.image_shape).float()
            with given(None if labels is None else labels[ids]):
                for t, t_next in pairwise(times):
                    a, s = self.schedule.coefficients(t, x)
                    x0 = self.x0_hat(x, t).clamp(-1, 1)
                    a_next, s_next = self.schedule.coefficients(t_next, x)
                    x = a_next * x0 + s_next * (x - a * x0) / s  # not by `ddim`, which would divide the rounding of x0 by a
            drawn.append(x)
        return torch.cat(drawn)
