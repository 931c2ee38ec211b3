"""What every attack is: the access it needs, what it costs, what it measures on a model, and how it judges what was measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffmia_exp.data import Images, Pixels
from diffmia_exp.diffusion import Diffusion
from diffmia_exp.errors import ConfigError
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import SamplesOnly


class Lab(Protocol):
    """What the adversary has at home, beside its access to the target."""

    @property
    def public(self) -> Images:
        """Images that are known to be in no model's pool (`split.public` of them)."""

    def train(self, pixels: Pixels) -> Diffusion:
        """A model that the adversary trains itself, on uint8 images [n, C, H, W], by the recipe it believes in; kept in the store.

        If the target is conditional the images are taken for its generated ones, in their order, and so is this model.
        """


class Attack(ABC):
    """A membership inference attack. Hyper-parameters are constructor arguments, checked there.

    `signal` measures one model, in batches; `judge` turns what was measured into scores. Attacks on a single model implement
    `score` alone. To add one: a subclass in a file of its own, `conf/attack/<name>.yaml` naming it as `_target_`, and a test of its
    formula (docs/adding-an-attack.md).
    """

    access: type[SamplesOnly]
    """The least access the attack needs. It is handed exactly that, whatever more the threat model grants."""

    min_shadows: int = 0
    """Shadow models that `judge` needs at least."""

    min_public: int = 0
    """Public images (`split.public`) that the attack needs at least."""

    trains: bool = False
    """Whether it trains a model of its own in `prepare`."""

    needs_inside: bool = False
    """Whether `judge` needs shadows that were trained on audited images (online attacks)."""

    compares: bool = True
    """Whether `judge` looks at the shadows' signals of the very image that it judges, not only at those of their pools, to learn."""

    judging: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that only `judge` uses: changing them measures nothing anew."""

    @abstractmethod
    def nfe(self, T: int) -> int:
        """Model evaluations per image on a model of T timesteps (a backward pass counts as one more).

        Raises:
            ConfigError: if the attack's timesteps do not fit into T, naming the argument.
        """

    def nfe_once(self, T: int) -> int:
        """Model evaluations spent once per model, in `prepare`: generated images."""
        return 0

    def check(self, image_shape: tuple[int, ...]) -> None:  # noqa: B027
        """Called before anything is trained: refuse images (C, H, W) that the attack cannot take.

        Raises:
            ConfigError: naming the argument.
        """

    def check_variations(self, most: int) -> None:  # noqa: B027
        """Called before anything is trained where the service gives so many variations of an image: refuse to ask for more.

        Raises:
            ConfigError: naming the argument to lower.
        """

    def prepare(self, access: Any, lab: Lab) -> None:  # noqa: B027
        """Called once per measured model, before `signal`: draw samples, train a surrogate."""

    def signal(self, access: Any, x: Tensor, sample_id: Tensor) -> Tensor:
        """What is measured of a batch on one model, float64 [B, F]; arguments as in `score`."""
        return self.score(access, x, sample_id)[:, None]

    def judge(self, signals: Signals) -> NDArray[np.float64]:
        """Scores [n] of all measured images, higher = member; that of an image depends on its own signals and on the shadows' alone."""
        return signals.target[:, 0]

    def score(self, access: Any, x: Tensor, sample_id: Tensor) -> Tensor:
        """Membership scores of a batch, higher = member.

        Args:
            access: an instance of `self.access`.
            x: float64 images [B, C, H, W] in [-1, 1].
            sample_id: int64 [B]; whatever the attack draws at random is a pure function of these.

        Returns:
            float64 [B]. The score of an image depends on that image alone, not on the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} judges signals; see Attack.judge")


class ResidualAttack(Attack):
    """An attack whose score is the size of an error map: score = -mean over maps of ||residual||_p^p.

    Its maps can be filtered (`fremia`) or given to a head trained on shadow models (`secmi_nns`).
    """

    p: float = 2

    @abstractmethod
    def residuals(self, access: Any, x: Tensor, sample_id: Tensor) -> Tensor:
        """Error maps float64 [B, R, C, H, W], R of them per image; arguments as in `score`."""

    def reduce(self, residuals: Tensor) -> Tensor:
        """Scores [B] of error maps [B, R, C, H, W]."""
        return -residuals.abs().pow(self.p).flatten(2).sum(2).mean(1)

    def score(self, access: Any, x: Tensor, sample_id: Tensor) -> Tensor:
        return self.reduce(self.residuals(access, x, sample_id))


class HostedAttack(Attack):
    """An attack on top of another one, its host, whose signals it judges against those of shadow models.

    Args:
        host: an attack on a single model.

    Raises:
        ConfigError: if the host itself needs shadows or public images.
    """

    relays: ClassVar[bool] = True
    """Whether the signal is the host's, unchanged, and can be shared with it."""

    def __init__(self, host: Attack) -> None:
        if host.min_shadows or host.min_public:
            must = "must be an attack on a single model, without shadows or public images of its own; use loss, say"
            raise ConfigError("host", type(host).__name__, must)
        self.host = host
        self.access = host.access

    def nfe(self, T: int) -> int:
        try:
            return self.host.nfe(T)
        except ConfigError as e:
            raise e.under("host") from None

    def nfe_once(self, T: int) -> int:
        return self.host.nfe_once(T)

    def check(self, image_shape: tuple[int, ...]) -> None:
        self.host.check(image_shape)

    def check_variations(self, most: int) -> None:
        try:
            self.host.check_variations(most)
        except ConfigError as e:
            raise e.under("host") from None

    def prepare(self, access: Any, lab: Lab) -> None:
        self.host.prepare(access, lab)

    def signal(self, access: Any, x: Tensor, sample_id: Tensor) -> Tensor:
        return self.host.signal(access, x, sample_id)
