import numpy as np
import pytest
import torch
from scipy import stats

from diffmia_exp.attacks.trajectory import Trajectory, discretised_nll, posterior_variance
from diffmia_exp.diffusion import Schedule, linear
from tests.attacks.conftest import BETAS, A, Lab, T

STRIDE = 111  # 0, 111, .., 999


def posterior_mean(x0: np.ndarray, x_t: np.ndarray, t: int) -> np.ndarray:
    """Mean of q(x_{t-1} | x_t, x_0), Ho et al. equation 7."""
    before = A[t - 1]
    return np.sqrt(before) * BETAS[t] / (1 - A[t]) * x0 + np.sqrt(1 - BETAS[t]) * (1 - before) / (1 - A[t]) * x_t


def term(lab: Lab, x0: np.ndarray, n: int, t: int, quantity: str) -> float:
    eps = lab.noise(n, t, seed=3)
    x_t = np.sqrt(A[t]) * x0 + np.sqrt(1 - A[t]) * eps
    eps_hat = lab.eps(x_t, t)
    x0_hat = np.clip((x_t - np.sqrt(1 - A[t]) * eps_hat) / np.sqrt(A[t]), -1, 1)
    if quantity == "mse":
        return float(((eps_hat - eps) ** 2).mean())
    if quantity == "xstart_mse":
        return float(((x0_hat - x0) ** 2).mean())
    if t == 0:
        sigma = np.sqrt((1 - A[0]) / (1 - A[1]) * BETAS[1])
        q = stats.norm(x0_hat, sigma)
        inside = np.where(x0 > x0_hat, q.sf(x0 - 1 / 255) - q.sf(x0 + 1 / 255), q.cdf(x0 + 1 / 255) - q.cdf(x0 - 1 / 255))
        p = np.where(x0 < -0.999, q.cdf(x0 + 1 / 255), np.where(x0 > 0.999, q.sf(x0 - 1 / 255), inside))
        with np.errstate(divide="ignore"):
            return float(-np.log2(p).mean())
    variance = (1 - A[t - 1]) / (1 - A[t]) * BETAS[t]
    gap = posterior_mean(x0, x_t, t) - posterior_mean(x0_hat, x_t, t)
    kl = 0.5 * (np.log(BETAS[t] / variance) + (variance + gap**2) / BETAS[t] - 1)
    return float(kl.mean() / np.log(2))


def prior(x0: np.ndarray) -> float:
    mean, variance = np.sqrt(A[-1]) * x0, 1 - A[-1]
    return float((0.5 * (variance + mean**2 - 1 - np.log(variance))).mean() / np.log(2))


@pytest.mark.parametrize("quantity", ["vb", "mse", "xstart_mse"])
@pytest.mark.parametrize("statistic", ["mean", "median", "max", "min", "sum"])
def test_formula(lab: Lab, quantity: str, statistic: str) -> None:
    start, end = 1, -2

    def reference(x0: np.ndarray, n: int) -> float:
        values = [term(lab, x0, n, t, quantity) for t in range(0, T, STRIDE)]
        return -float(getattr(np, statistic)(sorted(values, reverse=True)[start:end]))

    lab.check(Trajectory(quantity, statistic, start, end, stride=STRIDE, seed=3), reference)


def test_formula_of_the_bounds(lab: Lab) -> None:
    # A random net's decoder at t = 0 is far off: its probabilities underflow where they are not computed as logarithms.
    def bound(x0: np.ndarray, n: int) -> float:
        return -(STRIDE * sum(term(lab, x0, n, t, "vb") for t in range(0, T, STRIDE)) + prior(x0))

    lab.check(Trajectory("total_bpd", stride=STRIDE, seed=3), bound)
    lab.check(Trajectory("prior_bpd"), lambda x0, n: -prior(x0))


def test_decoder_is_a_distribution_over_the_256_levels() -> None:
    levels = torch.arange(256, dtype=torch.float64)[:, None] / 127.5 - 1
    means = torch.tensor([-1.0, -0.4, 0.003, 1.0], dtype=torch.float64)[None]
    for sigma in (0.005, 0.1, 3.0):
        total = torch.exp(-discretised_nll(levels, means, torch.tensor(sigma, dtype=torch.float64))).sum(0)
        torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64), rtol=1e-9, atol=0)


def test_decoder_keeps_its_digits_in_the_tails() -> None:
    x = torch.tensor([0.5, -0.5], dtype=torch.float64)
    nll = discretised_nll(x, -x, torch.tensor(0.01, dtype=torch.float64))
    # 100 sigma away: -log(pdf at the nearer edge of the bin / hazard) to leading order
    z = (1.0 - 1 / 255) / 0.01
    expected = z**2 / 2 + np.log(z * np.sqrt(2 * np.pi)) + np.log1p(1 / z**2)
    torch.testing.assert_close(nll, torch.full((2,), expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_posterior_variance_against_bayes() -> None:
    # q(x_{t-1} | x_t, x_0) by multiplying two Gaussians: precision = alpha / beta + 1 / (1 - abar_{t-1})
    for t in (1, 2, 500, 999):
        expected = 1 / ((1 - BETAS[t]) / BETAS[t] + 1 / (1 - A[t - 1]))
        assert float(posterior_variance(Schedule(linear(T)).alphas_cumprod, t)) == pytest.approx(expected, rel=1e-9)
