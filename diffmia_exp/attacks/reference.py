"""Reference difference: is the image easier for the target than for models that never saw it?

Watson, Guo, Cormode, Sablayrolles, "On the Importance of Difficulty Calibration in Membership Inference Attacks", ICLR 2022
(arXiv 2111.08440), carried over to diffusion models.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffmia_exp.attacks.base import HostedAttack
from diffmia_exp.signals import Signals


class Reference(HostedAttack):
    """The host's score minus its mean over the reference models that were not trained on the image.

    score = s_target(x) - mean over references without x of s_k(x); for the loss: mean reference loss - target loss

    Args:
        host: an attack on a single model; several timesteps are averaged.
    """

    min_shadows = 1

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        _, outside = signals.inside_and_outside()
        return (signals.target - outside).mean(1)
