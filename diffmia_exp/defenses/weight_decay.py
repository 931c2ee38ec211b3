"""Weight decay: Loshchilov & Hutter, "Decoupled weight decay regularization", 2019 (arXiv 1711.05101)."""

from __future__ import annotations

from diffmia_exp.config import Plain
from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import number


class WeightDecay(Defense):
    """Each step also shrinks the weights: w <- w - lr * decay * w, with `training.optimizer=adamw`; with `adam` decay * w is added to
    the gradient instead, which Adam rescales.

    Args:
        decay: in the place of `training.weight_decay`.
    """

    def __init__(self, decay: float = 0.1) -> None:
        self.decay = number("decay", decay, above=0)

    def training(self, settings: Plain) -> Plain:
        """See `Defense`."""
        return settings | {"weight_decay": self.decay}
