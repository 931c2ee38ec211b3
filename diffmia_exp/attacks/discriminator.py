"""Over-represented regions: a model generates more around what it was trained on than the world holds there.

The idea of Hu & Pang, "Membership Inference Attacks against GANs by Leveraging Over-representation Regions", CCS 2021, carried to
diffusion models (by the same authors on these: "Membership Inference of Diffusion Models", arXiv 2301.09956).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffmia_exp.attacks.base import Lab
from diffmia_exp.attacks.knn import SampleAttack
from diffmia_exp.errors import ConfigError
from diffmia_exp.features import Features
from diffmia_exp.threat_models import SamplesOnly


class Discriminator(SampleAttack):
    """A classifier that tells generated images (class 1) from public ones (class 0), asked about the candidate.

    score = log p - log(1 - p), p the classifier's probability that f(x) is of a generated image (its `decision_function` where it has one)

    The smaller class is repeated until both are equally large. Log-odds are ranked as p is, but are not rounded to 1 as early; of
    a classifier without a decision function they end at +-36.7, where 1 - p is lost in float64.

    Args:
        classifier: with scikit-learn's interface, of which a copy is trained; None for a small perceptron on standardised features.
        n_samples: generated images per model.
        steps: sampling steps.
        sample_seed: of the generated images.
        features: a `diffmia_exp.features` class; None for the pixels.
    """

    min_public = 64

    def __init__(
        self, classifier: Any = None, n_samples: int = 2048, steps: int = 50, sample_seed: int = 0, features: Features | None = None
    ) -> None:
        super().__init__(n_samples, steps, sample_seed, features)
        if classifier is not None and not (hasattr(classifier, "fit") and hasattr(classifier, "get_params")):
            raise ConfigError("classifier", classifier, "must be a classifier of scikit-learn, as in conf/attack/discriminator.yaml")
        self.classifier = classifier
        self._learned: Any = None

    def prepare(self, access: SamplesOnly, lab: Lab) -> None:
        from sklearn.base import clone
        from sklearn.exceptions import ConvergenceWarning

        super().prepare(access, lab)
        public = self.features(torch.from_numpy(lab.public.pixels).double() / 127.5 - 1).cpu().numpy()
        generated = self.drawn.cpu().numpy()
        n = max(len(generated), len(public))
        both = np.concatenate([np.resize(generated, (n, generated.shape[1])), np.resize(public, (n, public.shape[1]))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of passes is what was asked for
            self._learned = clone(perceptron() if self.classifier is None else self.classifier).fit(both, np.repeat([1, 0], n))

    def score(self, access: SamplesOnly, x: Tensor, sample_id: Tensor) -> Tensor:
        if self._learned is None:
            raise RuntimeError("Discriminator.prepare must be called first: it trains the classifier")
        rows = self.features(x).cpu().numpy()
        # One image at a time: matrix products round differently for other batch sizes.
        return torch.tensor([log_odds(self._learned, row[None]) for row in rows], dtype=torch.float64, device=x.device)


def log_odds(classifier: Any, features: NDArray[np.float64]) -> float:
    """log p - log(1 - p) of one image's features [1, D]."""
    if hasattr(classifier, "decision_function"):
        return float(classifier.decision_function(features)[0])
    rest, p = np.clip(classifier.predict_proba(features)[0], 2**-53, 1)
    return float(np.log(p) - np.log(rest))


def perceptron() -> Any:
    """The default classifier."""
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), MLPClassifier((64,), alpha=0.1, max_iter=50, random_state=0))
