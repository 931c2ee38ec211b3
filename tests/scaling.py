"""python -m tests.scaling: the figures of docs/scaling.md, from counts made here, rates measured on a GPU, and one assumption."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffmia_exp import selection
from diffmia_exp.config import build
from tests.composing import composed, names

STEPS, BATCH, IMAGES, T = 800_000, 128, 50_000, 1000
"""The standard recipe (conf/training/standard.yaml) on all of CIFAR-10's training images as the pool."""

TRAINING, SCORING = 65.6e12, 28e12
"""FLOP a second on one H100, measured by tests/gpu/bench.py: training in `32-true`, its convolutions in TF32, and scoring without TF32."""

STARTUP = 60.0
"""Assumed: seconds from a task's start to its first step, on a cluster's file system."""

PREVIEW = 64 * 20
"""Evaluations for the generated images of a run."""


@dataclass(frozen=True)
class Counted:
    """Of the standard network: parameters, FLOP of a forward pass of an image, and of forward and backward together."""

    parameters: int
    forward: float
    both: float


def count() -> Counted:
    """Count, on one image."""
    net: torch.nn.Module = build("model", composed("dataset=cifar10", "model=standard")["model"])
    x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net.eval()(x, t)
    with FlopCounterMode(display=False) as both:
        net.train()(x, t).sample.sum().backward()
    return Counted(sum(p.numel() for p in net.parameters()), forward.get_total_flops(), both.get_total_flops())


def training_hours(c: Counted) -> float:
    """GPU hours of one model: steps x batch x FLOP / rate."""
    return STEPS * BATCH * c.both / TRAINING / 3600


def scoring_hours(c: Counted, evaluations: float) -> float:
    """GPU hours of so many evaluations of each image on one model."""
    return IMAGES * evaluations * c.forward / SCORING / 3600


def evaluations() -> dict[str, float]:
    """Evaluations an image by attack, what is spent once spread over the images."""
    found: dict[str, float] = {}
    for name in names("attack"):
        attack: Any = selection.candidates(composed(f"attack={name}")["attack"])[0].attack
        found[name] = attack.nfe(T) + attack.nfe_once(T) / IMAGES
    return found


def main() -> None:
    """Print all tables."""
    c, each = count(), evaluations()
    entry, checkpoint = 2 * 4 * c.parameters, 4 * 4 * c.parameters
    print(f"parameters {c.parameters:,}; forward {c.forward / 1e9:.2f} GFLOP, with backward {c.both / 1e9:.2f} GFLOP an image")
    print(f"a model in the store {entry / 1e6:.0f} MB; its checkpoint while it trains {checkpoint / 1e6:.0f} MB")
    hours = training_hours(c)
    print(f"GPU hours of a model: {hours:.1f}")
    print("\n| shadows | models | GPU hours | storage | LiRA's signals |\n|---|---|---|---|---|")
    for shadows in (16, 64, 256):
        models = shadows + 1
        lira = (shadows + 1) * scoring_hours(c, each["lira"])
        print(f"| {shadows} | {models} | {models * hours:,.0f} | {models * entry / 1e9:.1f} GB | {lira:.1f} GPU h |")
    gpus = (1, 8, 17, 65, 257)
    print(f"\n| shadows | {' | '.join(f'{g} GPU' for g in gpus)} |\n|---|{'---|' * len(gpus)}")
    for shadows in (16, 64, 256):
        walls = [math.ceil((shadows + 1) / g) * (hours + STARTUP / 3600) / 24 for g in gpus]
        print(f"| {shadows} | {' | '.join(f'{w:,.1f} d' for w in walls)} |")
    chosen = [name for name in each if name not in ("likelihood", "discriminator", "knn", "monte_carlo", "surrogate")]
    mean = sum(each[name] for name in chosen) / len(chosen)
    models = 50
    scoring = 50 * len(chosen) * scoring_hours(c, mean)
    print(f"\n1,000 cells: {len(chosen)} attacks ({mean:.1f} evaluations an image on average) x 50 targets")
    print(f"models {models}: {models * hours:,.0f} GPU hours, {models * entry / 1e9:.0f} GB")
    print(f"measuring, each attack once on each of 50 models and the untrained one: {scoring * 51 / 50:.0f} GPU hours")
    print(f"generated images of 50 targets: {50 * PREVIEW * c.forward / SCORING / 3600:.3f} GPU hours")
    print(f"signals, 8 bytes x 10 features: {50 * len(chosen) * IMAGES * 80 / 1e9:.0f} GB; scores {1000 * IMAGES * 17 / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
