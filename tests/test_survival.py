"""What may happen to a run at any moment: it is killed, told to stop, loses its disk; begun again it ends as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffmia_exp import claims, lit
from diffmia_exp.pipeline import run
from diffmia_exp.recipe import TrainerOptions
from diffmia_exp.scores import ScoreTable
from tests import command
from tests.composing import composed
from tests.test_pipeline import quick
from tests.test_training import RECIPE, train, weights

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["diffmia_exp.pipeline", "diffmia_exp.lit", "diffmia_exp.figures", "diffusers", "tests.test_survival"])


def _start(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


CELL = ["debug=quick", "evaluation=bare", "split.pool=32", "attack=loss", "training.steps=8", "split.n_models=2", "attack.select=shadow"]


def _cell(out: str) -> None:
    torch.set_num_threads(1)
    run(composed(*CELL, f"output_dir={out}"))


def scores(out: Path) -> tuple[bytes, ...]:
    """The bits of all weights, samples, signals and scores."""
    kinds = ("models/*/*.safetensors", "samples/*/*.npz", "signals/*/*.npy", "scores/*/*.parquet", "runs/*/scores.parquet")
    return tuple(file.read_bytes() for kind in kinds for file in sorted(out.glob(kind)))


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.rglob("*") if path.name.endswith((".partial", ".claim", ".tmp", ".ckpt"))]


def test_kills_at_thirty_random_moments_change_no_score(tmp_path: Path) -> None:
    """Over training, sampling, scoring and writing, of one run after the other, each killed until it has come to its end."""
    for name in ("first", "undisturbed"):  # the first one's time has the start of the fork server in it
        begun = time.monotonic()
        _start(_cell, tmp_path / name).join()
        whole = time.monotonic() - begun  # of a run here and now, so that the moments lie within one on a slow machine too
    expected = scores(tmp_path / "undisturbed")
    assert len(expected) >= 7
    rng, kills, at = random.Random(0), 0, set()
    stages = {
        "models": "training",
        "signals": "scoring",
        "scores": "scoring",
        "samples": "sampling",
        "controls": "writing",
        "runs": "writing",
    }
    trial = 0
    while kills < 30:
        out = tmp_path / str(trial)
        trial += 1
        while kills < 30:
            victim = _start(_cell, out)
            victim.join(rng.uniform(0.02, 0.6) * whole)
            if victim.exitcode is not None:
                break
            busy = {claim.parent.name for claim in out.glob("*/*.claim")} | {claim.parent.name for claim in out.glob("*/.*.claim")}
            victim.kill()
            victim.join()
            kills += 1
            at |= {stages[kind] for kind in busy}
        heir = _start(_cell, out)
        heir.join()
        assert heir.exitcode == 0
        assert scores(out) == expected
        assert leftovers(out) == []
    assert at >= {"training", "scoring", "writing"}, "the kills must fall everywhere for this test to mean something"


def _train_slowly(folder: Path, told: Any) -> None:
    torch.set_num_threads(1)

    class Slow(lit.Progress):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            told.set()
            time.sleep(0.05)

    lit.Progress = Slow  # type: ignore[misc]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background processes ignore
    if (signum := int(folder.name)) == signal.SIGUSR2:  # as submitit does: its handler ends the process in its own way
        signal.signal(signal.SIGUSR2, lambda *_: os._exit(3))
    if signum == signal.SIGTERM:  # as submitit does: it lets SIGTERM pass
        signal.signal(signal.SIGTERM, lambda *_: (folder / "passed").touch())
    never = TrainerOptions(accelerator="cpu", checkpoint_every=10**6)
    train(folder, never)


@pytest.mark.parametrize(
    ("signum", "ends"), [(signal.SIGUSR1, -signal.SIGUSR1), (signal.SIGUSR2, 3), (signal.SIGTERM, 0), (signal.SIGINT, 1)]
)
def test_a_signal_is_answered_with_a_checkpoint_and_handed_on(tmp_path: Path, signum: int, ends: int) -> None:
    folder, told = tmp_path / str(int(signum)), _context.Event()
    process = _start(_train_slowly, folder, told)
    assert told.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == ends
    if signum == signal.SIGTERM:
        assert (folder / "passed").exists(), "the handler that was there before decides, and training goes on"
    else:
        assert (folder / "last.ckpt").exists()
        train(folder)
    assert json.loads((folder / "training.json").read_text())["resumed"] == (signum != signal.SIGTERM)
    undisturbed = train(tmp_path / "undisturbed")
    assert weights(folder) == weights(undisturbed)


def _train_on_two(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    recipe = dataclasses.replace(RECIPE, steps=20_000, snapshots=[2])
    train(folder, TrainerOptions(accelerator="cpu", devices=2, checkpoint_every=10**6), recipe)


def test_processes_that_train_one_model_end_together_and_leave_a_checkpoint(tmp_path: Path) -> None:
    process = _start(_train_on_two, tmp_path)
    while not (tmp_path / "step0000002-ema.safetensors").exists():
        assert process.is_alive()
        time.sleep(0.05)
    assert process.pid is not None
    children = [int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert (tmp_path / "last.ckpt").exists()
    assert [pid for pid in children if claims._born(pid) is not None and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()] == []


def test_a_checkpoint_with_a_flipped_bit_is_not_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Killed(BaseException):
        pass

    class Once(lit.Progress):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 20:
                raise Killed

    progress, lit.Progress = lit.Progress, Once  # type: ignore[misc]
    try:
        with pytest.raises(Killed):
            train(tmp_path)
    finally:
        lit.Progress = progress  # type: ignore[misc]
    checkpoint = tmp_path / "last.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    train(tmp_path)
    assert "the checkpoint is damaged; training begins anew" in caplog.text
    assert weights(tmp_path) == weights(train(tmp_path / "undisturbed"))


@pytest.mark.parametrize("kind", ["samples", "signals", "scores", "controls"])
def test_a_flipped_byte_anywhere_is_noticed_and_made_good(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = quick(tmp_path)
    assert first.folder is not None
    expected = scores(tmp_path)
    (entry,) = (tmp_path / kind).iterdir()
    file = max((f for f in entry.iterdir() if f.suffix in (".npz", ".npy", ".parquet")), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    if kind == "signals":  # which nobody reads while there are scores
        shutil.rmtree(tmp_path / "scores")
    (first.folder / "scores.parquet").write_bytes(b"")  # so that the run is written anew, from the store
    again = quick(tmp_path)
    assert f"{entry}: {file.name} is missing, truncated or altered" in caplog.text
    assert entry.with_name(f"{entry.name}.damaged-1").is_dir()
    assert scores(tmp_path) != ()
    assert again["scores_sha256"] == first["scores_sha256"]
    assert [b for b in scores(tmp_path) if b not in expected] == [bytes(content)] * (kind != "controls"), "set aside, not deleted"


def test_changed_data_make_another_model(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    file = tmp_path / "images.npz"
    data = ["dataset=arrays", f"dataset.path={file}", "dataset.image_size=8", "dataset.channels=1"]
    np.savez(file, images=images)
    before = quick(tmp_path / "out", *data)
    images[:, 4, 4] ^= 1
    np.savez(file, images=images)
    from diffmia_exp import experiment

    experiment._load.cache_clear()  # as in another process
    after = quick(tmp_path / "out", *data)
    assert not after.cached
    assert after["train_key"] != before["train_key"]
    assert after["run_key"] != before["run_key"]


def test_a_file_system_that_is_lost_and_comes_back(tmp_path: Path) -> None:
    out, away = tmp_path / "out", tmp_path / "away"
    line = ["debug=quick", "evaluation=bare", "split.pool=32", "stage=train", "training.steps=300", "trainer.checkpoint_every=5"]
    line += [f"output_dir={out}"]
    victim = command.start(*line, err=tmp_path / "err")
    while not list(out.glob("models/*.partial/last.ckpt")):
        assert victim.is_alive()
        time.sleep(0.01)
    os.rename(out, away)
    victim.join(60)
    assert victim.exitcode == 1
    told = (tmp_path / "err").read_text().splitlines()[-1]
    why = "the file system fails (the folder has vanished)"
    assert told == f"error: output_dir={out}: {why}; once it is back, run the same command again, it resumes"
    assert not out.exists()
    os.rename(away, out)
    done = command.run(*line)
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint" in done.stderr
    assert leftovers(out) == []


@pytest.mark.parametrize("attack", ["pia", "knn"])
def test_parts_measured_apart_give_the_same_scores(attack: str, tmp_path: Path) -> None:
    """Each image once; parts of whole batches, so that not a bit differs. Costs are those of one process too."""
    given = [f"attack={attack}", "evaluation.batch_size=5", "split.pool=48"]
    given += ["threat_model=samples_only", "attack.n_samples=32", "attack.steps=4"] if attack == "knn" else []
    whole = quick(tmp_path / "whole", *given)
    quick(tmp_path / "parts", *given, "stage=train")
    for part in ("2/3", "3/3", "1/3"):  # in any order
        assert quick(tmp_path / "parts", *given, "stage=attack", f"part={part}")["status"] == "measured"
    signals = [np.load(file) for file in (tmp_path / "parts").glob("signals/*/signals.npy")]
    assert sorted(map(len, signals)) == [15, 15, 18, 48], "three parts, and the whole put together"
    joined = quick(tmp_path / "parts", *given, "stage=attack")
    assert joined["scores_sha256"] == whole["scores_sha256"]
    assert joined["nfe_per_image"] == pytest.approx(whole["nfe_per_image"])
    assert joined.folder is not None
    table = ScoreTable.load(joined.folder / "scores.parquet")
    assert len(np.unique(table.sample_id)) == len(table.sample_id) == 48
