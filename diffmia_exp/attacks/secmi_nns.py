"""SecMI-NNs: the gap map of SecMI, judged by a network.

Duan et al., ICML 2023 (arXiv 2302.01316). The paper trains the network on a fifth of the target's own members and non-members;
here it is trained on shadow models, since nothing is to be known of the target's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffmia_exp.attacks.secmi import SecMI
from diffmia_exp.cnn_head import ResNetHead
from diffmia_exp.heads import judged_by
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import GrayBox


class SecMINNs(SecMI):
    """A residual network on the pixelwise t-error |psi(phi(x~_s, s), t) - x~_s| of SecMI.

    score = P(member | gap map) by the head

    Args:
        t, stride: as in `SecMI`.
        head: a classifier with scikit-learn's interface on maps [m, C * H * W]; None for a small residual network.
    """

    min_shadows = 1
    compares = False
    judging = ("head",)

    def __init__(self, t: int = 100, stride: int = 10, head: Any = None) -> None:
        super().__init__(t, stride)
        self.head = head or ResNetHead()

    def signal(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        return self.residuals(access, x, sample_id).abs().flatten(1)

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        return judged_by(self.head, signals)
