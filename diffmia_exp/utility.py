"""Utility: what a model is worth, whatever it betrays. Its generated images beside real ones, and its loss on both halves.

Images are compared in a feature space (`features.py`): x float64 [n, D] of generated images, y float64 [m, D] of real ones that the
model was not trained on. Docs: docs/utility.md.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffmia_exp.attacks.knn import by_distances
from diffmia_exp.config import Plain
from diffmia_exp.data import Images, Pixels
from diffmia_exp.diffusion import Diffusion, Schedule, given
from diffmia_exp.errors import ConfigError, UserError, choice, whole
from diffmia_exp.evaluation import Evaluation, batches, in_float32
from diffmia_exp.features import Features, chosen
from diffmia_exp.noise import derive, gaussian

Floats = NDArray[np.float64]

HELDOUT = ("nonmembers", "public")
ENTRIES = 2**22  # of a kernel matrix that are held at once

LEARNED = 0.9
"""A model has learned if its loss is below this share of `linear_loss`."""


class Utility:
    """How a model's utility is measured.

    Args:
        n_samples: generated images.
        steps: sampling steps.
        k: neighbours that span the manifolds of precision and recall.
        heldout: whose loss stands beside the members', one of HELDOUT.
        timesteps: of the loss, evenly over the schedule.
        seed: of the generated images and of the loss's noise.
        features: a `diffmia_exp.features` class; None for the pixels.
    """

    def __init__(
        self,
        n_samples: int = 2048,
        steps: int = 50,
        k: int = 3,
        heldout: str = "nonmembers",
        timesteps: int = 50,
        seed: int = 0,
        features: Features | None = None,
    ) -> None:
        self.k = whole("k", k, least=1)
        if whole("n_samples", n_samples, least=1) < self.least:
            raise ConfigError("n_samples", n_samples, f"must be at least {self.least}, more than the k={k} neighbours of an image")
        self.n_samples = n_samples
        self.steps = whole("steps", steps, least=1)
        self.heldout = choice("heldout", heldout, HELDOUT)
        self.timesteps = whole("timesteps", timesteps, least=1)
        self.seed = whole("seed", seed, least=0)
        self.features = chosen(features)

    @property
    def least(self) -> int:
        """Images that are needed on either side: k neighbours of one, and three for a standard error."""
        return max(self.k + 1, 3)


def measure(
    utility: Utility,
    diffusion: Diffusion,
    generated: Pixels,
    reference: Images,
    members: Images,
    heldout: Images,
    evaluation: Evaluation,
    folder: Path | None = None,
) -> Plain:
    """Everything that is said of a model's utility.

    Args:
        utility: how.
        diffusion: the model.
        generated: its images, uint8 [n, C, H, W].
        reference: real images that it was not trained on.
        members, heldout: images whose losses are compared.
        evaluation: batch size and device.
        folder: the store's in which it is measured, if any.

    Returns:
        `kid`, `kid_se`, `fid`, `precision`, `recall`, `loss_members`, `loss_heldout`, `loss_linear`, `learned`, `heldout`,
        `n_generated`, `n_reference`, `features`, `seconds`.

    Raises:
        UserError: if the model's loss is not finite.
    """
    started = time.monotonic()
    x, y = (_described(utility.features, pixels, evaluation, folder) for pixels in (generated, reference.pixels))
    t = strata(diffusion.T, utility.timesteps)
    of_members, of_heldout = (losses(diffusion, images, t, utility.seed, evaluation, folder).mean() for images in (members, heldout))
    if not np.isfinite([of_members, of_heldout]).all():
        raise UserError("utility: the loss of the model is not finite; is it trained well?")
    linear = linear_loss(reference.pixels, diffusion.schedule, diffusion.prediction, t)
    estimate, error = kid(x, y)
    precision, recall = precision_recall(x, y, utility.k)
    return {
        "kid": estimate,
        "kid_se": error,
        "fid": fid(x, y),
        "precision": precision,
        "recall": recall,
        "loss_members": float(of_members),
        "loss_heldout": float(of_heldout),
        "loss_linear": linear,
        "learned": bool(min(of_members, of_heldout) < LEARNED * linear),
        "heldout": utility.heldout,
        "n_generated": len(x),
        "n_reference": len(y),
        "features": utility.features.label,
        "seconds": round(time.monotonic() - started, 3),
    }


def kid(x: Floats, y: Floats) -> tuple[float, float]:
    """Kernel inception distance: the unbiased estimate of MMD^2 with the kernel k(a, b) = (a.b / D + 1)^3, and its standard error.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j) (Bińkowski et al. 2018, "Demystifying MMD
    GANs", section 4; Gretton et al. 2012, lemma 6), over all pairs: means over subsets, as are usual for speed, have the same
    expectation and a larger variance. It may be negative. The standard error is the jackknife's (Arvesen 1969), which leaves out each
    image of either sample in turn; it is exact in the sums of the kernel matrices' rows, so it costs nothing, and its square is on
    average not below the variance (Efron & Stein 1981).

    Args:
        x: [n, D], n at least 3.
        y: [m, D], m at least 3.
    """
    n, m = len(x), len(y)
    xx, yy = (_row_sums(z, z)[0] - _cubic((z * z).sum(1) / z.shape[1]) for z in (x, y))  # without the diagonal
    xy, yx = _row_sums(x, y)
    within_x, within_y, across = xx.sum() / (n * (n - 1)), yy.sum() / (m * (m - 1)), xy.sum() / (n * m)
    without_x = (xx.sum() - 2 * xx) / ((n - 1) * (n - 2)) + within_y - 2 * (xy.sum() - xy) / ((n - 1) * m)
    without_y = within_x + (yy.sum() - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (yx.sum() - yx) / (n * (m - 1))
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()
    return float(within_x + within_y - 2 * across), float(np.sqrt(variance))


def _cubic(product: Floats) -> Floats:
    base = product + 1
    return base * base * base


def _row_sums(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Sums over the rows [n] and the columns [m] of the matrix k(x_i, y_j), some rows at a time."""
    rows = max(1, ENTRIES // len(y))
    by_row, by_column = [], np.zeros(len(y))
    for start in range(0, len(x), rows):
        block = _cubic(x[start : start + rows] @ y.T / x.shape[1])
        by_row.append(block.sum(1))
        by_column += block.sum(0)
    return np.concatenate(by_row), by_column


def fid(x: Floats, y: Floats) -> float:
    """Fréchet distance of the Gaussians with the samples' means and (unbiased) covariances (Heusel et al. 2017, equation 6).

    ||mean x - mean y||^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)). With R'R = C, the last trace is the sum of the singular values of
    R_x R_y', which keeps every digit where C has not full rank; the root of a matrix, and roots of eigenvalues, do not.
    """
    from scipy.linalg import svdvals

    root_x, root_y = _root(x), _root(y)
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(apart + (root_x**2).sum() + (root_y**2).sum() - 2 * svdvals(root_x @ root_y.T).sum())


def _root(x: Floats) -> Floats:
    """R [min(n, D), D] with R'R the covariance of x [n, D]."""
    from scipy.linalg import qr

    n, d = x.shape
    centred = (x - x.mean(0)) / np.sqrt(n - 1)
    return centred if n <= d else qr(centred, mode="r")[0][:d]


def precision_recall(x: Floats, y: Floats, k: int) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2).

    A sample's manifold is the union of balls round its images, each up to the k-th nearest other one. Precision is the share of x in
    the manifold of y, recall the share of y in that of x.

    Args:
        x, y: [n, D] and [m, D], both of more than k images.
        k: neighbours.
    """
    generated, real = torch.from_numpy(x), torch.from_numpy(y)
    return _inside(generated, real, k), _inside(real, generated, k)


def _inside(queries: torch.Tensor, sample: torch.Tensor, k: int) -> float:
    radius = by_distances(sample, sample, lambda d: d.kthvalue(k + 1).values)  # the nearest is the image itself
    return float(by_distances(queries, sample, lambda d: (d <= radius).any(1)).double().mean())


def strata(T: int, n: int) -> list[int]:
    """n timesteps of 0 .. T-1, each in the middle of an n-th of the schedule."""
    return [int((j + 0.5) * T / n) for j in range(n)]


def losses(
    diffusion: Diffusion, images: Images, timesteps: list[int], seed: int, evaluation: Evaluation, folder: Path | None = None
) -> Floats:
    """The training loss of each image (`Diffusion.loss`; Ho et al. 2020, equation 14), mean over timesteps, a noise each: [n].

    The noise is a function of (seed, sample id, timestep), so that models are compared on the same. A conditional model is asked under
    the images' labels.
    """
    noises, out = derive(seed, "utility"), np.empty(len(images))
    with torch.inference_mode(), in_float32():
        for at, label in batches(images, evaluation.batch_size, "measuring the loss", folder):
            x0 = _scaled(images.pixels[at], evaluation)
            ids = torch.from_numpy(images.sample_id[at]).to(x0.device)
            with given(label):
                of = [diffusion.loss(x0, t, gaussian(noises, ids, tuple(x0.shape[1:]), t)) for t in timesteps]
            out[at] = torch.stack(of).mean(0).cpu().numpy()
    return out


def linear_loss(pixels: Pixels, schedule: Schedule, prediction: str, timesteps: list[int]) -> float:
    """The loss of the best denoiser that is linear in each pixel (Wiener's): one that knows every pixel's mean and variance, and no image.

    With the pixel's variance v, a = alphas_cumprod[t] and s = 1 - a, Var(x_0 | x_t) = v s / (a v + s), and the noise and v are linear in
    x_0 given x_t: the loss is that times a / s (`epsilon`), 1 / s (`v`) or 1 (`sample`), mean over pixels and timesteps.

    Args:
        pixels: uint8 [n, C, H, W].
        schedule, prediction: of the model.
        timesteps: of the loss.
    """
    v = (pixels / 127.5).var(0).reshape(1, -1)
    a = schedule.alphas_cumprod[timesteps].cpu().numpy()[:, None]
    factor = {"epsilon": a / (1 - a), "v": 1 / (1 - a), "sample": 1}[prediction]
    return float((factor * v * (1 - a) / (a * v + 1 - a)).mean())


def _described(features: Features, pixels: Pixels, evaluation: Evaluation, folder: Path | None) -> Floats:
    """Features float64 [n, D] of images uint8 [n, C, H, W]."""
    parts = batches(Images(pixels, np.arange(len(pixels))), evaluation.batch_size, "describing images", folder)
    with torch.inference_mode(), in_float32():
        return np.concatenate([features(_scaled(pixels[at], evaluation)).cpu().numpy() for at, _ in parts])


def _scaled(pixels: Pixels, evaluation: Evaluation) -> torch.Tensor:
    return torch.from_numpy(pixels).to(evaluation.torch_device, torch.float64) / 127.5 - 1
