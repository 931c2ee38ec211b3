"""What every defence is: where it may step in between the images and the service, and what it does there. By default nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffmia_exp.config import Plain
from diffmia_exp.data import Images
from diffmia_exp.recipe import Recipe, TrainerOptions

if TYPE_CHECKING:
    from diffmia_exp.lit import LitDiffusion


class Defense:
    """A defence, and the absence of one (`defense=none`). To add one: a subclass in a file of its own, `conf/defense/<name>.yaml` naming
    it as `_target_`, and a test of what it changes. Hyper-parameters are constructor arguments, checked there.

    The hooks are called in this order: `model`, `training`, `check`, `kept`, `network`, `lit`, `augmented` at every step, and when the
    finished model is used, `served` and `answered`.
    """

    trains: bool = True
    """Whether the weights depend on it. If not, it stands between the finished model and its users."""

    answers: bool = False
    """Whether what the service returns depends on it."""

    variations: int | None = None
    """Variations that the service gives of an image at most; None for no limit."""

    min_public: int = 0
    """Public images (`split.public`) that it needs at least."""

    accounts: bool = False
    """Whether it bounds what one training image may betray, a bound that copies of the image would break."""

    heeds_labels: bool = True
    """Whether class-conditional models can be trained with it."""

    def model(self, settings: Plain) -> Plain:
        """The settings of the network (group `model`), changed."""
        return settings

    def training(self, settings: Plain) -> Plain:
        """The settings of the training (group `training`), changed."""
        return settings

    def check(self, recipe: Recipe, options: TrainerOptions, n_members: int) -> None:
        """Refuse, before anything is trained, what cannot be trained so; `n_members` are the images of the smallest training set."""

    def kept(self, members: Images) -> NDArray[np.bool_]:
        """Which of the training images are trained on, bool [n]."""
        return np.ones(len(members), bool)

    def network(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The network to be trained; each `make()` is a freshly initialised one as configured."""
        return make()

    def lit(self, public: Images) -> Callable[..., LitDiffusion]:
        """What makes the Lightning module: `LitDiffusion`, or a class derived from it, with its arguments.

        Args:
            public: images in no model's pool, to judge the training by.
        """
        from diffmia_exp.lit import LitDiffusion  # seconds to import

        return LitDiffusion

    def augmented(self, x0: Tensor, g: torch.Generator) -> Tensor:
        """A step's whole batch [B, C, H, W] in [-1, 1], changed by draws from `g` (on the CPU), which is seeded for this step."""
        return x0

    def answered(self, x: Tensor, seed: int, sample_id: Tensor, draw: int | Tensor) -> Tensor:
        """What the service returns in place of the images x [B, C, H, W] in [-1, 1]: noises are a function of the other arguments.

        Args:
            x: generated images, or variations of images that a user sent.
            seed: of this kind of answer, a 63-bit one.
            sample_id: int64 [B].
            draw: which of the image's variations; one for all, or int64 [B].
        """
        return x

    def served(self, net: nn.Module) -> nn.Module:
        """What of a trained network is put to use, and so attacked, white-box attacks included."""
        return net
