"""Tracing the roots: the loss along the trajectory and its gradients, in the input and in the weights.

Floros, Moosavi-Dezfooli, Dragotti, "Tracing the Roots: Leveraging Temporal Dynamics in Diffusion Trajectories for Origin
Attribution", NeurIPS 2025 (arXiv 2411.07449).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import Tensor

from diffmia_exp.attacks.base import Attack
from diffmia_exp.attacks.gsa1 import equidistant
from diffmia_exp.errors import number, whole
from diffmia_exp.heads import judged_by
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.per_sample import gradients
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import WhiteBox


class TracingRoots(Attack):
    """Three numbers at each of several timesteps, judged by a linear classifier.

    L_t = mean over pixels of (eps - eps_t(x_t))^2, one noise eps per t;
    signal = (L_t, ||d L_t / d x_t||_2^2, ||d L_t / d theta||_2^2 for each t), all t of the first, then of the second, of the third;
    score = P(member | signal) by logistic regression on the standardised logarithms of the signals (which span decades), learned
    from the shadow models'.

    Args:
        n_timesteps: how many t, equidistant from 0 to T - 1 (rounded).
        C: inverse strength of the regression's L2 penalty.
        seed: of the noises.
    """

    access = WhiteBox
    min_shadows = 1
    compares = False
    judging = ("C",)

    def __init__(self, n_timesteps: int = 10, C: float = 1.0, seed: int = 0) -> None:
        self.n_timesteps = whole("n_timesteps", n_timesteps, least=1)
        self.C = number("C", C, above=0)
        self.seed = whole("seed", seed, least=0)

    def nfe(self, T: int) -> int:
        whole("n_timesteps", self.n_timesteps, most=T)
        return 2 * self.n_timesteps

    def signal(self, access: WhiteBox, x: Tensor, sample_id: Tensor) -> Tensor:
        diffusion, R = access.diffusion, self.n_timesteps
        access.count(self.nfe(diffusion.T) * len(x))
        t = equidistant(diffusion.T, R).to(x.device).repeat(len(x))
        eps = gaussian(derive(self.seed, "score"), sample_id.repeat_interleave(R), tuple(x.shape[1:]), t)
        x_t = diffusion.q_sample(x.repeat_interleave(R, 0), t, eps)

        def loss(x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
            return (eps - diffusion.eps(x_t, t)).square().flatten(1).mean(1)

        found = gradients(diffusion.net, loss, (x_t, t, eps), of_input=True)
        assert found.of_input is not None
        features = found.loss, found.of_input.flatten(1).square().sum(1), found.norms.square().sum(1)
        return torch.cat([v.unflatten(0, (len(x), R)) for v in features], 1)

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        regression = LogisticRegression(C=self.C, max_iter=1000)
        return judged_by(make_pipeline(FunctionTransformer(_log), StandardScaler(), regression), signals)


def _log(signals: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(np.maximum(signals, np.finfo(np.float64).tiny))
