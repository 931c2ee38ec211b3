from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from diffmia_exp.attacks.likelihood import Flow, Likelihood, LogAlphas
from diffmia_exp.diffusion import Diffusion, cosine, linear
from diffmia_exp.errors import ConfigError, UserError
from tests.attacks.conftest import Lab

SCHEDULE = linear(1000, 1e-4, 0.05)  # ends so close to N(0, I) that the prior is exact to 1e-5
MU, S = 0.3, 0.5


class Gaussian(nn.Module):
    """The exact prediction for data from N(mu, s^2 I)."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.log_alphas, self.prediction = LogAlphas(SCHEDULE), prediction
        self.mu = nn.Parameter(torch.tensor(MU, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.log_alphas(t)[0].exp()[:, None, None, None]
        eps = (1 - a).sqrt() * (x - a.sqrt() * self.mu) / (a * S**2 + 1 - a)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return {"epsilon": eps, "sample": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[self.prediction]


def density(x: Tensor) -> Tensor:
    """log2 of the marginal at t = 0, per dimension."""
    a = SCHEDULE[0]
    variance = a * S**2 + 1 - a
    nats = -0.5 * ((x - a.sqrt() * MU).square() / variance + (2 * math.pi * variance).log())
    return nats.flatten(1).mean(1) / math.log(2)


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return MU + S * torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_density_of_a_gaussian(prediction: str) -> None:
    """Every image's likelihood is the Gaussian's, ever closer as the tolerance falls; its divergence needs but one probe."""
    x, ids = images()
    errors = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        attack = Likelihood(tolerance, max_evaluations=2000)
        access = attack.access(Diffusion(Gaussian(prediction), SCHEDULE, prediction))
        score = attack.score(access, x, ids)
        assert score.dtype == torch.float64
        assert not score.requires_grad
        assert 0 < access.evaluations <= len(x) * attack.nfe(1000)
        errors.append(float((score - density(x)).abs().max()))
    assert errors[0] < 0.05
    assert errors[1] < 1e-3
    assert errors[2] < 1e-4


class LinearMap(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).reshape(x.shape)


def test_divergence_of_a_linear_map() -> None:
    """Any probe is exact if the map is diagonal; if not, all that there are, on average."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64), torch.tensor([0.0, 10.5, 900.25], dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    v = signs.reshape(1, 16, 1, 2, 2).expand(3, -1, -1, -1, -1)
    full = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    log_a, slope = LogAlphas(SCHEDULE)(t)
    for matrix, probes in ((full.diag().diag(), 1), (full, 16)):
        found = Flow(Diffusion(LinearMap(matrix), SCHEDULE))(x, t, v[:, :probes])[:, -1] / (0.5 * slope)
        exact = 4 - matrix.trace() / (1 - log_a.exp()).sqrt()
        torch.testing.assert_close(found.detach(), exact.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alphas_cumprod", [linear(1000), cosine(1000), linear(2)])
def test_the_continuous_schedule(alphas_cumprod: Tensor) -> None:
    """It meets the schedule at whole t, falls everywhere, and its derivative is that of its values."""
    curve, T = LogAlphas(alphas_cumprod), len(alphas_cumprod)
    torch.testing.assert_close(curve(torch.arange(T, dtype=torch.float64))[0], alphas_cumprod.log(), rtol=1e-12, atol=1e-14)
    t = torch.linspace(0, T - 1, 7919, dtype=torch.float64, requires_grad=True)
    value, slope = curve(t)
    assert bool((slope <= 0).all())
    torch.testing.assert_close(torch.autograd.grad(value.sum(), t)[0], slope, rtol=1e-9, atol=1e-14)


def test_too_few_evaluations(lab: Lab) -> None:
    attack = Likelihood(max_evaluations=13)
    with pytest.raises(UserError, match=r"attack\.max_evaluations=13.*tolerance"):
        attack.score(attack.access(lab.diffusion(torch.float32)), lab.x, lab.ids)
    with pytest.raises(ConfigError):
        attack.nfe(1)
