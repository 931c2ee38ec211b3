import numpy as np
import pytest
import torch

from diffmia_exp.attacks.loss import Loss
from diffmia_exp.attacks.pia import PIA
from diffmia_exp.attacks.plugins.fremia import FreMIA
from diffmia_exp.attacks.trajectory import Trajectory
from diffmia_exp.errors import ConfigError
from tests.attacks.conftest import A, Lab


def test_formula(lab: Lab) -> None:
    """Both terms of PIA's error are filtered, by a Fourier transform written out as a sum."""
    k = np.arange(8)
    dft = np.exp(-2j * np.pi * np.outer(k, k) / 8)
    frequency = np.minimum(k, 8 - k)  # |frequency| of each row of the transform
    mask = np.where((frequency[:, None] <= 2) & (frequency[None, :] <= 2), 1.0, 0.2)

    def low_pass(image: np.ndarray) -> np.ndarray:
        return (dft.conj() @ (mask * (dft @ image @ dft)) @ dft.conj()).real / 64

    def reference(x0: np.ndarray, n: int) -> float:
        e0 = lab.eps(x0, 0)
        et = lab.eps(np.sqrt(A[200]) * x0 + np.sqrt(1 - A[200]) * e0, 200)
        return -float((np.abs(low_pass(e0[0]) - low_pass(et[0])) ** 4).sum())

    lab.check(FreMIA(PIA(), radius=0.5, scale=0.2), reference)


def test_a_filter_that_lets_everything_pass_changes_nothing(lab: Lab) -> None:
    access, host = Loss.access(lab.diffusion()), Loss(n_noises=2)
    for plugin in (FreMIA(host, radius=1.0), FreMIA(host, scale=1.0)):
        torch.testing.assert_close(plugin.score(access, lab.x, lab.ids), host.score(access, lab.x, lab.ids), rtol=1e-12, atol=0)


def test_it_passes_the_published_square_at_32_pixels() -> None:
    passes = FreMIA(Loss()).passes(torch.zeros(32, 32))
    assert int(passes[0].sum()) == 11  # -5 .. 5
    assert int(passes.sum()) == 121


def test_a_host_without_an_error_map_is_refused() -> None:
    with pytest.raises(ConfigError, match="error map"):
        FreMIA(Trajectory())
