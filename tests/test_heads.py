from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression

from diffmia_exp.heads import judged_by
from diffmia_exp.signals import Signals

fits: list[int] = []


class Counting(LogisticRegression):
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        fits.append(len(X))
        return super().fit(X, y, sample_weight)


def signals(seed: int, target: int = 0) -> Signals:
    rng = np.random.default_rng(seed)
    keep, pool = rng.random((3, 40)) < 0.5, np.ones((3, 40), bool)
    shadows = rng.normal(size=(3, 40, 2)) + keep[..., None]
    return Signals(np.arange(40), np.random.default_rng([9, target]).normal(size=(40, 2)), shadows, keep, pool, np.zeros(40, bool))


def test_a_head_is_fitted_once_for_all_that_it_judges_and_anew_for_other_examples() -> None:
    fits.clear()
    for seed in (0, 0, 1, 0):
        for target in (0, 1):
            shown = signals(seed, target)
            expected = clone(LogisticRegression()).fit(*shown.examples()).predict_proba(shown.target)[:, 1]
            np.testing.assert_array_equal(judged_by(Counting(), shown), expected)
    assert fits == [120] * 3
    judged_by(Counting(C=0.1), signals(0))
    flipped = dataclasses.replace(signals(0), keep=~signals(0).keep)
    judged_by(Counting(C=0.1), flipped)
    assert len(fits) == 5
