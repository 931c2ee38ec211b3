"""Classifiers that judge signals: trained on shadow models, applied to the target."""

from __future__ import annotations

from typing import Any

import joblib
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
    examples = signals.examples()
    if (key := joblib.hash((head, *examples))) not in _last:
        _last.clear()
        _last[key] = clone(head).fit(*examples)
    scores: NDArray[np.float64] = np.asarray(_last[key].predict_proba(signals.target)[:, 1], dtype=np.float64)
    return scores


_last: dict[str, Any] = {}
"""The head that was fitted last, by what it learned from: target, untrained network and generated images are judged by the same one."""


def boosted_trees() -> HistGradientBoostingClassifier:
    """The default head of attacks whose papers use gradient-boosted trees; scikit-learn's, in place of XGBoost."""
    return HistGradientBoostingClassifier(max_iter=100, learning_rate=0.1, random_state=0)
