"""LSA*: loss-based attack with a learned judge.

Pang et al., "White-box Membership Inference Attacks against Diffusion Models", 2023 (arXiv 2308.06405), where it is the
baseline of GSA.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffmia_exp.attacks.multi_loss import MultiLoss
from diffmia_exp.errors import whole
from diffmia_exp.heads import boosted_trees, judged_by
from diffmia_exp.signals import Signals


class LSA(MultiLoss):
    """The losses at equidistant timesteps, judged by gradient-boosted trees that were trained on shadow models.

    score = P(member | L_t for n_timesteps equidistant t) by the head

    Args:
        n_timesteps: timesteps 0 .. T-1 in equal distances; the paper takes 10.
        T: of the model.
        n_noises: noises per image and timestep.
        seed: of the noises.
        head: a classifier with scikit-learn's interface; None for boosted trees.
    """

    min_shadows = 1
    compares = False
    judging = ("head",)

    def __init__(self, n_timesteps: int = 10, T: int = 1000, n_noises: int = 1, seed: int = 0, head: Any = None) -> None:
        whole("n_timesteps", n_timesteps, least=2)
        super().__init__(np.linspace(0, whole("T", T, least=2) - 1, n_timesteps).round().astype(int).tolist(), n_noises, seed)
        self.head = head or boosted_trees()

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        return judged_by(self.head, signals)
