"""Quantile regression: how high would a non-member score?

Tang, Wu, Aydore, Kearns, Roth, "Membership Inference Attacks on Diffusion Models via Quantile Regression", 2023 (arXiv 2312.05140).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import BaggingRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from diffmia_exp.attacks.base import Attack, HostedAttack
from diffmia_exp.errors import whole
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import GrayBox


class QuantileRegression(HostedAttack):
    """A host's score against the distribution that small networks, bagged, predict for a non-member that looks like the image.

    score = (s(x) - mu(x)) / sigma(x), s the host's score; mu and sigma are regressed on pixels, over public non-members

    The paper trains its networks with the pinball loss of one quantile and calls the images above it members. The score here is the
    location-scale form of the same idea: a threshold on it is a quantile of N(mu, sigma^2), for all quantiles at once. sigma comes
    from out-of-bag residuals. No shadow model is needed.

    Args:
        host: an attack on a single model; the paper takes SecMI's t-error.
        hidden: width of the networks' hidden layer.
        bags: networks that are averaged.
        seed: of their initialisation and of the bagging.
    """

    relays = False
    min_public = 128
    judging = ("hidden", "bags", "seed")

    def __init__(self, host: Attack, hidden: int = 32, bags: int = 10, seed: int = 0) -> None:
        super().__init__(host)
        self.hidden = whole("hidden", hidden, least=1)
        self.bags = whole("bags", bags, least=2)
        self.seed = whole("seed", seed, least=0)

    def signal(self, access: GrayBox, x: Tensor, sample_id: Tensor) -> Tensor:
        return torch.cat([self.host.score(access, x, sample_id)[:, None], x.flatten(1)], 1)

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        score, pixels, public = signals.target[:, 0], signals.target[:, 1:], signals.public
        centre, scale = score[public].mean(), score[public].std()
        score = (score - centre) / scale
        located = self._bag().fit(pixels[public], score[public])
        out_of_bag = located[-1].oob_prediction_
        error = np.log(np.abs(score[public] - out_of_bag) + 0.05)  # the offset keeps a lucky guess from counting as certainty
        scaled = self._bag(oob=False).fit(pixels[public], error)
        return (score - located.predict(pixels)) / np.exp(scaled.predict(pixels))

    def _bag(self, oob: bool = True) -> BaggingRegressor:
        net = MLPRegressor(hidden_layer_sizes=(self.hidden,), alpha=1.0, max_iter=300, random_state=self.seed)
        return make_pipeline(StandardScaler(), BaggingRegressor(net, self.bags, oob_score=oob, random_state=self.seed))
