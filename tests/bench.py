"""make bench: ratios of speed and memory, both sides of each measured in this one run (about 18 minutes on two cores)."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffmia_exp import lit, selection
from diffmia_exp.config import build, checked
from diffmia_exp.data import digits
from diffmia_exp.diffusion import Diffusion, linear
from diffmia_exp.experiment import Experiment
from diffmia_exp.noise import derive, gaussian
from diffmia_exp.recipe import Recipe, TrainerOptions
from diffmia_exp.store import Store, sha256
from diffmia_exp.threat_models import GrayBox
from diffmia_exp.workshop import Workshop
from tests.composing import CONF, composed, names

STEPS, BATCH, ROUNDS = 100, 256, 9
GRID = ["-m", "attack=loss,trajectory,secmi,pia,pian,sima", "threat_model=gray_box", "seed=0,1"]


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = build("model", composed("model=tiny")["model"])
    return model


def line(what: str, ratio: float, bound: float, detail: str) -> bool:
    print(f"{what:44s} {ratio:7.3f}   <= {bound:.2f}  {'ok' if ratio <= bound else 'ABOVE':6s} {detail}", flush=True)
    return ratio <= bound


def training() -> bool:
    """The shipped loop and a bare one take their steps in turn, so that both meet the same disturbances."""
    pixels, recipe = digits().take(np.arange(128)), Recipe(steps=STEPS, batch_size=128, lr=2e-3)
    bare_step = bare_loop(pixels, recipe)
    shipped, bare = [], []

    class InTurn(lit.Progress):
        def on_train_batch_start(self, *_: Any) -> None:
            self.begun = getattr(self, "begun", time.perf_counter())

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            shipped.append(time.perf_counter() - self.begun)
            bare.append(timed(bare_step))
            self.begun = time.perf_counter()  # the loop's work between two batches counts as its own

    progress, lit.Progress = lit.Progress, InTurn  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory() as folder:
            lit.train(Path(folder), Diffusion(net(), linear(1000)), pixels, recipe, TrainerOptions(checkpoint_every=100), seed=0)
    finally:
        lit.Progress = progress  # type: ignore[misc]
    a, b = statistics.median(shipped[5:]), statistics.median(bare[5:])
    return line("training loop / bare loop", a / b, 1.05, f"{a * 1e3:.1f} ms, {b * 1e3:.1f} ms a step")


def bare_loop(pixels: np.ndarray, recipe: Recipe) -> Callable[[], Any]:
    """One step of the same arithmetic in plain PyTorch: draws, loss, clipping, optimiser, weight average."""
    diffusion = Diffusion(net().train(), linear(1000))
    module = lit.LitDiffusion(diffusion, pixels, recipe, seed=0, model_index=0)
    parameters, average = list(diffusion.net.parameters()), list(module.ema.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0, fused=True)
    images, steps = torch.from_numpy(pixels), iter(range(recipe.steps))

    def step() -> None:
        now = next(steps)
        index, t, noise, _ = module.draws(now)
        loss = diffusion.loss(images[index].float() / 127.5 - 1, t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.grad_clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - recipe.ema_decay_at(now + 1))

    return step


def timed(f: Callable[[], Any]) -> float:
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


def attacks() -> bool:
    """Each attack against the bare net on the very inputs that the attack gives it: how fast a forward is depends on the data."""
    diffusion = Diffusion(net().eval(), linear(1000))
    x, ids, ok = torch.from_numpy(digits().take(np.arange(BATCH))).double() / 127.5 - 1, torch.arange(BATCH), True
    for name, nfe, score in gray_box(diffusion, x, ids):
        score()
        ratio, seconds = against_twins(score, type(diffusion.net), max(10, 180 // nfe))
        ok &= line(f"{name}: wall / bare forwards ({nfe})", ratio, 1.05, f"{seconds / nfe * 1e3:.0f} ms a forward of {BATCH}")
    return ok


def gray_box(diffusion: Diffusion, x: torch.Tensor, ids: torch.Tensor) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Every gray-box attack: name, evaluations an image, and what measures these images."""
    for name in names("attack"):
        attack: Any = attack_of(name)
        if attack.access is not GrayBox or attack.nfe_once(1000):
            continue
        if (nfe := attack.nfe(1000)) > 20:  # a coarser trajectory costs as much per evaluation
            attack.stride = 50
            nfe = attack.nfe(1000)

        def score(attack: Any = attack) -> None:
            with torch.inference_mode():
                attack.signal(attack.access(diffusion), x, ids)

        yield name, nfe, score


def against_twins(f: Callable[[], Any], net: type[torch.nn.Module], rounds: int) -> tuple[float, float]:
    """Time of f / time of the net's forwards alone, and the latter in seconds, the ratio from medians over rounds.

    Each forward has a twin, the same call right before or right after it, in turn, which is no part of f: side by side they meet the
    same host, whose speed changes within seconds by more than the bound allows. f takes its own forwards and what it does beside them.
    """
    forward, own, twins, beside, bare = net.forward, [], [], [], []

    def twice(self: torch.nn.Module, *inputs: Any) -> Any:
        for seconds in (own, twins) if (len(own) + len(beside)) % 2 else (twins, own):
            started = time.perf_counter()
            output = forward(self, *inputs)
            seconds.append(time.perf_counter() - started)
        return output

    net.forward = twice
    try:
        for _ in range(rounds):
            begun = len(own)
            beside.append(timed(f) - sum(own[begun:]) - sum(twins[begun:]))
            bare.append(sum(twins[begun:]))
    finally:
        net.forward = forward
    forwards = statistics.median(bare)
    return statistics.median(a / b for a, b in zip(own, twins, strict=True)) + statistics.median(beside) / forwards, forwards


def attack_of(name: str, *overrides: str) -> Any:
    return selection.candidates(composed(f"attack={name}", *overrides)["attack"])[0].attack


def gsa() -> bool:
    """GSA's batched per-sample norms against a backward pass for each image (GSA1), and for each image and timestep (GSA2)."""
    images, few, ok = 64, 16, True  # one at a time few: so the two meet often, and the same host
    diffusion = Diffusion(net().eval(), linear(1000))
    x, ids = torch.from_numpy(digits().take(np.arange(images))).double() / 127.5 - 1, torch.arange(images)
    parameters, times = list(diffusion.net.parameters()), torch.linspace(0, 999, 10, dtype=torch.float64).round().long()

    def loop(rows: int) -> torch.Tensor:
        measured = []
        for n in range(few):
            eps = gaussian(derive(0, "score"), ids[n : n + 1].expand(10), tuple(x.shape[1:]), times)
            x0, norms = x[n : n + 1].expand(10, -1, -1, -1), []
            for part in zip(x0.split(rows), times.split(rows), eps.split(rows), strict=True):
                gradients = torch.autograd.grad(diffusion.loss(*part).mean(), parameters)
                norms.append(torch.stack([g.norm() for g in gradients]))
            measured.append(torch.stack(norms).mean(0))
        return torch.stack(measured).double()

    for name, rows, wanted in (("gsa2", 1, 10), ("gsa1", 10, 1.8)):
        attack = attack_of(name)

        def batched(attack: Any = attack) -> torch.Tensor:
            return attack.signal(attack.access(diffusion), x, ids)

        torch.testing.assert_close(batched()[:few], loop(rows), rtol=1e-4, atol=1e-9)
        ratio, seconds = paired(batched, lambda rows=rows: loop(rows), 15)
        ratio *= few / images
        detail = f"{1 / ratio:.1f} x as fast (>= {wanted}); loop {seconds / few * 1e3:.0f} ms an image"
        ok &= line(f"{name}: batched / one image at a time", ratio, 1 / wanted, detail)
    return ok


def signals() -> bool:
    """Signals of 16 shadows on 2,000 images, weights read one model after the other, against the bare forwards of the same inputs."""
    with tempfile.TemporaryDirectory() as out:
        shown = digits().take(np.arange(1797))
        np.savez(f"{out}/images.npz", images=np.concatenate([shown, shown[:203, :, :, ::-1]])[:, 0])
        data = ["dataset=arrays", f"dataset.path={out}/images.npz", "dataset.image_size=8", "dataset.channels=1", "split.pool=null"]
        once = ["split.n_models=17", "training.steps=1", "training.batch_size=8", "tracking=none"]
        experiment = Experiment(checked(composed("attack=reference", f"output_dir={out}", *data, *once)))
        experiment.load()
        workshop = Workshop(experiment)
        workshop.train_all()
        candidate, shadows = experiment.candidates[0], iter(experiment.shadows)

        def measure() -> None:
            workshop.measured(next(shadows), candidate)

        measure(), measure()
        unet = type(workshop.model(experiment.target_index)[0].net)
        rounds = len(experiment.shadows) - 2
        ratio, _ = against_twins(measure, unet, rounds)
    what = f"signals of a shadow / bare forwards ({int(experiment.measured.sum())} images)"
    return line(what, ratio, 1.05, f"median of {rounds} shadows, {candidate.attack.nfe(1000)} evaluations an image")


def variations() -> bool:
    """ReDiffuse's ten variations in one call against ten calls."""
    diffusion, attack = Diffusion(net().eval(), linear(1000)), attack_of("rediffuse")
    x, ids = torch.from_numpy(digits().take(np.arange(64))).double() / 127.5 - 1, torch.arange(64)
    access = attack.access(diffusion)

    def one_by_one() -> None:
        for draw in range(attack.n_variations):
            access.vary(x, ids, attack.strength, attack.steps, attack.seed, draw)

    with torch.inference_mode():
        ratio, seconds = paired(lambda: attack.score(access, x, ids), one_by_one, ROUNDS)
    return line("rediffuse: all variations at once / in turn", ratio, 1.05, f"{seconds:.2f} s in turn")


def paired(f: Callable[[], Any], g: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median over rounds of time of f / time of g, the two in alternating order; and the median time of g, in seconds."""
    ratios, seconds = [], []
    for n in range(rounds):
        order = (f, g) if n % 2 else (g, f)
        taken = {h: timed(h) for h in order}
        ratios.append(taken[f] / taken[g])
        seconds.append(taken[g])
    return statistics.median(ratios), statistics.median(seconds)


def run(*overrides: str) -> tuple[float, float]:
    """Wall seconds and peak memory (MiB) of a command line."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(CONF.parent / "run.py"), *overrides], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"python run.py {' '.join(overrides)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def grid() -> bool:
    with tempfile.TemporaryDirectory() as out:
        first, _ = run(*GRID, f"output_dir={out}")
        again, _ = run(*GRID, f"output_dir={out}")
        single, _ = run(f"output_dir={out}", "attack=pia")
    cell = (again - single) / 11
    return line(
        "grid repeated / grid first", again / first, 0.05, f"{first:.0f} s, {again:.1f} s; {cell:.2f} s a cell, {single:.1f} s start-up"
    )


def memory() -> bool:
    peaks = []
    with tempfile.TemporaryDirectory() as out:
        for n in (1000, 10000):
            np.savez(f"{out}/{n}.npz", images=np.random.default_rng(0).integers(0, 256, (n, 16, 16), dtype=np.uint8))
            data = ["dataset=arrays", f"dataset.path={out}/{n}.npz", "dataset.image_size=16", "dataset.channels=1", "split.pool=null"]
            peaks.append(run(*data, "training.steps=3", "tracking=none", f"output_dir={out}/{n}")[1])
        for n_models in (3, 33):
            shadows = ["attack=reference", f"split.n_models={n_models}", "training.steps=3", "tracking=none"]
            peaks.append(run(*shadows, f"output_dir={out}/shadows")[1])
    few, many, two, thirty_two = peaks
    flat = line("peak memory at 10,000 images / at 1,000", many / few, 1.10, f"{many:.0f} MiB, {few:.0f} MiB")
    return line("peak memory with 32 shadows / with 2", thirty_two / two, 1.10, f"{thirty_two:.0f} MiB, {two:.0f} MiB") and flat


def store() -> bool:
    """What the store costs beside the work, with 10,000 entries in it: finding one, and claiming, writing down and ending another."""
    with tempfile.TemporaryDirectory() as out:
        entries = Store(Path(out), "models")
        for n in range(10_000):
            entry = entries.root / entries.key({"n": n})
            entry.mkdir(parents=True)
            (entry / "spec.yaml").write_text("{}")
            (entry / "DONE").write_text(json.dumps({"sha256": {"spec.yaml": sha256(entry / "spec.yaml")}}))
        found = [timed(lambda n=n: entries.get({"n": n})) * 1e3 for n in range(0, 10_000, 50)]
        made = [timed(lambda n=n: entries.get_or_make({"n": n}, lambda _: None)) * 1e3 for n in range(10_000, 10_200)]
    ok = line("lookup among 10,000 entries, ms", statistics.median(found), 20, f"at most {max(found):.1f} ms")
    return line("claim and end of an entry, ms", statistics.median(made), 20, f"at most {max(made):.1f} ms") and ok


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n{'what':44s}   ratio      bound")
    parts = {
        "training": training,
        "attacks": attacks,
        "gsa": gsa,
        "variations": variations,
        "signals": signals,
        "memory": memory,
        "store": store,
        "grid": grid,
    }
    chosen = sys.argv[1:] or list(parts)
    results = [parts[name]() for name in chosen]  # all of them, also after one that is above its bound
    sys.exit(0 if all(results) else 1)
