"""python -m tests.gpu.bench: what training and scoring the literature's CIFAR-10 network takes on this GPU, and what of it is ours."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmia_exp import lit, per_sample
from diffmia_exp.config import build
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.evaluation import in_float32
from diffmia_exp.recipe import Recipe, TrainerOptions
from tests.bench import attack_of, gray_box, line
from tests.composing import composed
from tests.scaling import BATCH, count

STEPS, WARM = 60, 20
PIXELS = np.random.default_rng(0).integers(0, 256, (512, 3, 32, 32)).astype(np.uint8)


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = build("model", composed("dataset=cifar10", "model=standard")["model"])
    return model


def timed(f: Callable[[], Any]) -> float:
    """Seconds until the GPU has done all of it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    f()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def shipped(precision: str) -> float:
    """Seconds a step of the shipped loop, over those after the first."""
    marks: list[float] = []

    class Timed(lit.Progress):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step in (WARM, STEPS):
                torch.cuda.synchronize()
                marks.append(time.perf_counter())

    progress, lit.Progress = lit.Progress, Timed  # type: ignore[misc]
    recipe = Recipe(steps=STEPS, batch_size=BATCH, lr=2e-4, warmup_steps=5000, flip=True)
    options = TrainerOptions(accelerator="gpu", precision=precision, checkpoint_every=1000)
    try:
        with tempfile.TemporaryDirectory() as folder:
            lit.train(Path(folder), Diffusion(net().train(), linear(1000)), PIXELS, recipe, options, seed=0)
    finally:
        lit.Progress = progress  # type: ignore[misc]
    return (marks[1] - marks[0]) / (STEPS - WARM)


def bare(precision: str) -> float:
    """Seconds a step of the same arithmetic in plain PyTorch, with every draw on the GPU beforehand."""
    recipe = Recipe(steps=STEPS, batch_size=BATCH, lr=2e-4, warmup_steps=5000, flip=True)
    diffusion = Diffusion(net().train(), linear(1000)).to("cuda")
    module = lit.LitDiffusion(diffusion, PIXELS, recipe, seed=0, model_index=0).to("cuda")
    draws = [[d.cuda() for d in module.draws(step)] for step in range(STEPS)]
    parameters, average = list(diffusion.net.parameters()), list(module.ema.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0, fused=precision == "32-true")
    images = torch.from_numpy(PIXELS).cuda()

    def step(now: int) -> None:
        index, t, noise, flips = draws[now]
        x0 = images[index].float() / 127.5 - 1
        x0 = torch.where(flips[:, None, None, None], x0.flip(-1), x0)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision != "32-true"):
            loss = diffusion.loss(x0, t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - recipe.ema_decay_at(now + 1))

    for now in range(WARM):
        step(now)
    return timed(lambda: [step(now) for now in range(WARM, STEPS)]) / (STEPS - WARM)


def training() -> None:
    flops = count().both * BATCH
    for precision in ("32-true", "bf16-mixed"):
        rounds = [(shipped(precision), bare(precision)) for _ in range(2)]
        a, b = (min(r[k] for r in rounds) for k in (0, 1))
        detail = f"{a * 1e3:.1f} ms, {b * 1e3:.1f} ms a step of {BATCH}; {flops / a / 1e12:.1f} TFLOP/s"
        line(f"training loop / bare loop, {precision}", a / b, 1.05, detail)


def scoring() -> None:
    """Each gray-box attack against the bare net on the very inputs that the attack gives it, without TF32, as in an audit."""
    diffusion, n, flops = Diffusion(net().eval(), linear(1000)).to("cuda"), 64, count().forward
    x, ids = torch.from_numpy(PIXELS[:n]).cuda().double() / 127.5 - 1, torch.arange(n).cuda()
    with in_float32():
        for name, nfe, score in gray_box(diffusion, x, ids):
            calls: list[tuple[Any, ...]] = []
            recording = diffusion.net.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(inputs))
            score()
            recording.remove()

            def bare_forwards(calls: list[tuple[Any, ...]] = calls) -> None:
                with torch.inference_mode():
                    for inputs in calls:
                        diffusion.net(*inputs)

            taken = [(timed(score), timed(bare_forwards)) for _ in range(2)]
            ratio, seconds = statistics.median(a / b for a, b in taken), statistics.median(b for _, b in taken)
            detail = f"{seconds / nfe * 1e3:.0f} ms a forward of {n}; {flops * n * nfe / seconds / 1e12:.1f} TFLOP/s"
            line(f"{name}: wall / bare forwards ({nfe})", ratio, 1.05, detail)


def gradients() -> None:
    """Per-sample norms with as many weight gradients at a time as shipped, and with the CPU's few."""
    diffusion, images = Diffusion(net().eval(), linear(1000)).to("cuda"), 32
    x, ids = torch.from_numpy(PIXELS[:images]).cuda().double() / 127.5 - 1, torch.arange(images).cuda()
    many = per_sample.SLICE["cuda"]
    for name in ("gsa1", "gsa2"):
        attack = attack_of(name)

        def score(attack: Any = attack) -> None:
            attack.signal(attack.access(diffusion), x, ids)

        seconds = {}
        for entries in (many, per_sample.SLICE["cpu"]):
            per_sample.SLICE["cuda"] = entries
            score()
            seconds[entries] = min(timed(score) for _ in range(2))
        per_sample.SLICE["cuda"] = many
        few = seconds[per_sample.SLICE["cpu"]]
        line(f"{name}: slices of a GPU / of a CPU", seconds[many] / few, 1.0, f"{seconds[many] / images * 1e3:.1f} ms an image")


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n{'what':44s}   ratio      bound")
    for part in sys.argv[1:] or ["training", "scoring", "gradients"]:
        {"training": training, "scoring": scoring, "gradients": gradients}[part]()
