from __future__ import annotations

import numpy as np
import pytest

from diffmia_exp.config import checked
from diffmia_exp.data import Images
from diffmia_exp.defenses import deduplication
from diffmia_exp.defenses.deduplication import Deduplication, clusters
from diffmia_exp.errors import ConfigError
from diffmia_exp.experiment import Experiment
from tests.composing import composed


def images(n: int = 60) -> Images:
    """Of noise, some with copies that differ in a few pixels by a few grey values, in chains; ids in no order."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(20, 236, (n, 3, 4, 4), dtype=np.uint8)
    for copy in range(n // 3, n):
        pixels[copy] = pixels[rng.integers(copy)] + rng.integers(-9, 10, (3, 4, 4)) * (rng.random((3, 4, 4)) < 0.2)
    pixels[n - 3 :] = pixels[:3]
    return Images(pixels, rng.permutation(1000)[:n])


def expected(shown: Images, distance: float) -> set[int]:
    """The ids kept, by a search from image to image."""
    x = shown.pixels.reshape(len(shown), -1) / 255
    near = [[np.sqrt(np.mean((a - b) ** 2)) <= distance + 1e-12 for b in x] for a in x]
    kept, left = set(), set(range(len(x)))
    while left:
        cluster, border = set(), {left.pop()}
        while border:
            cluster |= border
            border = {j for i in border for j in left if near[i][j]} - cluster
        left -= cluster
        kept.add(min(int(shown.sample_id[i]) for i in cluster))
    return kept


@pytest.mark.parametrize("distance", [0.0, 0.005, 0.01, 0.02, 0.1])
@pytest.mark.parametrize("block", [7, 1024])
def test_one_of_each_cluster_is_kept_whatever_the_order(distance: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deduplication, "BLOCK", block)
    shown = images()
    wanted = expected(shown, distance)
    for order in (np.arange(60), np.random.default_rng(1).permutation(60)):
        some = Images(shown.pixels[order], shown.sample_id[order])
        kept = Deduplication(distance).kept(some)
        assert sorted(some.sample_id[kept]) == sorted(wanted)
    assert len(wanted) < 60


def test_distances_are_exact_at_the_threshold() -> None:
    pixels = np.full((2, 1, 32, 32), 255, np.uint8)
    pixels[1, 0, 0, :4] = 254  # sqrt(4 / 1024) / 255
    pair = Images(pixels, np.arange(2))
    assert len(set(clusters(pair, (1 / 16) / 255 * (1 + 1e-9)))) == 1
    assert len(set(clusters(pair, (1 / 16) / 255 * (1 - 1e-9)))) == 2


def test_it_undoes_copies() -> None:
    def trained_on(*overrides: str) -> Images:
        e = Experiment(checked(composed("tracking=none", "split.pool=64", *overrides)))
        e.load()
        return e.training_images(e.target_index)

    copied, mended = trained_on("split.copies=[2,3]"), trained_on("split.copies=[2,3]", "defense=deduplication")
    assert len(copied) > 2 * len(mended)
    assert mended.fingerprint == trained_on().fingerprint


@pytest.mark.parametrize("distance", [-0.1, 2, "near"])
def test_a_distance_that_is_none_is_refused(distance: object) -> None:
    with pytest.raises(ConfigError, match=r"^distance="):
        Deduplication(distance)  # type: ignore[arg-type]
