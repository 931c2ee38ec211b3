"""What every attack is: the access it needs, what it costs, and a score per image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from diffmia_exp.threat_models import SamplesOnly


class Attack(ABC):
    """A membership inference attack. Hyper-parameters are constructor arguments, checked there.

    To add one: a subclass in a file of its own, `conf/attack/<name>.yaml` naming it as `_target_`, and a test of its formula
    (docs/adding-an-attack.md).
    """

    access: ClassVar[type[SamplesOnly]]
    """The least access the attack needs. It is handed exactly that, whatever more the threat model grants."""

    needs_shadows: ClassVar[bool] = False
    """Whether `fit` must have seen shadow models before `score`."""

    @abstractmethod
    def nfe(self, T: int) -> int:
        """Model evaluations per image on a model of T timesteps.

        Raises:
            ConfigError: if the attack's timesteps do not fit into T, naming the argument.
        """

    @abstractmethod
    def score(self, access: Any, x: Tensor, sample_id: Tensor) -> Tensor:
        """Membership scores of a batch, higher = member.

        Args:
            access: an instance of `self.access`.
            x: float64 images [B, C, H, W] in [-1, 1].
            sample_id: int64 [B]; whatever the attack draws at random is a pure function of these.

        Returns:
            float64 [B]. The score of an image depends on that image alone, not on the batch.
        """
