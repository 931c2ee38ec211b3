from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from diffmia_exp.diffusion import PREDICTIONS, Diffusion, Schedule, cosine, linear
from diffmia_exp.errors import ConfigError
from diffmia_exp.evaluation import in_float32
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.threat_models import (
    LEVELS,
    GrayBox,
    QueryBudgetExceeded,
    SamplesOnly,
    ThreatModel,
    VariationAPI,
    WhiteBox,
    enough,
    level_of,
)

quick = settings(max_examples=50, deadline=None, derandomize=True)
SHAPE = (2, 4, 4)
SCHEDULES = {
    "linear": lambda: linear(1000),
    "short": lambda: linear(50, 1e-3, 0.2),
    "cosine": lambda: cosine(1000),
    "one": lambda: linear(1, 0.3, 0.3),
}
schedules = pytest.mark.parametrize("alphas_cumprod", [make() for make in SCHEDULES.values()], ids=list(SCHEDULES))
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On nets as small as these, a second thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


class Truth(nn.Module):
    """A net that knows the noise and the clean image, and answers in the given parametrisation."""

    def __init__(self, alphas_cumprod: Tensor, prediction: str, x0: Tensor, noise: Tensor) -> None:
        super().__init__()
        self.a, self.prediction, self.x0, self.noise = alphas_cumprod.numpy(), prediction, x0, noise

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a = torch.from_numpy(self.a[t.numpy()]).reshape(-1, 1, 1, 1)
        v = a**0.5 * self.noise - (1 - a) ** 0.5 * self.x0
        return {"epsilon": self.noise, "v": v, "sample": self.x0}[self.prediction].expand_as(x_t)


class OneImage(nn.Module):
    """The perfect denoiser of a data set of one image: E[x0 | x_t] is that image at every t."""

    def __init__(self, alphas_cumprod: Tensor, prediction: str, image: Tensor) -> None:
        super().__init__()
        self.a, self.prediction, self.image = alphas_cumprod, prediction, image

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a = self.a[t].reshape(-1, 1, 1, 1)
        noise = (x_t - a**0.5 * self.image) / (1 - a) ** 0.5
        return {"epsilon": noise, "v": a**0.5 * noise - (1 - a) ** 0.5 * self.image, "sample": self.image}[self.prediction].expand_as(x_t)


class Convolution(nn.Module):
    """A small nonlinear net that depends on t, and counts the distinct pairs of image and t it is run on, call by call."""

    def __init__(self, channels: int = SHAPE[0], seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner, self.outer = nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(6, channels, 3, padding=1)
        self.runs = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        assert t.dtype == torch.int64
        self.runs += len(torch.cat([x.flatten(1), t[:, None].to(x.dtype)], 1).unique(dim=0))
        return self.outer(torch.tanh(self.inner(x) + torch.cos(t.to(x.dtype) / 7).reshape(-1, 1, 1, 1)))


class Pointwise(nn.Module):
    """Treats every pixel alone, so that no rounding can depend on the batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(3 * x) * 1.5 + x / (2.0 + t.to(x.dtype).reshape(-1, 1, 1, 1))


def model(prediction: str = "epsilon", alphas_cumprod: Tensor | None = None, seed: int = 0) -> Diffusion:
    return Diffusion(
        Convolution(seed=seed).double(), linear(50, 1e-3, 0.2) if alphas_cumprod is None else alphas_cumprod, prediction, SHAPE
    )


# --- schedules


@pytest.mark.parametrize(("T", "start", "end"), [(1000, 1e-4, 0.02), (50, 1e-3, 0.2), (2, 0.1, 0.4), (7, 0.05, 0.05)])
def test_linear_is_the_product_of_its_betas(T: int, start: float, end: float) -> None:
    product, expected = 1.0, []
    for t in range(T):
        product *= 1 - (start + (end - start) * t / (T - 1))
        expected.append(product)
    got = linear(T, start, end)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert got[0].item() == pytest.approx(1 - start, rel=1e-15)
    assert (got[-1] / got[-2]).item() == pytest.approx(1 - end, rel=1e-12)


def test_linear_ends_where_ho_et_al_say() -> None:
    a = linear(1000)
    assert a[0].item() == pytest.approx(0.9999, rel=1e-15)
    assert a[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)  # KL(q(x_T | x_0) || N(0, I)) is about 1e-5 bits per dimension


@pytest.mark.parametrize(("T", "s", "cap"), [(1000, 0.008, 0.999), (40, 0.008, 0.999), (30, 0.1, 0.5), (1, 0.008, 0.999)])
def test_cosine_is_equation_17_with_capped_betas(T: int, s: float, cap: float) -> None:
    def f(t: int) -> float:
        return math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2

    product, expected = 1.0, []
    for t in range(1, T + 1):
        product *= 1 - min(1 - f(t) / f(t - 1), cap)
        expected.append(product)
    got = cosine(T, s, cap)
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    previous = got[-2] if T > 1 else torch.tensor(1.0)
    assert 1 - (got[-1] / previous).item() == pytest.approx(cap)  # the last beta would be 1


def test_cosine_follows_f_until_the_cap() -> None:
    T, s = 1000, 0.008
    t = torch.arange(1, T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2
    np.testing.assert_allclose(cosine(T)[:-1], f[:-1], rtol=1e-9)
    assert cosine(T)[0] > linear(T)[0] - 1e-4
    assert cosine(T)[T // 2] > 6 * linear(T)[T // 2]  # information is destroyed later


@pytest.mark.parametrize(("name", "make"), [("linear", linear), ("squaredcos_cap_v2", cosine)])
def test_schedules_equal_those_of_diffusers(name: str, make: Callable[[int], Tensor]) -> None:
    np.testing.assert_allclose(make(1000), DDPMScheduler(1000, beta_schedule=name).alphas_cumprod, rtol=2e-3, atol=1e-7)  # float32
    np.testing.assert_allclose(make(1000)[:900], DDPMScheduler(1000, beta_schedule=name).alphas_cumprod[:900], rtol=5e-5)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: linear(0), "T"),
        (lambda: linear(10.0), "T"),
        (lambda: linear(10, 0), "beta_start"),
        (lambda: linear(10, 0.1, 0.05), "beta_end"),
        (lambda: linear(10, 0.1, 1), "beta_end"),
        (lambda: linear(10, float("nan")), "beta_start"),
        (lambda: cosine(0), "T"),
        (lambda: cosine(10, 0), "s"),
        (lambda: cosine(10, 0.008, 1), "max_beta"),
        (lambda: Diffusion(Pointwise(), linear(10), "noise"), "prediction"),
        *[
            (lambda a=a: Schedule(torch.tensor(a)), "alphas_cumprod")
            for a in (
                [],
                [0.5, 0.5],
                [0.5, 0.6],
                [1.0, 0.5],
                [0.5, 0.0],
                [0.5, -0.1],
                [float("nan")],
                [0.9, float("nan")],
                [[0.9, 0.5]],
                0.5,
            )
        ],
    ],
)
def test_impossible_schedules_are_refused(make: Callable[[], object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}="):
        make()


@schedules
def test_coefficients_square_to_one_and_are_those_of_t(alphas_cumprod: Tensor) -> None:
    schedule = Schedule(alphas_cumprod)
    t = torch.arange(-1, schedule.T)
    a, s = schedule.coefficients(t, torch.empty(1, 3, 2, 2, dtype=torch.float64))
    assert a.shape == s.shape == (schedule.T + 1, 1, 1, 1)
    np.testing.assert_allclose((a**2 + s**2).flatten(), 1, rtol=1e-15)
    np.testing.assert_allclose((a**2).flatten()[1:], alphas_cumprod, rtol=1e-14)
    assert (a[0].item(), s[0].item()) == (1, 0)
    for i in (0, schedule.T // 2, schedule.T):
        one = schedule.coefficients(int(t[i]), torch.empty(5, 2, dtype=torch.float64))
        assert [c.shape for c in one] == [(1, 1), (1, 1)]
        assert [c.item() for c in one] == [a[i].item(), s[i].item()]


def test_minus_one_is_the_clean_image() -> None:
    schedule, x0, noise = Schedule(linear(1000)), images(3), normal(3, *SHAPE)
    assert torch.equal(schedule.q_sample(x0, -1, noise), x0)
    assert torch.equal(schedule.x0_from_eps(x0, -1, noise), x0)
    assert torch.equal(schedule.ddim(x0, -1, -1, noise), x0)
    up = schedule.ddim(x0, -1, torch.tensor([-1, 0, 999]), noise)
    assert torch.equal(up, schedule.q_sample(x0, torch.tensor([-1, 0, 999]), noise))


@pytest.mark.parametrize("T", [50, 1000])
def test_a_timestep_beyond_the_schedule_is_an_error(T: int) -> None:
    with pytest.raises(IndexError):
        Schedule(linear(T)).q_sample(images(1), T, normal(1, *SHAPE))


# --- q_sample and its inverses


@schedules
def test_q_sample_has_the_moments_of_equation_4(alphas_cumprod: Tensor) -> None:
    schedule, n = Schedule(alphas_cumprod), 40_000
    for t in {0, schedule.T // 2, schedule.T - 1}:
        x0 = torch.full((n, 1, 1, 1), 0.7, dtype=torch.float64)
        x_t = schedule.q_sample(x0, t, normal(n, 1, 1, 1, seed=t)).flatten()
        mean, sd = alphas_cumprod[t].sqrt().item() * 0.7, (1 - alphas_cumprod[t]).sqrt().item()
        assert stats.kstest(x_t.numpy(), "norm", (mean, sd)).pvalue > 1e-3
        assert x_t.mean().item() == pytest.approx(mean, abs=4 * sd / math.sqrt(n))
        assert x_t.std().item() == pytest.approx(sd, rel=4 / math.sqrt(2 * n))


@schedules
def test_single_noising_steps_add_up_to_q_sample(alphas_cumprod: Tensor) -> None:
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps_t, in mean and variance, step by step."""
    mean, variance, previous = 1.0, 0.0, 1.0
    schedule = Schedule(alphas_cumprod)
    one = torch.ones(1, 1, dtype=torch.float64)
    for t, a in enumerate(alphas_cumprod.tolist()):
        beta = 1 - a / previous
        mean, variance, previous = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta, a
        assert schedule.q_sample(one, t, 0 * one).item() == pytest.approx(mean, rel=1e-10)
        assert schedule.q_sample(0 * one, t, one).item() ** 2 == pytest.approx(variance, rel=1e-10)


@schedules
def test_x0_from_eps_inverts_q_sample(alphas_cumprod: Tensor) -> None:
    schedule = Schedule(alphas_cumprod)
    t = torch.linspace(-1, schedule.T - 1, 9, dtype=torch.float64).long()
    x0, noise = images(9), normal(9, *SHAPE)
    rounding = 1e-15 / alphas_cumprod[-1].sqrt().item()
    np.testing.assert_allclose(schedule.x0_from_eps(schedule.q_sample(x0, t, noise), t, noise), x0, rtol=0, atol=1e-13 + 10 * rounding)


@quick
@given(st.sampled_from(["linear", "short"]), st.lists(st.integers(-1, 999), min_size=2, max_size=6), st.integers(0, 99))
def test_ddim_up_and_down_with_the_same_eps_is_the_identity(name: str, path: list[int], seed: int) -> None:
    schedule = Schedule(SCHEDULES[name]())
    path = [min(t, schedule.T - 1) for t in path]
    x, eps = images(3, seed), normal(3, *SHAPE, seed=seed)
    moved = x
    for t, t_next in zip(path, [*path[1:], path[0]], strict=True):
        moved = schedule.ddim(moved, t, t_next, eps)
    np.testing.assert_allclose(moved, x, rtol=0, atol=1e-12)
    direct = schedule.ddim(x, path[0], path[-1], eps)  # and the way does not matter
    for t, t_next in pairwise(path):
        x = schedule.ddim(x, t, t_next, eps)
    np.testing.assert_allclose(x, direct, rtol=0, atol=1e-12)


@schedules
def test_ddim_moves_along_q_sample(alphas_cumprod: Tensor) -> None:
    schedule, x0, noise = Schedule(alphas_cumprod), images(2), normal(2, *SHAPE)
    now, then = torch.tensor([schedule.T - 1, 0]), torch.tensor([-1, schedule.T - 1])
    got = schedule.ddim(schedule.q_sample(x0, now, noise), now, then, noise)
    np.testing.assert_allclose(got, schedule.q_sample(x0, then, noise), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "short", "cosine"])
def test_ddim_with_posterior_variance_is_the_posterior_of_ho_et_al(name: str) -> None:
    """With sigma^2 = beta~_t, DDIM's equation 12 is q(x_{t-1} | x_t, x_0) of DDPM's equations 6 and 7."""
    alphas_cumprod = SCHEDULES[name]()
    schedule, x_t, eps = Schedule(alphas_cumprod), normal(1, *SHAPE, seed=1), normal(1, *SHAPE, seed=2)
    for t in (1, 2, schedule.T // 3, schedule.T - 2):
        a, previous = alphas_cumprod[t].item(), alphas_cumprod[t - 1].item()
        alpha = a / previous
        beta_tilde = (1 - previous) / (1 - a) * (1 - alpha)
        x0 = schedule.x0_from_eps(x_t, t, eps)
        posterior = math.sqrt(previous) * (1 - alpha) / (1 - a) * x0 + math.sqrt(alpha) * (1 - previous) / (1 - a) * x_t
        deterministic = schedule.ddim(x_t, t, t - 1, eps)
        direction = deterministic - math.sqrt(previous) * x0  # sqrt(1 - previous) eps
        with_variance = math.sqrt(previous) * x0 + math.sqrt((1 - previous - beta_tilde) / (1 - previous)) * direction
        np.testing.assert_allclose(with_variance, posterior, rtol=1e-8, atol=1e-8)


def test_ddim_step_equals_diffusers() -> None:
    theirs = DDIMScheduler(1000, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(10, device="cpu")
    diffusion = Diffusion(Convolution().double(), linear(1000))
    x = normal(2, *SHAPE)
    for t in theirs.timesteps.tolist():
        expected = theirs.step(diffusion.eps(x, t), t, x, eta=0.0).prev_sample
        np.testing.assert_allclose(diffusion.ddim_step(x, t, t - 100 if t >= 100 else -1).detach(), expected.detach(), atol=1e-4)


# --- the three parametrisations


@schedules
@predictions
def test_parametrisations_agree_on_the_truth(alphas_cumprod: Tensor, prediction: str) -> None:
    x0, noise = images(5), normal(5, *SHAPE)
    diffusion = Diffusion(Truth(alphas_cumprod, prediction, x0, noise), alphas_cumprod, prediction)
    t = torch.linspace(0, diffusion.T - 1, 5, dtype=torch.float64).long()
    x_t = diffusion.q_sample(x0, t, noise)
    amplified = 1e-14 / alphas_cumprod[-1].sqrt().item()
    np.testing.assert_allclose(diffusion.eps(x_t, t), noise, rtol=0, atol=1e-12)
    np.testing.assert_allclose(diffusion.x0_hat(x_t, t), x0, rtol=0, atol=1e-12 + amplified)
    np.testing.assert_allclose(diffusion.loss(x0, t, noise), 0, atol=1e-20)
    np.testing.assert_allclose(diffusion.ddim_step(x_t, t, -1), x0, rtol=0, atol=1e-12 + amplified)
    down = (t - 3).clamp(min=-1)
    np.testing.assert_allclose(diffusion.ddim_step(x_t, t, down), diffusion.q_sample(x0, down, noise), rtol=0, atol=1e-12 + amplified)


@predictions
def test_eps_and_x0_hat_always_rebuild_x_t(prediction: str) -> None:
    """x_t = sqrt(a) x0_hat + sqrt(1 - a) eps, whatever a net says."""
    diffusion, x_t, t = model(prediction), normal(4, *SHAPE), torch.tensor([0, 7, 30, 49])
    np.testing.assert_allclose(diffusion.q_sample(diffusion.x0_hat(x_t, t), t, diffusion.eps(x_t, t)).detach(), x_t, rtol=0, atol=1e-12)


@predictions
def test_losses_are_weightings_of_one_error(prediction: str) -> None:
    """|eps - eps_hat|^2 = (a / (1 - a)) |x0 - x0_hat|^2, and the v loss is |x0 - x0_hat|^2 / (1 - a) (Salimans & Ho 2022)."""
    diffusion, x0, noise, t = model(prediction), images(4), normal(4, *SHAPE), torch.tensor([0, 7, 30, 49])
    x_t, a = diffusion.q_sample(x0, t, noise), diffusion.alphas_cumprod[t]
    error = (diffusion.x0_hat(x_t, t) - x0).square().mean((1, 2, 3))
    weight = {"epsilon": a / (1 - a), "v": 1 / (1 - a), "sample": torch.ones(4)}[prediction]
    np.testing.assert_allclose(diffusion.loss(x0, t, noise).detach(), (weight * error).detach(), rtol=1e-9)


def test_loss_is_a_mean_per_image() -> None:
    diffusion, x0, noise = model(), images(4), normal(4, *SHAPE)
    t = torch.tensor([0, 7, 30, 49])
    together = diffusion.loss(x0, t, noise)
    assert together.shape == (4,)
    for i in range(4):
        a = diffusion.alphas_cumprod[t[i]].item()
        out = diffusion.net((math.sqrt(a) * x0[i] + math.sqrt(1 - a) * noise[i])[None], t[i : i + 1])[0]
        assert together[i].item() == pytest.approx(((out - noise[i]) ** 2).sum().item() / 32, rel=1e-12)
    np.testing.assert_allclose(diffusion.loss(x0, 7, noise)[1].item(), together[1].item(), rtol=1e-12)  # an int t is that of all


@predictions
def test_an_output_object_is_as_good_as_a_tensor(prediction: str) -> None:
    class Wrapped(Convolution):
        def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:  # type: ignore[override]
            return SimpleNamespace(sample=super().forward(x, t))

    plain, wrapped = model(prediction), Diffusion(Wrapped().double(), linear(50, 1e-3, 0.2), prediction)
    x = normal(3, *SHAPE)
    assert torch.equal(plain.eps(x, 5), wrapped.eps(x, 5))


# --- precision and gradients


@pytest.mark.parametrize(
    "move",
    [
        lambda d: d.half(),
        lambda d: d.float(),
        lambda d: d.double(),
        lambda d: d.bfloat16(),
        lambda d: d.to(torch.float16),
        lambda d: d.to("cpu", torch.float32),
        lambda d: d.half().float(),
        lambda d: copy.deepcopy(d).half(),
        lambda d: nn.ModuleDict({"ema": d}).half()["ema"],
    ],
)
def test_no_move_rounds_the_schedule(move: Callable[[Diffusion], Diffusion]) -> None:
    exact = linear(1000)
    moved = move(Diffusion(Convolution(), exact))
    assert moved.alphas_cumprod.dtype == torch.float64
    assert torch.equal(moved.alphas_cumprod, exact)
    assert "alphas_cumprod" in dict(moved.schedule.named_buffers())
    assert moved.alphas_cumprod is moved.schedule.get_buffer("alphas_cumprod")


def test_moves_do_convert_the_net() -> None:
    assert next(Diffusion(Convolution(), linear(10)).half().parameters()).dtype == torch.float16
    assert next(Diffusion(Convolution(), linear(10)).double().parameters()).dtype == torch.float64


def test_the_schedule_follows_the_device() -> None:
    moved = Diffusion(Convolution(), linear(10)).to("meta")
    assert moved.alphas_cumprod.device == moved.device == torch.device("meta")
    assert moved.alphas_cumprod.dtype == torch.float64


def test_the_schedule_is_not_part_of_the_weights() -> None:
    assert set(model().state_dict()) == {f"net.{name}" for name in Convolution().state_dict()}


def test_scoring_turns_tf32_off_and_leaves_cudnn_on() -> None:
    before = torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32
    with in_float32():
        assert torch.backends.cudnn.enabled
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32) == before == (True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_precision_of_the_images(dtype: torch.dtype) -> None:
    for net_dtype in (torch.float32, torch.float64):
        diffusion = Diffusion(Convolution().to(net_dtype), linear(50))
        x, noise = images(2).to(dtype), normal(2, *SHAPE).to(dtype)
        results = [diffusion(x, 3), diffusion.eps(x, 3), diffusion.x0_hat(x, 3), diffusion.q_sample(x, 3, noise)]
        results += [diffusion.ddim_step(x, 3, 5), diffusion.loss(x, 3, noise)]
        assert {r.dtype for r in results} == {dtype}


def test_float32_agrees_with_float64() -> None:
    diffusion, x = model(), normal(4, *SHAPE)
    exact = diffusion.ddim_step(x, 40, 20)
    np.testing.assert_allclose(copy.deepcopy(diffusion).float().ddim_step(x.float(), 40, 20).detach(), exact.detach(), atol=1e-5)


@predictions
def test_the_loss_has_the_gradient_of_finite_differences(prediction: str) -> None:
    diffusion, x0, noise, t = model(prediction), images(2), normal(2, *SHAPE), torch.tensor([3, 40])
    parameters = list(diffusion.parameters())
    gradients = torch.autograd.grad(diffusion.loss(x0, t, noise).mean(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.abs().max() > 0
        at = int(gradient.abs().argmax())
        values = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[at] += shift
                values.append(diffusion.loss(x0, t, noise).mean().item())
                parameter.view(-1)[at] -= shift
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient.view(-1)[at].item(), rel=1e-6)


@predictions
def test_every_map_differentiates_with_respect_to_the_image(prediction: str) -> None:
    diffusion, noise = model(prediction), normal(1, *SHAPE)
    x = images(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diffusion.loss(x, 7, noise), x, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: diffusion.ddim_step(x, 7, 20), x, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: diffusion.x0_hat(x, 7), x, fast_mode=True)


def test_training_learns_one_image() -> None:
    diffusion, x0 = Diffusion(Convolution(), linear(50, 1e-3, 0.2), "sample"), images(1).float()
    optimiser = torch.optim.Adam(diffusion.parameters(), 0.02)
    losses = []
    for step in range(80):
        t = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(step))
        loss = diffusion.loss(x0.expand(16, -1, -1, -1), t, normal(16, *SHAPE, seed=step).float()).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])


# --- sampling


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_an_image_is_the_same_for_every_n_and_batch_size(steps: int) -> None:
    diffusion = Diffusion(Pointwise(), linear(50, 1e-3, 0.2), image_shape=SHAPE)
    many = diffusion.sample(11, steps, seed=4)
    assert many.shape == (11, *SHAPE)
    assert many.dtype == torch.float32
    for n, batch_size in ((11, 1), (11, 4), (11, 100), (1, 256), (6, 5)):
        assert torch.equal(diffusion.sample(n, steps, 4, batch_size), many[:n])
    assert torch.equal(diffusion.sample(11, steps, seed=4), many)


def test_convolutions_give_the_same_images_but_for_rounding() -> None:
    diffusion = Diffusion(Convolution(), linear(50, 1e-3, 0.2), image_shape=SHAPE)
    np.testing.assert_allclose(diffusion.sample(9, 10), diffusion.sample(9, 10, batch_size=2), atol=1e-5)


def test_sampling_touches_no_global_generator_and_leaves_no_graph() -> None:
    diffusion = Diffusion(Convolution(), linear(50, 1e-3, 0.2), image_shape=SHAPE)
    before = torch.random.get_rng_state()
    drawn = diffusion.sample(2, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not drawn.requires_grad


def test_images_and_seeds_differ() -> None:
    diffusion = Diffusion(Pointwise(), linear(50, 1e-3, 0.2), image_shape=SHAPE)
    drawn = torch.cat([diffusion.sample(8, 10, seed) for seed in (0, 1)])
    assert len({image.numpy().tobytes() for image in drawn}) == 16


class Saturated(nn.Module):
    """Wants every pixel far outside [-1, 1]."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 1e4 * torch.sign(x)


@schedules
@predictions
def test_samples_stay_within_minus_one_and_one(alphas_cumprod: Tensor, prediction: str) -> None:
    diffusion = Diffusion(Saturated(), alphas_cumprod, prediction, SHAPE)
    for steps in {1, min(3, diffusion.T), min(50, diffusion.T)}:
        drawn = diffusion.sample(16, steps)
        assert drawn.abs().max() <= 1
        assert drawn.abs().max() > 0.99  # and fill it


@schedules
@predictions
def test_the_perfect_denoiser_of_one_image_samples_that_image(alphas_cumprod: Tensor, prediction: str) -> None:
    image = images(1, seed=3)[0].float()
    diffusion = Diffusion(OneImage(alphas_cumprod.float(), prediction, image), alphas_cumprod, prediction, SHAPE)
    for steps in {1, min(2, diffusion.T), min(50, diffusion.T)}:
        # One step from x_T divides the rounding of the prediction by sqrt(alphas_cumprod[T - 1]); a net that names x0 has none.
        last = diffusion.T - 1 if steps == 1 else 0
        rounding = 0 if prediction == "sample" else 2e-5 / alphas_cumprod[last].sqrt().item()
        np.testing.assert_allclose(diffusion.sample(3, steps), image.expand(3, *SHAPE), rtol=0, atol=rounding)


def test_the_perfect_denoiser_of_a_gaussian_samples_that_gaussian() -> None:
    """For x0 ~ N(m, d^2) the sampler's ODE has a solution: x_0 = m + d (x_T - sqrt(a_T) m) / sqrt(a_T d^2 + 1 - a_T)."""
    a, m, d = linear(1000), 0.1, 0.15

    class Gaussian(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            at = a[t].reshape(-1, 1, 1, 1)
            return ((1 - at).sqrt() * (x - at.sqrt() * m) / (at * d**2 + 1 - at)).to(x)

    drawn = Diffusion(Gaussian(), a, image_shape=(1, 8, 8)).sample(20, 1000, seed=2)
    x_T = gaussian(derive(2, "sample"), torch.arange(20), (1, 8, 8))
    expected = m + d * (x_T - a[-1].sqrt() * m) / (a[-1] * d**2 + 1 - a[-1]).sqrt()
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=0.01)
    assert stats.kstest(drawn.numpy().ravel(), "norm", (m, d)).pvalue > 1e-3


def test_the_sampler_visits_evenly_spaced_steps_from_the_last_to_the_first() -> None:
    class Recorder(Pointwise):
        seen: list[int] = []  # noqa: RUF012

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.seen.append(int(t[0]))
            return super().forward(x, t)

    for T, steps in ((1000, 50), (1000, 1000), (50, 7), (10, 10), (10, 1), (7, 6)):
        net = Recorder()
        net.seen = []
        Diffusion(net, linear(T), image_shape=SHAPE).sample(1, steps)
        assert len(net.seen) == steps
        assert net.seen[0] == T - 1
        assert steps == 1 or net.seen[-1] == 0
        gaps = -np.diff(net.seen)
        assert steps == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize(("n", "steps", "key"), [(0, 5, "n"), (-1, 5, "n"), (2, 0, "steps"), (2, 51, "steps"), (2.0, 5, "n")])
def test_impossible_samples_are_refused(n: int, steps: int, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}="):
        model().sample(n, steps)


def test_sampling_needs_the_shape_of_an_image() -> None:
    with pytest.raises(ConfigError, match=r"^image_shape=null"):
        Diffusion(Pointwise(), linear(50)).sample(1)


# --- access classes

ORDER = ["samples_only", "variation_api", "gray_box", "white_box"]
GRANTED = {
    "samples_only": {"sample"},
    "variation_api": {"sample", "vary"},
    "gray_box": {"sample", "vary", "eps", "x0_hat", "schedule"},
    "white_box": {"sample", "vary", "eps", "x0_hat", "schedule", "diffusion", "count"},
}


@pytest.mark.parametrize("level", ORDER)
def test_a_level_exposes_what_it_grants_and_no_more(level: str) -> None:
    access = LEVELS[level](model())
    public = {name for name in dir(access) if not name.startswith("_")}
    assert public == GRANTED[level] | {"budget", "evaluations"}
    assert level_of(type(access)) == level
    assert not isinstance(access, nn.Module)
    assert not any(isinstance(value, nn.Module) for name, value in vars(access).items() if not name.startswith("_"))


def test_levels_inherit_in_order() -> None:
    assert list(LEVELS) == ORDER
    assert list(LEVELS.values()) == [SamplesOnly, VariationAPI, GrayBox, WhiteBox]
    for below, above in pairwise(ORDER):
        assert LEVELS[below] in LEVELS[above].__bases__


@pytest.mark.parametrize("level", ORDER)
@pytest.mark.parametrize("needed", ORDER)
def test_a_threat_model_grants_its_level_and_those_below(level: str, needed: str) -> None:
    threat_model, cls = ThreatModel(level, query_budget=3), LEVELS[needed]
    may = ORDER.index(needed) <= ORDER.index(level)
    assert threat_model.grants(cls) is may
    assert enough(cls).split(" or ") == ORDER[ORDER.index(needed) :]
    if may:
        access = threat_model.grant(model(), cls, images=7)
        assert type(access) is cls  # the least that the attack needs
        assert (access.budget, access.evaluations) == (21, 0)
        assert ThreatModel(level).grant(model(), cls, images=7).budget is None
    else:
        with pytest.raises(ConfigError, match=f"^access={level}: must be {enough(cls)} for this attack$"):
            threat_model.grant(model(), cls, images=7)


@pytest.mark.parametrize(
    ("access", "budget", "message"),
    [
        ("grey_box", None, "access=grey_box: .*did you mean gray_box"),
        ("gray_box", 0, "^query_budget=0"),
        ("gray_box", 1.5, "^query_budget=1.5"),
    ],
)
def test_impossible_threat_models_are_refused(access: str, budget: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ThreatModel(access, budget)


IDS = torch.tensor([5, 900, -3])
CALLS: dict[str, tuple[Callable[[WhiteBox], Tensor], int]] = {
    "sample": (lambda a: a.sample(4, steps=6), 24),
    "sample once": (lambda a: a.sample(1, steps=1), 1),
    "vary": (lambda a: a.vary(images(3), IDS, 0.5, steps=4), 12),
    "vary in one step": (lambda a: a.vary(images(3), IDS, 1.0, steps=1), 3),
    "eps": (lambda a: a.eps(images(5), 9), 5),
    "eps at many t": (lambda a: a.eps(images(3), torch.tensor([0, 9, 49])), 3),
    "x0_hat": (lambda a: a.x0_hat(images(2), 9), 2),
}


@pytest.mark.parametrize("name", CALLS)
@predictions
def test_evaluations_are_those_of_the_net(name: str, prediction: str) -> None:
    call, cost = CALLS[name]
    diffusion = model(prediction)
    access = WhiteBox(diffusion)
    for n in (1, 2):
        result = call(access)
        assert access.evaluations == diffusion.net.runs == n * cost
        assert not result.requires_grad
        assert result.grad_fn is None


@pytest.mark.parametrize("name", CALLS)
def test_a_call_past_the_budget_neither_runs_nor_counts(name: str) -> None:
    call, cost = CALLS[name]
    diffusion = model()
    access = WhiteBox(diffusion, budget=2 * cost)
    call(access)
    call(access)  # the last evaluation granted may be spent
    assert access.evaluations == diffusion.net.runs == 2 * cost
    for _ in range(2):
        with pytest.raises(QueryBudgetExceeded, match=f"asked for {3 * cost} model evaluations in all, {2 * cost} are granted"):
            call(access)
    assert access.evaluations == diffusion.net.runs == 2 * cost
    short = WhiteBox(diffusion, budget=cost - 1)
    with pytest.raises(QueryBudgetExceeded):
        call(short)
    assert short.evaluations == 0


def test_a_refused_call_leaves_the_budget_for_a_cheaper_one() -> None:
    access = GrayBox(model(), budget=4)
    access.eps(images(3), 1)
    with pytest.raises(QueryBudgetExceeded):
        access.eps(images(2), 1)
    assert access.eps(images(1), 1).shape == (1, *SHAPE)
    assert access.evaluations == 4


def test_declared_evaluations_count_and_cannot_be_taken_back() -> None:
    access = WhiteBox(model(), budget=10)
    access.count(7)
    assert access.evaluations == 7
    with pytest.raises(QueryBudgetExceeded):
        access.count(4)
    for bad in (-1, 1.5):
        with pytest.raises(ConfigError):
            access.count(bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        access.sample(-1)
    assert access.evaluations == 7
    access.count(0)
    access.count(3)
    assert access.evaluations == 10


@pytest.mark.parametrize("budget", [-1, 2.5, "many"])
def test_impossible_budgets_are_refused(budget: object) -> None:
    with pytest.raises(ConfigError, match=r"^budget="):
        SamplesOnly(model(), budget)  # type: ignore[arg-type]


@predictions
def test_answers_are_those_of_the_target(prediction: str) -> None:
    diffusion = model(prediction)
    access, x, t = WhiteBox(diffusion), normal(3, *SHAPE), torch.tensor([0, 9, 49])
    assert access.diffusion is diffusion
    assert access.schedule is diffusion.schedule
    assert torch.equal(access.eps(x, t), diffusion.eps(x, t).detach())
    assert torch.equal(access.x0_hat(x, t), diffusion.x0_hat(x, t).detach())
    assert torch.equal(access.sample(3, 5, 8), diffusion.sample(3, 5, 8))


def test_a_graph_in_the_query_does_not_come_back_with_the_answer() -> None:
    access, x = WhiteBox(model()), images(3).requires_grad_()
    for answer in (access.eps(x, 3), access.x0_hat(x, 3), access.vary(x, IDS)):
        assert not answer.requires_grad


def test_white_box_gradients_are_the_targets() -> None:
    access = WhiteBox(model())
    access.diffusion.loss(images(2), 5, normal(2, *SHAPE)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in access.diffusion.parameters())


@pytest.mark.parametrize("name", CALLS)
def test_answers_can_enter_white_box_gradients(name: str) -> None:
    """An answer is an ordinary tensor: the net may be differentiated at it, and it may itself be made a leaf."""
    access = WhiteBox(model())
    answer = CALLS[name][0](access).double()
    by_weights = torch.autograd.grad(access.diffusion.eps(answer, 5).square().sum(), access.diffusion.net.inner.weight)[0]
    by_image = torch.autograd.grad(access.diffusion.eps(answer.requires_grad_(), 5).square().sum(), answer)[0]
    assert by_weights.abs().max() > 0
    assert by_image.abs().max() > 0


# --- vary


class Zero(nn.Module):
    """Sees no noise anywhere."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(("strength", "t"), [(1.0, 49), (0.5, 24), (0.2, 9), (0.02, 0), (1e-9, 0)])
def test_vary_noises_to_its_strength(strength: float, t: int) -> None:
    """Where the net sees no noise, what comes back is x_t / sqrt(alphas_cumprod[t]), in any number of steps."""
    a = linear(50, 1e-3, 0.2)
    access, x = VariationAPI(Diffusion(Zero(), a)), images(3) / 2
    noise = gaussian(derive(6, "vary"), IDS, SHAPE, 2)
    expected = (x + ((1 - a[t]) / a[t]).sqrt() * noise).clamp(-1, 1)
    for steps in {1, min(3, t + 1), t + 1}:
        np.testing.assert_allclose(access.vary(x, IDS, strength, steps, seed=6, draw=2), expected, rtol=0, atol=1e-12)


@predictions
def test_vary_with_strength_near_zero_returns_the_image(prediction: str) -> None:
    access, x = VariationAPI(model(prediction, linear(1000, 1e-10, 0.02))), images(3)
    if prediction == "sample":  # such a net may still name another image: only its noise has vanished
        np.testing.assert_allclose(access.vary(x, IDS, 1e-6, 1), access._target.x0_hat(x, 0).detach().clamp(-1, 1), rtol=0, atol=1e-4)
    else:
        np.testing.assert_allclose(access.vary(x, IDS, 1e-6, 1), x, rtol=0, atol=1e-4)


@predictions
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_vary_of_the_only_image_returns_it(prediction: str, steps: int) -> None:
    a, image = linear(50, 1e-3, 0.2), images(1)[0]
    access = VariationAPI(Diffusion(OneImage(a, prediction, image), a, prediction))
    for strength in (0.2, 1.0):
        np.testing.assert_allclose(access.vary(image.expand(3, *SHAPE), IDS, strength, steps), image.expand(3, *SHAPE), rtol=0, atol=1e-12)


def test_a_variation_belongs_to_image_seed_and_draw() -> None:
    access, x = VariationAPI(Diffusion(Pointwise(), linear(50, 1e-3, 0.2))), images(3)
    together = access.vary(x, IDS)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(access.vary(x[order], IDS[order]), together[order])
    assert torch.equal(access.vary(x[1:2], IDS[1:2]), together[1:2])
    for other in (access.vary(x, IDS + 1), access.vary(x, IDS, seed=1), access.vary(x, IDS, draw=1)):
        assert all(not torch.equal(one, two) for one, two in zip(other, together, strict=True))
    assert together.abs().max() <= 1


@pytest.mark.parametrize(
    ("strength", "steps", "key"), [(0.0, 1, "strength"), (-0.1, 1, "strength"), (1.1, 1, "strength"), (0.2, 0, "steps"), (0.2, 11, "steps")]
)
def test_impossible_variations_are_refused_unpaid(strength: float, steps: int, key: str) -> None:
    access = VariationAPI(model())
    with pytest.raises(ConfigError, match=f"^{key}="):
        access.vary(images(3), IDS, strength, steps)
    assert access.evaluations == 0
