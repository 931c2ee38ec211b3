"""DistillMD: a network that has each image explained by a teacher that never saw it.

"Dual-Model Defense: Safeguarding Diffusion Models from Membership Inference Attacks through Disjoint Data Splitting", 2024
(arXiv 2410.16657).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from diffmia_exp.data import Images
from diffmia_exp.defenses.base import Defense
from diffmia_exp.defenses.dual_md import Halves, predicted
from diffmia_exp.errors import ConfigError, number
from diffmia_exp.recipe import Recipe, TrainerOptions

if TYPE_CHECKING:
    from diffmia_exp.lit import LitDiffusion


class Distilled(Halves):
    """Two teachers and their student, which alone is put to use."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__(make)
        self.student = make()

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The student's prediction [B, C, H, W]."""
        return predicted(self.student, x_t, t)


class DistillMD(Defense):
    """The members are halved at random; two teachers learn a half each, then teach a student the half they do not know.

    The student minimises ||eps^student_t(x_t) - eps^teacher_t(x_t)||^2, with the teacher that was trained without x_0. It never meets
    the noise that was drawn, so nothing of an image but what the other half's teacher makes of it reaches the student. Only the
    student is put to use; a white-box adversary is handed its weights and not the teachers'.

    Args:
        share: of the steps, for the teachers. Both are trained at each step, on the images of the batch that are theirs.
    """

    heeds_labels = False

    def __init__(self, share: float = 0.5) -> None:
        self.share = number("share", share, above=0)
        if self.share >= 1:
            raise ConfigError("share", share, "must be below 1, so that some steps are left for the student")

    def teacher_steps(self, steps: int) -> int:
        """How many of the steps train the teachers."""
        return round(self.share * steps)

    def check(self, recipe: Recipe, options: TrainerOptions, n_members: int) -> None:
        """See `Defense`."""
        begun = self.teacher_steps(recipe.steps)
        if not 0 < begun < recipe.steps:
            raise ConfigError("defense.share", self.share, f"leaves no step of {recipe.steps} for the {'student' if begun else 'teachers'}")
        if early := [step for step in recipe.snapshots if step <= begun]:
            must = f"must be above {begun} with defense=distill_md: before that, the student that is attacked has not been trained"
            raise ConfigError("training.snapshots", early[0], must)

    def network(self, make: Callable[[], nn.Module]) -> nn.Module:
        """See `Defense`."""
        return Distilled(make)

    def served(self, net: nn.Module) -> nn.Module:
        """The student."""
        assert isinstance(net, Distilled)
        return net.student

    def lit(self, public: Images) -> Callable[..., LitDiffusion]:
        """See `Defense`."""
        from diffmia_exp.defenses.halves_training import LitDistillMD  # seconds to import

        return LitDistillMD
