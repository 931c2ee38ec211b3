"""Surrogate: the black-box attack of the paper this project implements.

Zhu, Chen, Grossklags, Fritz, 2023 (arXiv 2302.07801): sample the target, train a diffusion model on the samples, attack that one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffmia_exp.attacks.base import Attack, HostedAttack, Lab
from diffmia_exp.errors import whole
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import SamplesOnly


class Surrogate(HostedAttack):
    """A host attack on a model that was trained on generated images.

    score = the host's score on the surrogate; the paper's host is the trajectory statistic, its samples 40,000 for 4,096 members

    The surrogate is trained by the recipe that the adversary believes the target to have (`threat_model.shadow_training`), from an
    initialisation of its own.

    Args:
        host: an attack on a single model, of any access: the surrogate is the adversary's own.
        n_samples: generated images.
        steps: DDIM steps for each.
        sample_seed: of the generated images.
    """

    relays = False
    trains = True

    def __init__(self, host: Attack, n_samples: int = 2048, steps: int = 50, sample_seed: int = 0) -> None:
        super().__init__(host)
        self.access = SamplesOnly
        self.n_samples = whole("n_samples", n_samples, least=1)
        self.steps = whole("steps", steps, least=1)
        self.sample_seed = whole("sample_seed", sample_seed, least=0)

    def nfe(self, T: int) -> int:
        super().nfe(T)
        whole("steps", self.steps, most=T)
        return 0

    def check_variations(self, most: int) -> None:
        """The surrogate gives as many as its owner wants."""

    def nfe_once(self, T: int) -> int:
        return self.n_samples * self.steps

    def prepare(self, access: SamplesOnly, lab: Lab) -> None:
        drawn = access.sample(self.n_samples, self.steps, self.sample_seed)
        pixels = ((drawn + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
        self.surrogate: Any = self.host.access(lab.train(pixels))

    def signal(self, access: SamplesOnly, x: Tensor, sample_id: Tensor) -> Tensor:
        return self.host.signal(self.surrogate, x, sample_id)

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        return self.host.judge(signals)
