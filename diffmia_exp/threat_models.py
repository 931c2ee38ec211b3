"""What the adversary may ask of the target: four access classes, each granting what the one below it grants and more.

An attack is handed one of these and nothing else of the target. Every call counts the model evaluations it costs; past the
budget a call is refused. Results carry no autograd graph: gradients are to be had from `WhiteBox.diffusion` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffmia_exp.defenses.base import Defense
from diffmia_exp.diffusion import Diffusion, Schedule, Timestep
from diffmia_exp.errors import ConfigError, UserError, choice, flag, number, whole
from diffmia_exp.noise import derive, gaussian, whole_numbers

BLOCK = 64
"""Images per network call are padded to a multiple of this. Kernels round differently for odd batch sizes, by about 1e-6 in
float32, which attacks that take a difference of two predictions magnify; padded, scores do not depend on the batch size."""


Sampler = Callable[[int, int, int], Tensor]


class QueryBudgetExceeded(UserError):
    """The attack asked for more model evaluations than the threat model grants."""


class QueryLimitExceeded(UserError):
    """The attack asked for more variations of an image than the service gives."""


class SamplesOnly:
    """The adversary sees generated images, and how many model evaluations they cost.

    Args:
        diffusion: the target.
        budget: model evaluations granted in all (one evaluation = the net run on one image once); None for no limit.
        sampler: where generated images come from as the service gives them, given (n, steps, seed): a store that keeps them; None for
            the target itself.
        defense: what stands between the target and its users.
    """

    def __init__(
        self, diffusion: Diffusion, budget: int | None = None, sampler: Sampler | None = None, defense: Defense | None = None
    ) -> None:
        self._target = diffusion
        self._defense = defense or Defense()
        self._sampler = sampler or (lambda n, steps, seed: generated(diffusion, n, steps, seed, self._defense))
        self._given: Counter[int] = Counter()
        self.budget = budget if budget is None else whole("budget", budget, least=0)
        self.evaluations = 0

    def _pay(self, evaluations: int) -> Diffusion:
        """The target, for a call that costs so many evaluations."""
        if self.budget is not None and self.evaluations + evaluations > self.budget:
            raise QueryBudgetExceeded(
                f"threat_model.query_budget: the attack asked for {self.evaluations + evaluations} model evaluations in all, "
                f"{self.budget} are granted; raise the budget or lower the attack's cost"
            )
        self.evaluations += whole("evaluations", evaluations, least=0)
        return self._target

    def sample(self, n: int, steps: int = 50, seed: int = 0) -> Tensor:
        """n generated images, float32 [n, C, H, W] in [-1, 1]. Costs n x steps evaluations."""
        self._pay(n * steps)
        return self._sampler(n, steps, seed)


def generated(diffusion: Diffusion, n: int, steps: int, seed: int, defense: Defense) -> Tensor:
    """What a defended service generates: images of `Diffusion.sample`, those of the same seed answered alike whatever n is."""
    drawn = diffusion.sample(n, steps, seed)
    return defense.answered(drawn, derive(seed, "answer", 0), torch.arange(n, device=drawn.device), 0)


class VariationAPI(SamplesOnly):
    """The adversary may also send an image and receive a variation of it (image-to-image)."""

    @torch.no_grad()
    def vary(self, x: Tensor, sample_id: Tensor, strength: float = 0.2, steps: int = 2, seed: int = 0, draw: int | Tensor = 0) -> Tensor:
        """Noise x to t = strength * T and denoise it again in `steps` deterministic DDIM steps.

        Args:
            x: images [B, C, H, W] in [-1, 1].
            sample_id: int64 [B]; the service's noise is a pure function of (seed, sample id, draw).
            strength: how far towards noise, in (0, 1].
            steps: DDIM steps back, 1 to strength * T.
            seed, draw: which of the image's variations; draw is one number for all images, or int64 [B].

        Returns:
            [B, C, H, W] in [-1, 1]. Costs B x steps evaluations.
        """
        schedule = self._target.schedule
        t = max(round(number("strength", strength, above=0, most=1) * schedule.T), 1) - 1
        whole("steps", steps, least=1, most=t + 1)
        self._admit(sample_id)
        target = self._pay(len(x) * steps)
        x = schedule.q_sample(x, t, gaussian(derive(seed, "vary"), sample_id, tuple(x.shape[1:]), draw).to(x))
        times = torch.linspace(t, -1, steps + 1, dtype=torch.float64).round().long().tolist()
        for now, then in pairwise(times):
            x = schedule.ddim(x, now, then, _in_blocks(target.eps, x, now))
        return self._defense.answered(x.clamp(-1, 1), derive(seed, "answer", 1), sample_id, draw)

    def _admit(self, sample_id: Tensor) -> None:
        """Count the variations given of each image, and refuse more than the defence allows."""
        if (most := self._defense.variations) is None:
            return
        asked = Counter(sample_id.tolist())
        if (worst := max((self._given[i] + n for i, n in asked.items()), default=0)) > most:
            raise QueryLimitExceeded(f"defense.variations: the attack asked for {worst} variations of an image in all, {most} are given")
        self._given.update(asked)


class GrayBox(VariationAPI):
    """The adversary may also query the noise prediction at any (x_t, t) and knows the schedule."""

    @property
    def schedule(self) -> Schedule:
        """The noise schedule: `alphas_cumprod` and the maths that needs no network."""
        return self._target.schedule

    @torch.no_grad()
    def eps(self, x_t: Tensor, t: Timestep) -> Tensor:
        """The noise prediction eps_t(x_t), [B, C, H, W], in the precision of x_t. Costs B evaluations."""
        return _in_blocks(self._pay(len(x_t)).eps, x_t, t)

    @torch.no_grad()
    def x0_hat(self, x_t: Tensor, t: Timestep) -> Tensor:
        """The denoised prediction of x_0 at (x_t, t). Costs B evaluations."""
        return _in_blocks(self._pay(len(x_t)).x0_hat, x_t, t)


class WhiteBox(GrayBox):
    """The adversary holds the model: weights, activations and gradients."""

    @property
    def diffusion(self) -> Diffusion:
        """The target itself. Evaluations made through it are declared with `count`."""
        return self._target

    def count(self, evaluations: int) -> None:
        """Declare model evaluations (a backward pass counts as one more) made on `diffusion` directly."""
        self._pay(evaluations)


def _in_blocks(predict: Callable[[Tensor, Timestep], Tensor], x_t: Tensor, t: Timestep) -> Tensor:
    """predict(x_t, t), its batch padded to a multiple of BLOCK with copies of the first image."""
    n, padding = len(x_t), -len(x_t) % BLOCK
    if not padding:
        return predict(x_t, t)
    t = whole_numbers(t, x_t.device).expand(n)
    padded = torch.cat([x_t, x_t[:1].expand(padding, *x_t.shape[1:])]), torch.cat([t, t[:1].expand(padding)])
    return predict(*padded)[:n]


LEVELS: dict[str, type[SamplesOnly]] = {
    "samples_only": SamplesOnly,
    "variation_api": VariationAPI,
    "gray_box": GrayBox,
    "white_box": WhiteBox,
}


def level_of(access: type[SamplesOnly]) -> str:
    """The name of an access class in configs."""
    return next(name for name, cls in LEVELS.items() if cls is access)


@dataclass(frozen=True)
class ThreatModel:
    """An access level and what the adversary knows beside it.

    Args:
        access: one of `samples_only`, `variation_api`, `gray_box`, `white_box`.
        query_budget: model evaluations per measured image; None for no limit.
        shadow_model: settings of `model` that the adversary gets wrong: its shadows and surrogates are built with these instead.
        shadow_training: the same for `training`.
        shadow_defense: whether shadows and surrogates are defended as the target is, by an adversary who knows of the defence.
        knows_label: whether the adversary knows the class of the images it asks about, where the model is conditional; otherwise it
            asks under the null label.
    """

    access: str
    query_budget: int | None = None
    shadow_model: dict[str, Any] | None = None
    shadow_training: dict[str, Any] | None = None
    shadow_defense: bool = True
    knows_label: bool = True

    def __post_init__(self) -> None:
        choice("access", self.access, LEVELS)
        if self.query_budget is not None:
            whole("query_budget", self.query_budget, least=1)
        for key in ("shadow_model", "shadow_training"):
            if not isinstance(getattr(self, key), dict | None):
                raise ConfigError(key, getattr(self, key), "must be settings, as {steps: 300}, or null")
        flag("shadow_defense", self.shadow_defense)
        flag("knows_label", self.knows_label)

    def grants(self, needed: type[SamplesOnly]) -> bool:
        """Whether an attack that needs this access may run."""
        return issubclass(LEVELS[self.access], needed)

    def grant(
        self,
        diffusion: Diffusion,
        needed: type[SamplesOnly],
        images: int,
        sampler: Sampler | None = None,
        defense: Defense | None = None,
    ) -> SamplesOnly:
        """The least access the attack needs to the target, with the budget for so many images, behind the defence."""
        if not self.grants(needed):
            raise ConfigError("access", self.access, f"must be {enough(needed)} for this attack")
        budget = None if self.query_budget is None else self.query_budget * images
        return needed(diffusion, budget, sampler, defense)


def enough(needed: type[SamplesOnly]) -> str:
    """The levels that satisfy an attack, for messages."""
    return " or ".join(name for name, cls in LEVELS.items() if issubclass(cls, needed))
