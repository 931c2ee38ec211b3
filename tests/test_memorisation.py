"""Copies of training images are found among generated ones, and none of images that were not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from diffmia_exp import figures, memorisation
from diffmia_exp.data import Images, Pixels
from diffmia_exp.memorisation import compare, nearest, ratios

DIGITS = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]


def brute_force(queries: Pixels, references: Pixels) -> np.ndarray:
    """All distances, written out."""
    q, r = queries.astype(float) / 255, references.astype(float) / 255
    return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in r] for a in q])


def test_nearest_agrees_with_brute_force_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, references = DIGITS[:7], DIGITS[5:135]
    everything = brute_force(queries, references)
    for block in (1000, 130, 60, 7):
        monkeypatch.setattr(memorisation, "BLOCK", block)
        distance, index = nearest(queries, references, 9)
        np.testing.assert_allclose(distance, np.sort(everything, axis=1)[:, :9], rtol=1e-12)
        np.testing.assert_allclose(np.take_along_axis(everything, index, axis=1), distance, rtol=1e-12)
    assert distance[5, 0] == distance[6, 0] == 0, "the two that are in both"
    assert index[5, 0] == 0


def test_ratios_are_carlinis_and_nn1_over_nn2() -> None:
    distance = np.array([[1.0, 2.0, 3.0], [0.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    carlini, nn = ratios(distance)
    np.testing.assert_allclose(carlini, [0.5, 0, 0])
    np.testing.assert_allclose(nn, [0.5, 0, 0])
    assert [r.tolist() for r in ratios(np.array([[2.0]]))] == [[1.0], [1.0]], "one image alone is not closer than others"


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_ratios_do_not_depend_on_contrast_or_order(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    queries, references = rng.integers(0, 100, (3, 1, 4, 4), dtype=np.uint8), rng.integers(0, 100, (n, 1, 4, 4), dtype=np.uint8)
    k = min(n, 50)
    base = ratios(nearest(queries, references, k)[0])
    np.testing.assert_allclose(ratios(nearest(queries * 2, references * 2, k)[0]), base)
    np.testing.assert_allclose(ratios(nearest(queries, rng.permutation(references), k)[0]), base)
    assert ((base[0] >= 0) & (base[0] <= 1) & (base[1] <= 1)).all()


def test_planted_copies_are_found_and_none_of_held_out_images() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (450, 3, 6, 6), dtype=np.uint8)
    ids = rng.permutation(450) + 1000
    training, held_out = Images(images[:200], ids[:200]), Images(images[200:400], ids[200:400])
    noisy = np.clip(images[[3, 50, 199]].astype(int) + rng.integers(-40, 41, (3, 3, 6, 6)), 0, 255).astype(np.uint8)
    facts, pairs = compare(np.concatenate([images[400:], noisy]), training, held_out)
    assert (facts["n_generated"], facts["near_copies"], facts["near_copies_of_held_out"]) == (53, 3, 0)
    assert (facts["nn_ratio_below_third"], facts["nn_ratio_below_third_of_held_out"]) == (3, 0)
    assert set(pairs["sample_id"][:3].tolist()) == set(ids[[3, 50, 199]].tolist())
    assert (np.diff(pairs["ratio"]) >= 0).all()
    assert len(pairs["ratio"]) == memorisation.PAIRS
    for generated, copied, i in zip(pairs["generated"], pairs["training"], pairs["sample_id"], strict=True):
        np.testing.assert_array_equal(copied, images[np.flatnonzero(ids == i)[0]])
        assert (np.abs(generated.astype(int) - copied).max() <= 40) == (i in ids[[3, 50, 199]])
    assert compare(images[400:], training, held_out)[0]["near_copies"] == 0


def test_lookalikes_are_found_as_often_among_held_out_images() -> None:
    """Digits of one class resemble each other, so the rule is met without copying; the held-out images say how often."""
    order = np.random.default_rng(0).permutation(len(DIGITS))
    training, held_out = (Images(DIGITS[at], at) for at in (order[:400], order[400:800]))
    unseen = compare(DIGITS[order[800:1000]], training, held_out)[0]
    assert unseen["near_copies"] > 20
    assert abs(unseen["near_copies"] - unseen["near_copies_of_held_out"]) < 30
    copied = compare(training.pixels[:200], training, held_out)[0]
    assert (copied["near_copies"], copied["nn_ratio_below_third"]) == (200, 200)
    assert copied["near_copies_of_held_out"] < 80


def test_copies_of_held_out_images_are_told_from_copies_of_training_images() -> None:
    facts, _ = compare(DIGITS[500:505], Images(DIGITS[:400], np.arange(400)), Images(DIGITS[400:800], np.arange(400, 800)))
    assert (facts["near_copies"], facts["near_copies_of_held_out"]) == (0, 5)


@pytest.mark.parametrize("k", [1, 6, 16])
def test_the_picture_shows_every_pair(k: int, tmp_path: Path) -> None:
    generated, training = np.zeros((k, 3, 9, 9), np.uint8), np.zeros((k, 3, 9, 9), np.uint8)
    generated[:, 0], training[:, 2] = 255, 255
    figures.near_copies(tmp_path / "pairs.png", generated, training, np.linspace(0.1, 0.9, k))
    with Image.open(tmp_path / "pairs.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red, blue = ((pixels == colour).all(2).sum() for colour in ([255, 0, 0], [0, 0, 255]))
    assert red == pytest.approx(blue, rel=0.05)
    assert red > k * 40 * 40
