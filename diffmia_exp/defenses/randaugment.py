"""RandAugment: Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation", 2020 (arXiv 1909.13719)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import UserError, whole


class RandAugment(Defense):
    """Each training image goes through `n_ops` operations one after another, each drawn anew from kornia's list of 15.

    The operations (rotate, shear, translate, brightness, contrast, equalize, invert, posterize, ..) and their strengths at a magnitude
    are kornia's, whose list lacks the paper's identity. On grey images its `color` leaves an image as it is. Duan et al. 2023
    (arXiv 2302.01316) found that diffusion models often did not converge under it.

    Args:
        n_ops: operations an image goes through.
        magnitude: their strength, 1 to 29.

    Raises:
        UserError: if kornia is not installed.
    """

    def __init__(self, n_ops: int = 2, magnitude: int = 9) -> None:
        self.n_ops = whole("n_ops", n_ops, least=1)
        self.magnitude = whole("magnitude", magnitude, least=1, most=29)
        try:
            from kornia.augmentation.auto import RandAugment as Operation
            from kornia.augmentation.auto.rand_augment.rand_augment import default_policy
        except ImportError:
            raise UserError("defense=randaugment: needs kornia; install it with pip install -e '.[augment]'") from None
        # One by one: kornia draws an operation for the whole batch.
        self._operations = {policy[0][0]: Operation(1, self.magnitude, policy=[policy]) for policy in default_policy}

    def augmented(self, x0: Tensor, g: torch.Generator) -> Tensor:
        """See `Defense`."""
        x = (x0 + 1) / 2
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=g)))  # which kornia draws signs from
            for _ in range(self.n_ops):
                drawn = torch.randint(len(self._operations), (len(x),), generator=g)
                x = x.clone()
                for n, (name, operation) in enumerate(self._operations.items()):
                    of = (drawn == n).nonzero()[:, 0].to(x.device)
                    if len(of) and (x.shape[1] == 3 or name != "color"):
                        x[of] = operation(x[of]).clamp(0, 1)
        return 2 * x - 1
