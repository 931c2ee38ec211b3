"""Likelihood attack: the probability that the model itself gives to an image.

Hu & Pang, "Membership Inference of Diffusion Models", 2023 (arXiv 2301.09956), by the probability-flow ODE of Song et al.,
"Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021 (arXiv 2011.13456), the trace estimator of
Hutchinson (1990) and the embedded Runge-Kutta pair of Dormand & Prince (1980).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffmia_exp.attacks.base import Attack
from diffmia_exp.diffusion import Diffusion
from diffmia_exp.errors import ConfigError, UserError, number, whole
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.threat_models import BLOCK, WhiteBox

NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # the fifth-order result; its derivative starts the next step
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # fifth minus fourth order


class Likelihood(Attack):
    """The log-likelihood of the image under the model: members are more likely.

    score = log2 p(x_0) / (C H W), in bits per dimension (of densities on [-1, 1]), with a = alphas_cumprod and

        dx/dt = f(x, t) = (ln a)'(t) / 2 * (x - eps_t(x) / sqrt(1 - a_t)),      x_0 at t = 0
        ln p(x_0) = ln N(x_{T-1}; 0, I) + integral over t from 0 to T - 1 of div f(x_t, t)

    The timestep index t is taken as continuous: ln a is a monotone cubic through the schedule (see `LogAlphas`), and the net is
    asked at fractional t, as its sinusoidal embedding allows. div f is estimated by v^T (df/dx) v, v of random signs that belong to
    the image. Each image has its own step sizes, all of them powers of 2, so that rounding does not move the timesteps.

    Args:
        tolerance: error allowed per step: of x, relative plus absolute, root mean square over pixels; of ln p, in nats per dimension.
        probes: random vectors v per image.
        max_evaluations: evaluations of f granted to an image; if they do not suffice, the attack stops with an error.
        seed: of the probes.
    """

    access = WhiteBox

    def __init__(self, tolerance: float = 1e-2, probes: int = 1, max_evaluations: int = 600, seed: int = 0) -> None:
        self.tolerance = number("tolerance", tolerance, above=0, most=1)
        self.probes = whole("probes", probes, least=1)
        self.max_evaluations = whole("max_evaluations", max_evaluations, least=7)
        self.seed = whole("seed", seed, least=0)

    def nfe(self, T: int) -> int:
        """As declared in `Attack`, an upper bound: how many are spent depends on the image."""
        if T < 2:
            raise ConfigError("T", T, "must be at least 2 for the likelihood, an integral over t from 0 to T - 1")
        return (1 + self.probes) * self.max_evaluations

    def score(self, access: WhiteBox, x: Tensor, sample_id: Tensor) -> Tensor:
        shape, seed = tuple(x.shape[1:]), derive(self.seed, "score")
        v = torch.stack([gaussian(seed, sample_id, shape, draw).sign() for draw in range(self.probes)], 1)
        flow = Flow(access.diffusion)

        def f(y: Tensor, t: Tensor, which: Tensor) -> Tensor:
            access.count((1 + self.probes) * len(y))
            return flow(y[:, :-1].unflatten(1, shape), t, v[which])

        D = math.prod(shape)
        y = self.solve(f, torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1), end=flow.diffusion.T - 1)
        log_prior = -0.5 * (y[:, :-1].square().sum(1) + D * math.log(2 * math.pi))
        return (log_prior + y[:, -1]) / (D * math.log(2))

    def solve(self, f, y: Tensor, end: int) -> Tensor:  # type: ignore[no-untyped-def]
        """y(end) float64 [B, D + 1] from y(0), by Dormand-Prince steps of each image's own size.

        Args:
            f: dy/dt of (y [n, D + 1], t [n], which images these are [n]).
            y: float64, the pixels and, in the last column, ln p so far.
            end: the last t.
        """
        y, t, h = y.clone(), y.new_zeros(len(y)), y.new_ones(len(y))
        left = torch.arange(len(y), device=y.device)
        first, spent = f(y, t, left), 1
        while len(left):
            spent += 6
            if spent > self.max_evaluations:
                raise UserError(
                    f"attack.max_evaluations={self.max_evaluations}: too few for {len(left)} images (the slowest is at t={t.min():.0f} "
                    f"of {end}); raise it, or raise attack.tolerance={self.tolerance:g}"
                )
            now, start, k = y[left], t[left], [first[left]]
            step = torch.minimum(h[left], end - start)
            for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
                new = now + step[:, None] * sum(w * k_i for w, k_i in zip(weights, k, strict=True))
                k.append(f(new, start + node * step, left))
            error = (step[:, None] * sum(w * k_i for w, k_i in zip(ERROR, k, strict=True))).abs() / self.tolerance
            of_x = (error[:, :-1] / (1 + torch.maximum(now, new)[:, :-1].abs())).square().mean(1).sqrt()
            ratio = torch.maximum(of_x, error[:, -1] / (y.shape[1] - 1)).clamp(1e-9, 1e9)
            accepted = ratio <= 1
            growth = (0.9 * ratio**-0.2).log2().floor().clamp(-3, 3)
            h[left] = torch.where(accepted & (step < h[left]), h[left], step * 2**growth)
            done = left[accepted]
            y[done], t[done], first[done] = new[accepted], start[accepted] + step[accepted], k[-1][accepted]
            left = left[t[left] < end]
        return y


class LogAlphas:
    """ln alphas_cumprod at fractional t: a cubic Hermite curve through the schedule, monotone by its slopes.

    The slopes are harmonic means of the neighbouring differences (Fritsch & Butland 1984), so that (ln a)' is continuous.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.values = alphas_cumprod.double().log()
        d = self.values.diff()
        self.slopes = torch.cat([d[:1], 2 * d[1:] * d[:-1] / (d[1:] + d[:-1]), d[-1:]])

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """ln a and its derivative at t float64 [n] in [0, T - 1]."""
        i = t.floor().long().clamp(0, len(self.values) - 2)
        u = t - i
        low, rise, m0, m1 = self.values[i], self.values[i + 1] - self.values[i], self.slopes[i], self.slopes[i + 1]
        square, cube = 3 * rise - 2 * m0 - m1, m0 + m1 - 2 * rise
        return low + u * (m0 + u * (square + u * cube)), m0 + u * (2 * square + 3 * u * cube)


class Flow:
    """The right-hand side of the ODE, for pixels and ln p together."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion
        self.log_alphas = LogAlphas(diffusion.alphas_cumprod)
        parameter = next(diffusion.net.parameters(), None)
        self.time_dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32

    def __call__(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """(f, div f) float64 [n, D + 1] at x float64 [n, C, H, W], t [n], with probes v [n, probes, C, H, W].

        The net is run on exactly BLOCK rows at a time, short blocks padded: it then rounds an image alike in every batch.
        """
        parts = []
        for x_n, t_n, v_n in zip(x.split(BLOCK), t.split(BLOCK), v.split(BLOCK), strict=True):
            padding = BLOCK - len(x_n)
            padded = [torch.cat([w, w[:1].expand(padding, *w.shape[1:])]) for w in (x_n, t_n, v_n)]
            parts.append(self._block(*padded)[: len(x_n)])
        return torch.cat(parts)

    def _block(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        log_a, slope = self.log_alphas(t)
        column = (-1,) + (1,) * (x.ndim - 1)
        s = (-torch.expm1(log_a)).sqrt().reshape(column)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            eps = self._eps(x, t, (log_a / 2).exp().reshape(column), s)
            probes = v.unbind(1)
            products = [torch.autograd.grad((eps * w).sum(), x, retain_graph=i + 1 < len(probes))[0] for i, w in enumerate(probes)]
        traces = torch.stack([(p * w).flatten(1).sum(1) for p, w in zip(products, probes, strict=True)]).mean(0)
        f = 0.5 * slope.reshape(column) * (x - eps / s)
        divergence = 0.5 * slope * (x[0].numel() - traces / s.flatten())
        return torch.cat([f.flatten(1), divergence[:, None]], 1).detach()

    def _eps(self, x: Tensor, t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        out = self.diffusion(x, t.to(self.time_dtype))
        return {"epsilon": lambda: out, "v": lambda: a * out + s * x, "sample": lambda: (x - a * out) / s}[self.diffusion.prediction]()
