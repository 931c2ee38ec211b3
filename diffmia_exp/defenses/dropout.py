"""Dropout in the network: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 2014."""

from __future__ import annotations

from diffmia_exp.config import Plain, takes
from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import ConfigError, number


class Dropout(Defense):
    """While it is trained, the network sets each activation before the second convolution of a block to 0 with probability p.

    It is `diffusers`' setting `dropout`, which Ho et al. 2020 (arXiv 2006.11239) set to 0.1 on CIFAR-10. Attacks see a network without
    dropout, as its users do.

    Args:
        p: the probability, below 1.
    """

    def __init__(self, p: float = 0.3) -> None:
        self.p = number("p", p, above=0, most=0.99)

    def model(self, settings: Plain) -> Plain:
        """See `Defense`.

        Raises:
            ConfigError: if the network has no such setting.
        """
        if not takes("model", settings, "dropout"):
            must = "has no setting `dropout`, which defense=dropout needs; use one that has, as diffusers.UNet2DModel"
            raise ConfigError("model._target_", settings["_target_"], must)
        return settings | {"dropout": self.p}
