"""DP-SGD: training that is differentially private by construction.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, "Deep Learning with Differential Privacy", CCS 2016 (arXiv 1607.00133);
for diffusion models Dockhorn, Cao, Vahdat, Kreis, "Differentially Private Diffusion Models", 2023 (arXiv 2210.09929).
Gradients are clipped by `per_sample.clipped`; noise and accounting are those of Opacus (the extra `dp`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from diffmia_exp.config import Plain
from diffmia_exp.data import Images
from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import ConfigError, choice, number, whole
from diffmia_exp.recipe import Recipe, TrainerOptions

if TYPE_CHECKING:
    from diffmia_exp.lit import LitDiffusion

ACCOUNTANTS = ("rdp", "prv")
PRV_MOST = 100
ORDERS = [*range(2, 65), 80, 96, 128, 192, 256, 512]
"""Orders of `rdp`. Whole ones have a finite sum each; Opacus's fractional ones need as many terms as the noise multiplier is large."""


@dataclass(frozen=True)
class Account:
    """The privacy of a training: every step a Gaussian mechanism on a Poisson sample of the members.

    Args:
        noise_multiplier: sigma, the noise's standard deviation over the clipping norm.
        sample_rate: q, the probability of each member to be in a step's batch.
        delta: of the privacy definition.
        accountant: `rdp` or `prv`.
    """

    noise_multiplier: float
    sample_rate: float
    delta: float
    accountant: str

    def epsilon(self, steps: int) -> float:
        """What the accountant makes of so many steps: an upper bound of epsilon at `delta`, members added or removed."""
        from opacus.accountants import create_accountant

        accountant = create_accountant(self.accountant)
        accountant.history = [(self.noise_multiplier, self.sample_rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the best order is the last one
            return float(accountant.get_epsilon(self.delta, **_orders(self.accountant)))


class DPSGD(Defense):
    """The gradient of each image is clipped, and noise hides whether any one image was there.

    With each member in the batch S of a step independently with probability q = batch_size / n_members (at most 1: then all are),

        g_i = grad of the mean over K draws (t, eps) of L_t(x_i),    g_i <- g_i min(1, C / ||g_i||),
        g = (sum_{i in S} g_i + N(0, sigma^2 C^2 I)) / batch_size,

    where the norm is over all parameters together. The optimiser, its state and the weight average see g alone. This is
    (epsilon, delta)-differentially private; data sets are neighbours if one image is added to or removed from the other.

    Args:
        epsilon: of the whole training; None where `noise_multiplier` says how much noise there is.
        delta: of the privacy definition.
        max_grad_norm: C.
        noise_multiplier: sigma; None for the least that keeps to `epsilon`.
        draws_per_image: K (noise multiplicity, Dockhorn et al., section 3.2), which costs no privacy.
        accountant: `rdp` (Mironov, Talwar, Zhang 2019, arXiv 1908.10530) or `prv` (Gopi, Lee, Wutschitz 2021, arXiv 2106.02848), which is
            tighter and slower.
        physical_batch: evaluations that are in memory at a time; at least those of one image.
    """

    accounts = True
    heeds_labels = False

    def __init__(
        self,
        epsilon: float | None = 10.0,
        delta: float = 1e-5,
        max_grad_norm: float = 1.0,
        noise_multiplier: float | None = None,
        draws_per_image: int = 1,
        accountant: str = "rdp",
        physical_batch: int = 64,
    ) -> None:
        if (epsilon is None) == (noise_multiplier is None):
            raise ConfigError("epsilon", epsilon, f"must be given, or noise_multiplier, but not both (noise_multiplier={noise_multiplier})")
        self.epsilon = epsilon if epsilon is None else number("epsilon", epsilon, above=0)
        self.noise_multiplier = noise_multiplier if noise_multiplier is None else number("noise_multiplier", noise_multiplier, least=0.001)
        self.delta = number("delta", delta, above=0)
        if self.delta >= 1:
            raise ConfigError("delta", delta, "must be below 1, and for a guarantee worth the name below 1 / members")
        self.max_grad_norm = number("max_grad_norm", max_grad_norm, above=0)
        self.draws_per_image = whole("draws_per_image", draws_per_image, least=1)
        self.accountant = choice("accountant", accountant, ACCOUNTANTS)
        self.physical_batch = whole("physical_batch", physical_batch, least=1)

    def training(self, settings: Plain) -> Plain:
        """Without the recipe's clipping: gradients are clipped image by image."""
        return settings | {"grad_clip": 0}

    def check(self, recipe: Recipe, options: TrainerOptions, n_members: int) -> None:
        """See `Defense`."""
        if find_spec("opacus") is None:
            raise ConfigError("defense", "dp_sgd", "needs Opacus; install it with pip install -e '.[dp]'")
        if options.world != 1:
            raise ConfigError("trainer.devices", options.devices, "must be 1 with defense=dp_sgd")
        if options.precision != "32-true":
            raise ConfigError("trainer.precision", options.precision, "must be 32-true with defense=dp_sgd, for exact clipping")
        self.account(recipe, n_members)

    def account(self, recipe: Recipe, n_members: int) -> Account:
        """The privacy of a training on so many members, the noise multiplier chosen if need be."""
        sigma, q = self.noise_multiplier, min(1.0, recipe.batch_size / n_members)
        if self.accountant == "prv":
            about = self.epsilon if sigma is None else Account(sigma, q, self.delta, "rdp").epsilon(recipe.steps)
            if about is not None and about > PRV_MOST:
                must = f"must be rdp where epsilon is above {PRV_MOST}, here {about:.4g}: prv's memory grows with it"
                raise ConfigError("defense.accountant", self.accountant, must)
        if sigma is None:
            assert self.epsilon is not None
            try:
                sigma = calibrated(self.epsilon, self.delta, q, recipe.steps, self.accountant)
            except ValueError:
                within = f"at delta {self.delta:g} in {recipe.steps} steps, whatever the noise"
                must = f"cannot be reached by the accountant {self.accountant} {within}; raise it"
                raise ConfigError("defense.epsilon", self.epsilon, must) from None
        return Account(sigma, q, self.delta, self.accountant)

    def lit(self, public: Images) -> Callable[..., LitDiffusion]:
        """See `Defense`."""
        from diffmia_exp.defenses.dp_training import LitDPSGD  # seconds to import

        return LitDPSGD


@lru_cache(maxsize=64)
def calibrated(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str) -> float:
    """The noise multiplier that keeps `steps` steps to `epsilon`, up to 1% of it.

    Raises:
        ValueError: if none does.
    """
    from opacus.accountants.utils import get_noise_multiplier

    wanted: dict[str, Any] = {"target_epsilon": epsilon, "target_delta": delta, "sample_rate": sample_rate, "steps": steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the last one
        return float(get_noise_multiplier(**wanted, accountant=accountant, epsilon_tolerance=0.01 * epsilon, **_orders(accountant)))


def _orders(accountant: str) -> dict[str, Any]:
    return {"alphas": ORDERS} if accountant == "rdp" else {}
