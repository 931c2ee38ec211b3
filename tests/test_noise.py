from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffmia_exp.noise import PURPOSES, derive, gaussian, generator, philox

WORD = st.integers(0, 2**32 - 1)
ID = st.integers(-(2**63), 2**63 - 1)

quick = settings(max_examples=50, deadline=None, derandomize=True)


def philox_reference(key: tuple[int, int], counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's unbounded integers (Salmon et al. 2011, section 3.3)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def gaussian_reference(seed: int, sample_id: int, n: int, draw: int) -> list[float]:
    """Box-Muller on the words of the counters (id low, id high, draw, block), with the seed as key."""
    out: list[float] = []
    for block in range(-(-n // 4)):
        unsigned = sample_id % 2**64
        words = philox_reference((seed % 2**32, seed // 2**32), (unsigned % 2**32, unsigned // 2**32, draw, block))
        u = [(w + 0.5) / 2**32 for w in words]
        for radius, angle in ((u[0], u[1]), (u[2], u[3])):
            length = math.sqrt(-2 * math.log(radius))
            out += [length * math.cos(2 * math.pi * angle), length * math.sin(2 * math.pi * angle)]
    return out[:n]


def run_philox(key: tuple[int, int], counters: list[tuple[int, int, int, int]]) -> list[tuple[int, ...]]:
    c0, c1, c2, c3 = torch.tensor(counters, dtype=torch.int64).unbind(1)
    return list(zip(*(word.tolist() for word in philox(key, (c0, c1, c2, c3))), strict=True))


# --- Philox


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert run_philox((k0, k1), [(c0, c1, c2, c3)]) == [tuple(int(word, 16) for word in answer.split())]


@quick
@given(st.tuples(WORD, WORD), st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=5))
def test_philox_equals_the_reference_for_any_key_and_counter(key: tuple[int, int], counters: list[tuple[int, int, int, int]]) -> None:
    assert run_philox(key, counters) == [philox_reference(key, counter) for counter in counters]


# --- gaussian: a function of (seed, id, draw) alone


@quick
@given(seed=st.integers(0, 2**63 - 1), sample_id=ID, draw=WORD, shape=st.tuples(*[st.integers(1, 3)] * 3))
def test_gaussian_equals_the_reference(seed: int, sample_id: int, draw: int, shape: tuple[int, int, int]) -> None:
    got = gaussian(seed, torch.tensor([sample_id]), shape, draw)
    assert got.shape == (1, *shape)
    assert got.dtype == torch.float64
    expected = gaussian_reference(seed, sample_id, math.prod(shape), draw)
    np.testing.assert_allclose(got.flatten(), expected, rtol=1e-12, atol=1e-12)


@quick
@given(ids=st.lists(ID, min_size=1, max_size=12, unique=True), random=st.randoms(use_true_random=False), seed=st.integers(0, 2**63 - 1))
def test_neither_batch_nor_order_nor_neighbours_matter(ids: list[int], random: object, seed: int) -> None:
    together = dict(zip(ids, gaussian(seed, torch.tensor(ids), (3, 2, 3)), strict=True))
    shuffled = list(ids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    some = shuffled[: len(ids) // 2 + 1]
    for i, noise in zip(some, gaussian(seed, torch.tensor(some), (3, 2, 3)), strict=True):
        assert torch.equal(noise, together[i])
        assert torch.equal(noise, gaussian(seed, torch.tensor([i]), (3, 2, 3))[0])


def test_a_repeated_id_repeats_its_noise() -> None:
    noise = gaussian(5, torch.tensor([7, 3, 7]), (1, 4, 4))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])


def test_int32_ids_are_the_same_ids() -> None:
    ids = [-3, 0, 12, 2**31 - 1]
    assert torch.equal(gaussian(1, torch.tensor(ids, dtype=torch.int32), (1, 2, 2)), gaussian(1, torch.tensor(ids), (1, 2, 2)))


def test_no_ids_give_no_noise() -> None:
    assert gaussian(1, torch.empty(0, dtype=torch.int64), (3, 5, 5)).shape == (0, 3, 5, 5)


def test_large_and_negative_ids_differ() -> None:
    ids = [0, 1, -1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**32 + 1, 2**33, -(2**32), 2**63 - 1, -(2**63), -(2**63) + 1]
    noise = gaussian(11, torch.tensor(ids), (1, 8, 8)).flatten(1)
    for i, j in combinations(range(len(ids)), 2):
        assert (noise[i] != noise[j]).all()


@pytest.mark.parametrize("other", [1, 2**31, 2**32, 2**62])
def test_seeds_that_differ_in_any_word_give_other_noise(other: int) -> None:
    ids = torch.arange(4)
    assert (gaussian(0, ids, (1, 8, 8)) != gaussian(other, ids, (1, 8, 8))).all()


def test_draws_differ_from_first_to_last() -> None:
    noises = [gaussian(0, torch.arange(4), (1, 8, 8), draw) for draw in (0, 1, 2, 2**31, 2**32 - 1)]
    for one, two in combinations(noises, 2):
        assert (one != two).all()


# --- gaussian: standard normal and uncorrelated


@pytest.mark.parametrize("seed", [0, 123456789, 2**63 - 1])
def test_noise_is_standard_normal(seed: int) -> None:
    noise = gaussian(seed, torch.arange(120), (3, 6, 6)).numpy()
    n = noise.size
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # So is each image, and each pixel across images: the p-values of 120 + 108 tests are uniform.
    for rows in (noise.reshape(120, -1), noise.reshape(120, -1).T):
        p = [stats.kstest(row, "norm").pvalue for row in rows]
        assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_tails_are_reached() -> None:
    noise = gaussian(3, torch.arange(400), (3, 16, 16)).flatten().numpy()
    beyond = (np.abs(noise) > 4).sum()
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], noise.size, 2 * stats.norm.sf(4))
    assert low <= beyond <= high


def assert_uncorrelated(rows: np.ndarray) -> None:
    """No pair of rows correlates more than independent normals would (Bonferroni over all pairs at 1e-3)."""
    k, n = rows.shape
    r = np.corrcoef(rows)[np.triu_indices(k, 1)]
    assert np.abs(r).max() < stats.norm.isf(1e-3 / 2 / len(r)) / math.sqrt(n)
    assert stats.kstest(r * math.sqrt(n), "norm").pvalue > 1e-3


def test_ids_are_uncorrelated() -> None:
    assert_uncorrelated(gaussian(0, torch.arange(40), (3, 32, 32)).flatten(1).numpy())


def test_ids_that_share_their_low_word_are_uncorrelated() -> None:
    assert_uncorrelated(gaussian(0, torch.arange(-20, 20) * 2**32, (3, 32, 32)).flatten(1).numpy())


def test_draws_are_uncorrelated() -> None:
    noises = [gaussian(0, torch.tensor([17]), (3, 32, 32), draw).flatten() for draw in range(40)]
    assert_uncorrelated(torch.stack(noises).numpy())


def test_pixels_are_uncorrelated() -> None:
    assert_uncorrelated(gaussian(0, torch.arange(3000), (1, 6, 6)).flatten(1).T.numpy())


def test_seeds_are_uncorrelated() -> None:
    noises = [gaussian(derive(seed, "score"), torch.tensor([17]), (3, 32, 32)).flatten() for seed in range(40)]
    assert_uncorrelated(torch.stack(noises).numpy())


def test_id_and_draw_are_not_interchangeable() -> None:
    a = gaussian(0, torch.tensor([1]), (1, 8, 8), 2)
    assert (a != gaussian(0, torch.tensor([2]), (1, 8, 8), 1)).all()


# --- derive


def test_purposes_keep_their_numbers() -> None:
    assert PURPOSES == {
        "pool": 1,
        "split": 2,
        "init": 3,
        "order": 4,
        "step": 5,
        "score": 6,
        "sample": 7,
        "vary": 8,
        "public": 9,
        "surrogate": 10,
        "augment": 11,
        "labels": 12,
        "private": 13,
        "halves": 14,
        "answer": 15,
        "copies": 16,
        "utility": 17,
    }


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1, 2**40 + 3])
def test_derive_is_numpys_seed_sequence(seed: int) -> None:
    for purpose, number in PURPOSES.items():
        words = np.random.SeedSequence(seed, spawn_key=(number, 4, 9)).generate_state(2, np.uint32).tolist()
        assert derive(seed, purpose, 4, 9) == (words[0] + words[1] * 2**32) // 2


def test_trailing_zeros_and_long_seeds_are_told_apart() -> None:
    assert derive(1, "step") != derive(1, "step", 0) != derive(1, "step", 0, 0)
    assert derive(5 + (3 << 32), "pool") != derive(5, "init", 1)


def test_every_seed_purpose_and_index_has_its_own_sub_seed() -> None:
    named = [derive(*args) for args in product(range(8), PURPOSES, range(12), range(12))]
    assert len(set(named)) == len(named)
    assert all(0 <= seed < 2**63 for seed in named)


@quick
@given(
    st.integers(0, 3).flatmap(
        lambda k: st.lists(st.tuples(WORD, st.sampled_from(sorted(PURPOSES)), *[WORD] * k), min_size=2, max_size=6, unique=True)
    )
)
def test_distinct_names_give_distinct_sub_seeds(names: list[tuple]) -> None:
    assert len({derive(*name) for name in names}) == len(names)
    assert [derive(*name) for name in names] == [derive(*name) for name in names]


def test_the_order_of_the_indices_counts() -> None:
    assert len({derive(0, "step", 1, 2), derive(0, "step", 2, 1), derive(1, "step", 0, 2), derive(2, "step", 1, 0)}) == 4


def test_sub_seeds_use_all_63_bits() -> None:
    seeds = np.array([derive(0, "step", 0, step) for step in range(4000)])
    ones = np.array([(seeds >> bit & 1).sum() for bit in range(63)])
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], 4000, 0.5)
    assert ((low <= ones) & (ones <= high)).all()


def test_an_unknown_purpose_is_an_error() -> None:
    with pytest.raises(KeyError):
        derive(0, "coffee")


def test_generators_of_distinct_names_draw_distinct_numbers() -> None:
    first = [generator(*args).random() for args in product(range(5), PURPOSES, range(6))]
    assert len(set(first)) == len(first)
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    assert generator(2, "split", 1).random() == generator(2, "split", 1).random()
