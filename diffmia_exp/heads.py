"""Classifiers that judge signals: trained on shadow models, applied to the target."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier

from diffmia_exp.signals import Signals


def judged_by(head: Any, signals: Signals) -> NDArray[np.float64]:
    """Scores [n]: the head's probability of membership, on the target's signals, having learned from the shadows' alone.

    Args:
        head: a classifier with scikit-learn's interface; a fresh copy of it is fitted.
        signals: of the target and at least one shadow.
    """
    learned = clone(head).fit(*signals.examples())
    scores: NDArray[np.float64] = np.asarray(learned.predict_proba(signals.target)[:, 1], dtype=np.float64)
    return scores


def boosted_trees() -> HistGradientBoostingClassifier:
    """The default head of attacks whose papers use gradient-boosted trees; scikit-learn's, in place of XGBoost."""
    return HistGradientBoostingClassifier(max_iter=100, learning_rate=0.1, random_state=0)
