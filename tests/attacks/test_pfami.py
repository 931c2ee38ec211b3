import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from diffmia_exp.attacks.pfami import PFAMI, centre_crop
from tests.attacks.conftest import A, Lab


def cropped(x: np.ndarray, side: float) -> np.ndarray:
    """The middle of an image, resampled bilinearly at the centres of the new pixels."""
    size = x.shape[-1]
    centres = (np.arange(size) + 0.5 - size / 2) * side + size / 2 - 0.5
    grid = np.meshgrid(centres, centres, indexing="ij")
    return np.stack([map_coordinates(channel, grid, order=1, mode="nearest") for channel in x])


@pytest.mark.parametrize("statistic", ["absolute", "relative"])
@pytest.mark.parametrize("which", ["single", "every"])
def test_formula(lab: Lab, statistic: str, which: str) -> None:
    sides, steps = [0.9, 0.75, 0.6], [0, 300, 600]

    def loss(x: np.ndarray, n: int, i: int) -> float:
        eps, t = lab.noise(n, i, seed=1), steps[i]
        return float(((eps - lab.eps(np.sqrt(A[t]) * x + np.sqrt(1 - A[t]) * eps, t)) ** 2).mean())

    def reference(x0: np.ndarray, n: int) -> float:
        own = [loss(x0, n, i) for i in range(3)]
        pairs = [(i, j) for i in range(3) for j in range(3) if which == "every" or i + j == 2]
        gap = np.mean([loss(cropped(x0, sides[j]), n, i) - own[i] for i, j in pairs])
        return float(gap / np.mean(own) if statistic == "relative" else gap)

    attack = PFAMI(statistic, crops=3, largest=0.9, smallest=0.6, timesteps=3, stride=300, pairs=which, seed=1)
    assert attack.nfe(1000) == (12 if which == "every" else 6)
    expected = np.array([reference(image.numpy(), n) for n, image in enumerate(lab.x)])
    # A difference of two nearly equal losses: float32 keeps fewer of its digits than it does of a loss.
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        score = attack.score(attack.access(lab.diffusion(dtype)), lab.x, lab.ids).numpy()
        np.testing.assert_allclose(score, expected, rtol=tolerance, atol=tolerance * 0.1)


def test_the_whole_image_is_its_own_crop(lab: Lab) -> None:
    torch.testing.assert_close(centre_crop(lab.x, 1.0), lab.x, rtol=1e-12, atol=1e-12)


def test_the_default_costs_twenty_evaluations() -> None:
    assert PFAMI().nfe(1000) == 20
    assert PFAMI(pairs="every").nfe(1000) == 110
