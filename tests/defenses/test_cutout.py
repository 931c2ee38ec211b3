from __future__ import annotations

import numpy as np
import pytest
import torch

from diffmia_exp.defenses.cutout import Cutout
from diffmia_exp.errors import ConfigError


@pytest.mark.parametrize(("side", "size", "pixels"), [(0.5, 8, 4), (0.25, 32, 8), (0.2, 8, 2), (0.01, 8, 1), (1.0, 5, 5)])
def test_it_greys_a_square_round_each_centre_and_nothing_else(side: float, size: int, pixels: int) -> None:
    x = torch.randn(40, 3, size, size)
    out = Cutout(side).augmented(x, torch.Generator().manual_seed(3)).numpy()
    g = torch.Generator().manual_seed(3)
    rows, columns = (torch.randint(size, (40,), generator=g).numpy() for _ in range(2))
    for image, before, u, v in zip(out, x.numpy(), rows, columns, strict=True):
        expected = before.copy()
        top, left = u - pixels // 2, v - pixels // 2
        expected[:, max(top, 0) : top + pixels, max(left, 0) : left + pixels] = 0
        np.testing.assert_array_equal(image, expected)


def test_places_are_the_generators_and_differ_between_images() -> None:
    x, before = torch.ones(64, 1, 8, 8), torch.get_rng_state()
    a, b, c = (Cutout().augmented(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len(a.unique(dim=0)) > 20
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("side", [0, -0.5, 1.5, "half"])
def test_a_side_that_is_no_share_is_refused(side: object) -> None:
    with pytest.raises(ConfigError, match=r"^side="):
        Cutout(side)  # type: ignore[arg-type]
