"""Measuring images on a model, in batches and under a budget."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffmia_exp.attacks.base import Attack, Lab
from diffmia_exp.config import Plain
from diffmia_exp.data import Images
from diffmia_exp.diffusion import given
from diffmia_exp.errors import ConfigError, UserError, choice, flag, number, whole
from diffmia_exp.progress import Bar
from diffmia_exp.threat_models import SamplesOnly, WhiteBox

CONTROLS = ("blind", "permuted", "untrained", "held_out", "prior_bpd", "generated")
BLIND = ("classical", "network")


@dataclass(frozen=True)
class Evaluation:
    """How the audit is carried out.

    Args:
        batch_size: images scored at once.
        precision: of the network while scoring, `float32` or `float64`.
        device: `auto`, `cpu` or `cuda`.
        fprs: the FPRs at which the TPR is reported.
        drop_duplicates: leave non-members that equal a member out of the audit.
        controls: which of CONTROLS are run beside the attack.
        blind: the classifier of the `blind` control, one of BLIND.
        delta: of the privacy definition whose epsilon is bounded from below.
    """

    batch_size: int = 256
    precision: str = "float32"
    device: str = "auto"
    fprs: tuple[float, ...] = (0.1, 0.01, 0.001, 0.0001)
    drop_duplicates: bool = False
    controls: tuple[str, ...] = ()
    blind: str = "classical"
    delta: float = 1e-5

    def __post_init__(self) -> None:
        whole("batch_size", self.batch_size, least=1)
        choice("precision", self.precision, ("float32", "float64"))
        choice("device", self.device, ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device", "cuda", "no GPU is usable here; use evaluation.device=cpu")
        for fpr in self.fprs:
            number("fprs", fpr, above=0, most=1)
        flag("drop_duplicates", self.drop_duplicates)
        if not isinstance(self.controls, list | tuple):
            raise ConfigError("controls", self.controls, f"must be a list of {', '.join(CONTROLS)}, as [blind, permuted]")
        for control in self.controls:
            choice("controls", control, CONTROLS)
        choice("blind", self.blind, BLIND)
        number("delta", self.delta, least=0, most=1)

    @property
    def torch_device(self) -> str:
        """Where scoring runs."""
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device


def measure(
    attack: Attack,
    access: SamplesOnly,
    lab: Lab,
    images: Images,
    evaluation: Evaluation,
    device: torch.device,
    label: str,
    folder: Path | None = None,
) -> tuple[NDArray[np.float64], Plain]:
    """The attack's signals of all images on one model, float64 [n, F], and what they cost (`nfe_per_image`, `seconds`).

    A conditional model is asked under the images' labels, one at a time: whatever an attack stacks, its batch is of one class.
    `folder` is the store's in which they are measured, if any.
    """
    measured: list[NDArray[np.float64]] = []
    order: list[NDArray[np.intp]] = []
    started = time.monotonic()
    attack.prepare(access, lab)
    with torch.inference_mode(attack.access is not WhiteBox), in_float32():
        for at, asked_under in batches(images, evaluation.batch_size, label, folder):
            x = torch.from_numpy(images.pixels[at]).to(device, torch.float64) / 127.5 - 1
            ids = torch.from_numpy(images.sample_id[at]).to(device)
            with given(asked_under):
                measured.append(attack.signal(access, x, ids).double().cpu().numpy())
            order.append(at)
    out = np.concatenate(measured)
    if images.labels is not None:
        out = out[np.argsort(np.concatenate(order))]
    if not np.isfinite(out).all():
        bad = int((~np.isfinite(out).all(1)).sum())
        raise UserError(f"{label}: the signals of {bad} of {len(out)} images are not finite; is the model trained well?")
    return out, {"nfe_per_image": access.evaluations / len(images), "seconds": round(time.monotonic() - started, 3)}


def in_float32() -> AbstractContextManager[None]:
    """Convolutions on a GPU in all of float32's bits: TF32, the default, rounds to 10 bits."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # which would turn cuDNN off by itself


def batches(images: Images, size: int, label: str, folder: Path | None = None) -> Iterator[tuple[NDArray[np.intp], int | None]]:
    """Positions of at most `size` images, and their class (None without labels), class by class, with a progress bar."""
    classes = [None] if images.labels is None else np.unique(images.labels).tolist()
    with Bar(label, len(images), "image", folder, leave=False) as bar:
        for one in classes:
            at = np.arange(len(images)) if one is None else np.flatnonzero(images.labels == one)
            for start in range(0, len(at), size):
                yield (batch := at[start : start + size]), one
                bar.update(len(batch))


def parts(n: int, size: int, of: int) -> list[slice]:
    """n images in `of` consecutive parts, some perhaps empty, of whole batches of `size`: the batches are those of the whole."""
    batched = -(-n // size)
    edges = [min(n, size * (batched * k // of)) for k in range(of + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
