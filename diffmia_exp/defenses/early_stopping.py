"""Early stopping: Prechelt, "Early stopping - but when?", 1998. Memorisation sets in late (Gu et al. 2023, arXiv 2310.02664)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from diffmia_exp.data import Images
from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import number, whole

if TYPE_CHECKING:
    from diffmia_exp.lit import LitDiffusion


class EarlyStopping(Defense):
    """Training stops when images that are in no training set are not denoised any better; the best weights so far are the result.

    After every `every` steps, and the last one, the denoising loss of the averaged (`ema`) weights on the public images is measured
    (`stopping.validation_draws`). If `patience` times in a row it is not below the lowest so far by more than `min_delta`, training
    ends.

    Args:
        every: steps between two measurements.
        patience: measurements without an improvement.
        min_delta: what counts as one.
        draws: timesteps and noises for each image, the same at every measurement.
    """

    min_public = 1

    def __init__(self, every: int = 50, patience: int = 3, min_delta: float = 0.0, draws: int = 4) -> None:
        self.every = whole("every", every, least=1)
        self.patience = whole("patience", patience, least=1)
        self.min_delta = number("min_delta", min_delta, least=0)
        self.draws = whole("draws", draws, least=1)

    def lit(self, public: Images) -> Callable[..., LitDiffusion]:
        """See `Defense`."""
        from diffmia_exp.defenses.stopping import StoppedEarly  # seconds to import

        return partial(StoppedEarly, public=public, stopping=self)
