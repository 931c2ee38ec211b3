"""The training of `dual_md` and `distill_md`: each image trains the network of its half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffmia_exp.config import Plain
from diffmia_exp.defenses.distill_md import Distilled, DistillMD
from diffmia_exp.defenses.dual_md import Halves, predicted
from diffmia_exp.lit import LitDiffusion
from diffmia_exp.noise import generator


class LitDualMD(LitDiffusion):
    """See `LitDiffusion`. Which half a member is in is a function of (seed, model index, number of members)."""

    parallel = False  # a device whose images are all of one half would leave the others waiting for the rest of its gradients

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        n = len(self._pixels)
        order = torch.from_numpy(generator(self.seed, "halves", self.model_index).permutation(n))
        self._second = order < n // 2

    @property
    def net(self) -> Halves:
        """What is trained."""
        net = self.diffusion.net
        assert isinstance(net, Halves)
        return net

    def second(self, index: Tensor) -> Tensor:
        """Whether the members of these indices train `b`, bool as index."""
        return self._second.to(index.device)[index]

    def loss(self, x0: Tensor, t: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """That of the network of each image's half."""
        x_t, target = self.diffusion.q_sample(x0, t, noise), self.diffusion.target(x0, t, noise)
        return (self.net.each(x_t, t, self.second(index)) - target).square().flatten(1).mean(1)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Each network's gradients apart: their joint norm would let the images of one half scale the steps of the other's."""
        for net in self.net.children():
            if gradient_clip_val:
                nn.utils.clip_grad_norm_(net.parameters(), gradient_clip_val)

    def facts(self) -> Plain:
        """The sizes of the halves, and of what is put to use."""
        n = int(self._second.sum())
        in_use = self.defense.served(self.net)
        return {"halves": [len(self._second) - n, n], "parameters_in_use": sum(p.numel() for p in in_use.parameters())}


class LitDistillMD(LitDualMD):
    """See `LitDualMD`; `defense` is a `DistillMD`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.defense, DistillMD)
        self.begun = self.defense.teacher_steps(self.recipe.steps)

    def loss(self, x0: Tensor, t: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """The teachers', then the student's."""
        return super().loss(x0, t, noise, index) if self.global_step < self.begun else self.distilled(x0, t, noise, index)

    def distilled(self, x0: Tensor, t: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """The student's squared distance from what the teacher that does not know the image predicts, per image [B]."""
        net, x_t = self.net, self.diffusion.q_sample(x0, t, noise)
        assert isinstance(net, Distilled)
        net.a.eval()
        net.b.eval()
        with torch.no_grad():
            taught = net.each(x_t, t, ~self.second(index))
        return (predicted(net.student, x_t, t) - taught).square().flatten(1).mean(1)

    def ema_decay(self, step: int) -> float:
        """The student's average forgets its initialisation as if its training were one of its own."""
        return super().ema_decay(step if step <= self.begun else step - self.begun)

    def facts(self) -> Plain:
        """See `LitDualMD`."""
        return super().facts() | {"teacher_steps": self.begun}
