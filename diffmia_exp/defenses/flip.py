"""Random flips: the augmentation that most diffusion models are trained with anyway."""

from __future__ import annotations

from diffmia_exp.config import Plain
from diffmia_exp.defenses.base import Defense


class Flip(Defense):
    """Each training image is mirrored with probability 1/2: no fixed image is fitted, but it and its mirror image, half as often.

    Carlini et al. 2023 (arXiv 2301.13188) and Duan et al. 2023 (arXiv 2302.01316) report its effect on attacks.
    """

    def training(self, settings: Plain) -> Plain:
        """See `Defense`."""
        return settings | {"flip": True}
