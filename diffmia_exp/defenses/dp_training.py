"""The training of `dp_sgd`: Poisson batches, and a step with Opacus's per-image gradients, clipping and noise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from diffmia_exp.config import Plain
from diffmia_exp.defenses.dp_sgd import DPSGD
from diffmia_exp.errors import ConfigError
from diffmia_exp.lit import LitDiffusion
from diffmia_exp.noise import derive

AGREEMENT = 1e-3
"""How far the gradient of an image may depend on the batch it is in, relative to its norm: rounding, and no more."""


class PerImage(GradSampleHooks):
    """Opacus's hooks, which leave the gradients of single images in `grad_sample`."""

    def capture_activations_hook(self, module: nn.Module, forward_input: Sequence[Tensor], output: Tensor) -> None:
        """Opacus 1.6.0 takes patches of a convolution's input as if it were contiguous; behind an attention layer it is not."""
        super().capture_activations_hook(module, [v.contiguous() for v in forward_input], output)


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
        index, t, noise, flips = (d.to(self.device) for d in self.draws(step))
        x0 = self._pixels[index].float() / 127.5 - 1
        if self.recipe.flip:
            x0 = torch.where(flips[:, None, None, None], x0.flip(-1), x0)
        rows = max(1, self.private.physical_batch // K) * K
        total = torch.zeros((), device=self.device)
        slices = [slice(at, at + rows) for at in range(0, len(index), rows)] or [slice(0, 0)]
        for at in slices:
            loss = self.loss(x0[at], t[at], noise[at], index[at]).sum() if len(index) else total
            self._per_image(loss, len(index[at]) // K)
            total += loss.detach()
            if at is not slices[-1]:  # clip and add up only
                optimizer.signal_skip_step(do_skip=True)
                optimizer.step()
                optimizer.zero_grad()
        optimizer.signal_skip_step(do_skip=False)
        outer.step()
        optimizer.zero_grad(set_to_none=True)
        self.average(step + 1)
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return total / max(1, len(index))

    def _per_image(self, loss: Tensor, images: int) -> None:
        """Leave in `grad_sample` [images, ..] the gradient of each image's mean loss, given the sum over all rows."""
        if images:
            _backward(loss)
        for p in self._trained():
            if not images:
                p.grad_sample = p.new_zeros(0, *p.shape)
            elif images < len(p.grad_sample):
                p.grad_sample = p.grad_sample.unflatten(0, (images, -1)).mean(1)

    def _trained(self) -> list[Any]:
        return [p for p in self.diffusion.net.parameters() if p.requires_grad]

    def _derived(self, step: int, use: int) -> int:
        return derive(self.seed, "private", self.model_index, step, use)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._hooks = PerImage(self.diffusion.net, loss_reduction="sum", strict=False)

    def on_fit_end(self) -> None:
        self._hooks.cleanup()

    def optimizer(self) -> DPOptimizer:
        """The recipe's, which sees clipped and noised gradients alone."""
        return DPOptimizer(
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
        parameters = self._trained()
        buffers = [b.clone() for b in net.buffers()]
        hooks = PerImage(net, loss_reduction="sum", strict=False)
        for module in net.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        try:
            _backward(self.diffusion.loss(x, t, noise).sum())
            found = [None if p.grad_sample is None else p.grad_sample[0] for p in parameters]
        finally:
            hooks.cleanup()
            net.zero_grad()
        kept = any(not torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
        alone = torch.autograd.grad(self.diffusion.loss(x[:1], t[:1], noise[:1]).sum(), parameters, allow_unused=True)
        net.train()
        apart = [b if a is None else a - (0 if b is None else b) for a, b in zip(found, alone, strict=True)]
        off = torch.stack([v.norm() for v in apart if v is not None]).norm()
        if kept or any(v is None for v in found) or not off <= AGREEMENT * torch.stack([v.norm() for v in alone if v is not None]).norm():
            must = "cannot train this network: images do not have gradients of their own, or not of every layer; use other layers"
            raise ConfigError("defense", "dp_sgd", must)


def _backward(loss: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook")  # of layers that see images or timesteps, which need no gradient
        loss.backward()
