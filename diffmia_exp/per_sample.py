"""Gradients of single samples, for a whole batch in one pass: their norms for every parameter tensor, and their sum once clipped.

A layer's weight gradient is a sum of outer products of its inputs a and of the gradients g at its outputs, over positions (pixels
or tokens): dL/dW = sum_p g_p a_p^T. One forward and one backward pass of the batch give a and g of all samples; the products are
then taken for each sample apart (Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv 1510.01799; Rochette,
Manoel, Tramel, "Efficient Per-Example Gradient Computations in Convolutional Neural Networks", 2019, arXiv 1912.06015). Timesteps
of one image whose gradients are to be summed are further positions of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.linalg import vector_norm
from torch.nn import functional as F

from diffmia_exp.threat_models import BLOCK

Loss = Callable[..., Tensor]
PIXELS = 1 << 14
"""Pixels of a chunk, 256 images of 8 x 8 pixels: of smaller images more are taken at a time, as calls cost more than arithmetic there."""
SLICE = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Entries of patches and per-sample weight gradients that exist at a time, by device: on a CPU they are squared and summed while
still in its cache, on a GPU they are as many as keep it busy."""
FALLBACK_CHUNK = 8
"""Samples whose weight gradients exist at a time where layers cannot be taken apart."""


@dataclass(frozen=True)
class Gradients:
    """What one pass gives, all float64.

    Args:
        loss: [rows].
        norms: [rows / together, parameter tensors], in the order of `net.named_parameters()`.
        of_input: [rows, ..], the gradient of each row's own loss with respect to its first input; None unless asked for.
    """

    loss: Tensor
    norms: Tensor
    of_input: Tensor | None = None


@dataclass(frozen=True)
class Clipped:
    """What `clipped` gives.

    Args:
        loss: [rows].
        norms: [samples, P] before clipping, float64, for the P parameter tensors that require a gradient, in their order in the net.
        total: the clipped gradients' sum, a tensor for each of them.
    """

    loss: Tensor
    norms: Tensor
    total: list[Tensor]


class Unsupported(Exception):
    """The net cannot be taken apart into layers that are known here."""


def gradients(net: nn.Module, loss: Loss, inputs: tuple[Tensor, ...], together: int = 1, of_input: bool = False) -> Gradients:
    """L2 norms of per-sample gradients of the mean loss over `together` consecutive rows, for each parameter tensor of `net`.

    Conv2d (without groups), Linear, Embedding, GroupNorm and LayerNorm layers that are used once are taken apart; a net that has parameters
    elsewhere goes through `torch.func.vmap` as a whole: slower, the same result. The first axis of every layer's input must be the
    rows, and no layer may mix them (eval mode).

    Args:
        net: the network; its parameters are left as they are, `requires_grad` included.
        loss: maps the inputs (a chunk of their rows) to one loss per row, by way of `net`.
        inputs: tensors [rows, ..]; rows n * together to (n + 1) * together - 1 are sample n.
        together: rows per sample.
        of_input: whether the gradient with respect to `inputs[0]` is wanted too.

    The net is run on chunks of at most `PIXELS` (but never less than BLOCK rows and one sample), so that memory does not grow with
    the batch, each padded with copies of its first row to a multiple of BLOCK (see `threat_models`), so that results do not depend
    on it.
    """
    rows, multiple = len(inputs[0]), math.lcm(BLOCK, together)
    step = max(1, PIXELS // inputs[0][0, 0].numel() // multiple) * multiple
    losses, norms, at_input = [], [], []
    with _tracking(net):
        for start in range(0, rows, step):
            chunk = [v[start : start + step] for v in inputs]
            n = len(chunk[0])
            chunk = [torch.cat([v, v[:1].expand(-n % multiple, *v.shape[1:])]).detach() for v in chunk]
            try:
                loss_n, norms_n, at_input_n = _by_layer(net, loss, chunk, together, of_input)
            except Unsupported:
                loss_n, norms_n, at_input_n = _as_a_whole(net, loss, chunk, together, of_input)
            losses.append(loss_n[:n].detach().double())
            norms.append(norms_n[: n // together].double())
            if at_input_n is not None:
                at_input.append(at_input_n[:n].double())
    return Gradients(torch.cat(losses), torch.cat(norms), torch.cat(at_input) if of_input else None)


def clipped(net: nn.Module, loss: Loss, inputs: tuple[Tensor, ...], most: float, together: int = 1) -> Clipped:
    """Sum over samples of the gradients of their mean losses, each of which is scaled down to a norm of at most `most`.

        sum_i g_i min(1, C / ||g_i||_2),    g_i over all parameters that require a gradient,

    by one forward and two backward passes: the first gives the norms as in `gradients`, the second the gradient of the losses so
    weighted (Lee, Kifer, "Scaling up Differentially Private Deep Learning with Fast Per-Example Gradient Clipping", PETS 2021, arXiv
    2009.03106). No sample's gradient is ever formed as a whole.

    Args:
        net, loss, inputs, together: as in `gradients`; the rows are taken all at once.
        most: C.

    Raises:
        Unsupported: if the net has parameters in other layers than `gradients` takes apart.
    """
    is_trained = [p.requires_grad for p in net.parameters()]
    trained = [p for p in net.parameters() if p.requires_grad]
    with _tracking(net):
        losses, norms, _ = _by_layer(net, loss, list(inputs), together, of_input=False, again=True)
        norms = norms[:, is_trained]
        weights = (most / norms.norm(dim=1)).clamp(max=1).to(losses.dtype).repeat_interleave(together)
        total = torch.autograd.grad((losses * weights).sum() / together, trained, materialize_grads=True)
    return Clipped(losses.detach(), norms, list(total))


@contextmanager
def _tracking(net: nn.Module) -> Iterator[None]:
    """Parameters are part of the graph, which then reaches every layer; their own gradients are asked of no one."""
    before = [(p, p.requires_grad) for p in net.parameters()]
    try:
        with torch.enable_grad():
            for p, _ in before:
                p.requires_grad_(p.is_floating_point())
            yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def _by_layer(
    net: nn.Module, loss: Loss, inputs: list[Tensor], together: int, of_input: bool, again: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss [rows], norms [samples, P], gradient at the first input) by hooks on the layers; `again`: the loss's graph is kept."""
    layers = {module: name for name, module in net.named_modules() if any(True for _ in module.parameters(recurse=False))}
    names = [name for name, _ in net.named_parameters()]
    if any(not _known(module) for module in layers) or len(names) != sum(len(list(m.parameters(recurse=False))) for m in layers):
        raise Unsupported
    seen: dict[nn.Module, tuple[Tensor, GradientEdge]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if module in seen or len(args) != 1 or len(args[0]) != len(inputs[0]):
            raise Unsupported
        seen[module] = args[0].detach(), get_gradient_edge(output)

    hooks = [module.register_forward_hook(record) for module in layers]
    try:
        x = inputs[0].requires_grad_(of_input)
        losses = loss(x, *inputs[1:])
    finally:
        for hook in hooks:
            hook.remove()
    unseen = [p for module in layers if module not in seen for p in module.parameters(recurse=False)]
    wanted: list[Any] = [edge for _, edge in seen.values()] + [x] * of_input + unseen
    got = list(torch.autograd.grad(losses.sum() / together, wanted, allow_unused=True, retain_graph=again))
    if any(g is not None for g in got[len(got) - len(unseen) :]):
        raise Unsupported  # a layer's weight is used without the layer being called
    samples = len(losses) // together
    norms = {name: losses.new_zeros(samples) for name in names}
    with torch.no_grad():
        for (module, (a, _)), g in zip(seen.items(), got, strict=False):
            if g is not None:
                prefix = f"{layers[module]}." if layers[module] else ""
                weight, bias = _norms(module, a, g, samples)
                norms |= {prefix + name: v for name, v in (("weight", weight), ("bias", bias)) if prefix + name in norms}
    at_x = got[len(seen)] * together if of_input else None
    return losses, torch.stack([norms[name].double() for name in names], 1), at_x


def _known(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if type(module) is nn.Embedding:
        return module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return type(module) in (nn.Linear, nn.GroupNorm, nn.LayerNorm)


def _norms(module: nn.Module, a: Tensor, g: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Norms [samples] of a layer's weight and bias gradients (an embedding has none), from its input and the gradient at its output."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    if isinstance(module, nn.Embedding):  # a row's gradient is the sum of those at its positions
        a, g = a.reshape(samples, -1), g.to(dtype).reshape(samples, -1, g.shape[-1])
        same = a[:, :, None] == a[:, None, :]
        norm = (torch.bmm(g, g.transpose(1, 2)) * same).flatten(1).sum(1).clamp(min=0).sqrt()
        return norm, torch.zeros_like(norm)
    a, g = a.to(dtype), g.to(dtype)
    if isinstance(module, nn.Conv2d):
        patches = _patches(module, a, *g.shape[2:])
        g = g.flatten(2).unflatten(0, (samples, -1)).transpose(1, 2).flatten(2)
        return _norm_of_products(patches, g), vector_norm(_over_positions(g), dim=1)
    if isinstance(module, nn.GroupNorm):
        a = F.group_norm(a, module.num_groups, eps=module.eps)
        return _norm(_over_positions((a * g).flatten(2)), samples), _norm(_over_positions(g.flatten(2)), samples)
    if isinstance(module, nn.LayerNorm):
        a = F.layer_norm(a, module.normalized_shape, eps=module.eps)
        shape = (samples, -1, math.prod(module.normalized_shape))
        return _norm((a * g).reshape(shape).sum(1), samples), _norm(g.reshape(shape).sum(1), samples)
    a, g = a.reshape(samples, -1, a.shape[-1]), g.reshape(samples, -1, g.shape[-1])
    return _norm_of_products(a, g.transpose(1, 2)), vector_norm(g.sum(1), dim=1)


def _over_positions(v: Tensor) -> Tensor:
    """The sum over the last axis, as a product with ones: of few positions that takes half the time of `sum`."""
    return v @ v.new_ones(v.shape[-1])


def _norm(per_row: Tensor, samples: int) -> Tensor:
    return vector_norm(per_row.reshape(samples, -1, per_row.shape[-1]).sum(1), dim=1)


def _patches(conv: nn.Conv2d, a: Tensor, height: int, width: int) -> Tensor:
    """A view [rows, H', W', kernel height, kernel width, C] of the padded input, that takes no memory of its own."""
    (dy, dx), (sy, sx), (kh, kw) = conv.dilation, conv.stride, conv.kernel_size
    assert not isinstance(conv.padding, str)  # see `_known`
    top, left = conv.padding
    rows, channels, h, w = a.shape
    padded = a.new_zeros(rows, h + 2 * top, w + 2 * left, channels)  # channels last: neighbouring pixels' patches are runs of memory
    padded[:, top : top + h, left : left + w] = a.permute(0, 2, 3, 1)
    n, y, x, c = padded.stride()
    return padded.as_strided((rows, height, width, kh, kw, channels), (n, y * sy, x * sx, y * dy, x * dx, c))


def _norm_of_products(a: Tensor, g: Tensor) -> Tensor:
    """||sum_p g_p a_p^T||_F [N] of g [N, O, P] and of a, which is [N, P, I] once reshaped.

    Where positions are few, by sum_pq (g_p . g_q) (a_p . a_q), which forms no weight gradient.
    """
    samples, outputs, positions = g.shape
    rows = len(a) // samples
    inputs = a.numel() // (samples * positions)
    if positions == 1:
        return vector_norm(a.reshape(samples, -1), dim=1) * vector_norm(g[:, :, 0], dim=1)
    cheap = positions * (outputs + inputs) < outputs * inputs // 2
    step = max(1, SLICE["cpu" if a.is_cpu else "cuda"] // (positions * inputs + (positions**2 if cheap else outputs * inputs)))
    norms = []
    for a_n, g_n in zip(a.split(step * rows), g.split(step), strict=True):
        a_n = a_n.reshape(len(g_n), positions, inputs)
        if cheap:
            products = torch.bmm(g_n.transpose(1, 2), g_n) * torch.bmm(a_n, a_n.transpose(1, 2))
            norms.append(products.flatten(1).sum(1).clamp(min=0).sqrt())
        else:
            norms.append(vector_norm(torch.bmm(g_n, a_n).flatten(1), dim=1))
    return torch.cat(norms)


class _Losses(nn.Module):
    """The loss as a module that holds the net, so that `functional_call` can replace the net's parameters."""

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, *inputs: Tensor) -> Tensor:
        """As `loss`."""
        return self.loss(*inputs)


def _as_a_whole(net: nn.Module, loss: Loss, inputs: list[Tensor], together: int, of_input: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same by `torch.func`: weight gradients of FALLBACK_CHUNK samples at a time."""
    module = _Losses(net, loss)
    parameters = {f"net.{name}": p.detach() for name, p in net.named_parameters()}

    def total(parameters: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.func.functional_call(module, parameters, inputs)
        return losses.sum() / together, losses

    def measure(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (of_parameters, at_x), losses = torch.func.grad(total, argnums=(0, 1), has_aux=True)(parameters, *inputs)
        return losses, torch.stack([g.flatten().norm() for g in of_parameters.values()]), at_x * together

    samples = [v.detach().reshape(-1, together, *v.shape[1:]) for v in inputs]
    losses, norms, at_x = torch.func.vmap(measure, chunk_size=FALLBACK_CHUNK)(*samples)
    return losses.flatten(), norms, at_x.flatten(0, 1) if of_input else None
