"""GSA1: gradients as signals, one backward pass per image.

"White-box Membership Inference Attacks against Diffusion Models", 2023 (arXiv 2308.06405).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

from diffmia_exp.attacks.base import Attack
from diffmia_exp.errors import whole
from diffmia_exp.heads import judged_by
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.per_sample import gradients
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import WhiteBox


class GSA1(Attack):
    """Norms of the gradient of the loss, averaged over timesteps, for every parameter tensor; a classifier judges them.

    L_t = mean over pixels of (eps - eps_t(x_t))^2 (or what else the model is trained to predict), one noise eps per t;
    signal = (||d mean_t L_t / d W||_2 for each parameter tensor W), score = P(member | signal) by a head that learned from the
    shadow models' signals.

    Args:
        n_timesteps: how many t, equidistant from 0 to T - 1 (rounded).
        seed: of the noises.
        head: a classifier with scikit-learn's interface; None for gradient-boosted trees, as in the paper (which takes XGBoost),
            that need no scaling of the signals.
    """

    access = WhiteBox
    min_shadows = 1
    compares = False
    judging = ("head",)

    def __init__(self, n_timesteps: int = 10, seed: int = 0, head: Any = None) -> None:
        self.n_timesteps = whole("n_timesteps", n_timesteps, least=1)
        self.seed = whole("seed", seed, least=0)
        self.head = HistGradientBoostingClassifier(random_state=0) if head is None else head

    def nfe(self, T: int) -> int:
        whole("n_timesteps", self.n_timesteps, most=T)
        return 2 * self.n_timesteps

    def signal(self, access: WhiteBox, x: Tensor, sample_id: Tensor) -> Tensor:
        return self.norms(access, x, sample_id, self.n_timesteps)

    def norms(self, access: WhiteBox, x: Tensor, sample_id: Tensor, together: int) -> Tensor:
        """Norms [B * n_timesteps / together, parameter tensors] of gradients of the mean loss over so many neighbouring timesteps."""
        diffusion, R = access.diffusion, self.n_timesteps
        access.count(self.nfe(diffusion.T) * len(x))
        t = equidistant(diffusion.T, R).to(x.device).repeat(len(x))
        eps = gaussian(derive(self.seed, "score"), sample_id.repeat_interleave(R), tuple(x.shape[1:]), t)
        return gradients(diffusion.net, diffusion.loss, (x.repeat_interleave(R, 0), t, eps), together).norms

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        return judged_by(self.head, signals)


def equidistant(T: int, n: int) -> Tensor:
    """n timesteps int64 [n] from 0 to T - 1, evenly spaced up to rounding."""
    return torch.linspace(0, T - 1, n, dtype=torch.float64).round().long()
