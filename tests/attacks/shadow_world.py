"""Made-up signals: K shadows and a target on n images, some public."""

from __future__ import annotations

import numpy as np

from diffmia_exp.signals import Signals


def made_up(K: int = 9, n: int = 40, public: int = 0, F: int = 2, shift: float = 0.0, seed: int = 0) -> tuple[Signals, np.ndarray]:
    """Signals and who is a member of the target; `shift` is what membership adds."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=(n + public, F))
    pool = np.arange(n + public) < n
    keep = (rng.random((K + 1, n + public)) < 0.5) & pool
    signal = -10 + difficulty + 0.3 * rng.normal(size=(K + 1, n + public, F)) + shift * keep[..., None]
    pools = np.tile(pool, (K, 1))
    return Signals(np.arange(n + public), signal[0], signal[1:], keep[1:], pools, ~pool), keep[0]
