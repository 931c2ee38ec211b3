"""The training of `dp_sgd`: Poisson batches, gradients clipped image by image, and a step with Opacus's noise."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.validators import ModuleValidator
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from diffmia_exp import per_sample
from diffmia_exp.config import Plain
from diffmia_exp.defenses.dp_sgd import DPSGD
from diffmia_exp.errors import ConfigError
from diffmia_exp.lit import LitDiffusion, on_device
from diffmia_exp.noise import derive

AGREEMENT = 1e-3
"""How far an image's gradient in a batch may be from its gradient alone, relative to the norm: rounding, and no more."""


class LitDPSGD(LitDiffusion):
    """See `LitDiffusion`; `defense` is a `DPSGD`.

    Batches, timesteps, noises and the noise of the mechanism are functions of (seed, model index, step) here too. Who knows the seed
    can subtract the latter: the guarantee is for those who do not.

    Raises:
        ConfigError: for a network whose images do not have gradients of their own, or if there are too few members.
    """

    parallel = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.defense, DPSGD)
        self.private = self.defense
        self.account = self.private.account(self.recipe, len(self._pixels))
        self.automatic_optimization = False
        self._check_network()

    def draws(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the Poisson batch of `step` consists of.

        Returns:
            as in `LitDiffusion`, each image K times in succession; there may be none.
        """
        K = self.private.draws_per_image
        g = torch.Generator().manual_seed(self._derived(step, 0))
        drawn = torch.rand(len(self._pixels), generator=g, dtype=torch.float64) < self.account.sample_rate
        index = drawn.nonzero()[:, 0].repeat_interleave(K)
        t = torch.randint(self.diffusion.T, (len(index),), generator=g)
        noise = torch.randn((len(index), *self._pixels.shape[1:]), generator=g)
        return index, t, noise, torch.rand(len(index), generator=g) < 0.5

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step, K = self.global_step, self.private.draws_per_image
        outer = self.optimizers()
        assert isinstance(outer, LightningOptimizer)
        optimizer: Any = outer.optimizer
        torch.manual_seed(self._derived(step, 1))  # for dropout
        optimizer.generator = torch.Generator(self.device).manual_seed(self._derived(step, 2))
        index, t, noise, flips = (on_device(d, self.device) for d in self.draws(step))
        x0 = self._pixels[index].float() / 127.5 - 1
        if self.recipe.flip:
            x0 = torch.where(flips[:, None, None, None], x0.flip(-1), x0)
        rows = max(1, self.private.physical_batch // K) * K
        total = torch.zeros((), device=self.device)
        slices = [slice(at, at + rows) for at in range(0, len(index), rows)] or [slice(0, 0)]
        for at in slices:
            total += self._accumulate(x0[at], t[at], noise[at], index[at])
            if at is not slices[-1]:  # clip and add up only
                optimizer.signal_skip_step(do_skip=True)
                optimizer.step()
        optimizer.signal_skip_step(do_skip=False)
        outer.step()
        optimizer.zero_grad(set_to_none=True)
        self.average(step + 1)
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return total / max(1, len(index))

    def _accumulate(self, x0: Tensor, t: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Leave the sum of the images' clipped gradients in `grad`; the sum of their losses. There may be no image."""
        net, trained = self.diffusion.net, self._trained()
        if not len(index):
            for p in trained:
                p.grad = torch.zeros_like(p)
            return x0.new_zeros(())
        found = per_sample.clipped(net, self.loss, (x0, t, noise, index), self.private.max_grad_norm, self.private.draws_per_image)
        for p, grad in zip(trained, found.total, strict=True):
            p.grad = grad
        return found.loss.sum()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.diffusion.net.parameters() if p.requires_grad]

    def _derived(self, step: int, use: int) -> int:
        return derive(self.seed, "private", self.model_index, step, use)

    def optimizer(self) -> DPOptimizerFastGradientClipping:
        """The recipe's, which sees clipped and noised gradients alone."""
        return DPOptimizerFastGradientClipping(
            super().optimizer(),
            noise_multiplier=self.account.noise_multiplier,
            max_grad_norm=self.private.max_grad_norm,
            expected_batch_size=self.recipe.batch_size,
        )

    def facts(self) -> Plain:
        """What the accountant says, of the whole training and of each snapshot."""
        told = asdict(self.account) | {"epsilon": self.account.epsilon(self.recipe.steps), "steps": self.recipe.steps}
        told |= {"max_grad_norm": self.private.max_grad_norm, "draws_per_image": self.private.draws_per_image}
        return told | {"snapshots": {str(step): self.account.epsilon(step) for step in self.recipe.snapshots}}

    def _check_network(self) -> None:
        """Refuse a network in which an image's gradient is not its own, is not all there, or of which a buffer keeps something."""
        net = self.diffusion.net.train()
        if wrong := ModuleValidator.validate(net):
            raise ConfigError("defense", "dp_sgd", f"cannot train this network: {str(wrong[0]).split('. ')[0]}; use another layer")
        g = torch.Generator().manual_seed(0)
        x, noise = torch.randn((2, 2, *self._pixels.shape[1:]), generator=g)
        t = torch.tensor([self.diffusion.T // 2, self.diffusion.T // 3])
        buffers = [b.clone() for b in net.buffers()]
        for module in net.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        try:
            norms = per_sample.clipped(net, self.diffusion.loss, (x, t, noise), self.private.max_grad_norm).norms[0]
        except per_sample.Unsupported:
            norms = torch.tensor(torch.nan)
        kept = any(not torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
        alone = torch.autograd.grad(self.diffusion.loss(x[:1], t[:1], noise[:1]).sum(), self._trained(), materialize_grads=True)
        net.train()
        expected = torch.stack([v.norm() for v in alone]).double()
        if kept or not (norms - expected).norm() <= AGREEMENT * expected.norm():
            must = "cannot train this network: images do not have gradients of their own, or not of every layer; use other layers"
            raise ConfigError("defense", "dp_sgd", must)
