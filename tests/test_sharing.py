"""One store, many processes: of one user or two, on machines whose clocks differ, a thousand trainings under failures."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffmia_exp import claims
from diffmia_exp.store import Store

fork = multiprocessing.get_context("fork")
NOBODY = 65534


def in_another(target: Callable[..., object], *arguments: object, user: int | None = None) -> str:
    """What `target` returns, or the error it raises, in a process of its own; as another user where this one is root."""
    receiver, sender = fork.Pipe(duplex=False)

    def body() -> None:
        if user is not None and os.getuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        try:
            sender.send(str(target(*arguments)))
        except BaseException as e:
            sender.send(f"{type(e).__name__}: {e}")

    process = fork.Process(target=body)
    process.start()
    if not receiver.poll(30):
        process.kill()
    answer = receiver.recv() if receiver.poll() else "nothing: it waits for ever"
    process.join()
    return str(answer)


def _eight_at_once(root: Path, barrier: Any, number: int) -> None:
    claims.POLL = 0.01
    logging.basicConfig(filename=root / f"log-{number}", level=logging.INFO, force=True)

    def make(folder: Path) -> None:
        with open(root / "made", "a") as f:
            f.write(f"{folder.name}\n")
        time.sleep(0.03)
        (folder / "weights").write_text(f"{os.getpid()}")

    for turn in range(20):
        barrier.wait(60)
        Store(root, "models").get_or_make({"turn": turn}, make)


def test_eight_processes_ask_twenty_times_and_each_model_is_made_once(tmp_path: Path) -> None:
    barrier = fork.Barrier(8)
    processes = [fork.Process(target=_eight_at_once, args=(tmp_path, barrier, n)) for n in range(8)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    assert [p.exitcode for p in processes] == [0] * 8
    made = Counter((tmp_path / "made").read_text().split())
    assert len(made) == 20
    assert set(made.values()) == {1}
    waiting = sum(log.read_text().count(" is making") for log in tmp_path.glob("log-*"))
    assert waiting >= 100, "those who wait say for whom"
    assert len(list((tmp_path / "models").iterdir())) == 20


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may reach and write to, in which nobody may remove what another made."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def _write(folder: Path) -> None:
    (folder / "weights").write_text("w")


def test_another_users_results_are_used_and_another_users_work_is_waited_for(shared: Path) -> None:
    s = Store(shared, "models")

    def slowly(folder: Path) -> None:
        time.sleep(1.5)
        _write(folder)

    def ask() -> Path:
        while not list((shared / "models").glob("*.claim")):
            time.sleep(0.01)
        return s.get_or_make({"seed": 0}, lambda folder: pytest.fail("made twice"))

    s.root.mkdir()
    s.root.chmod(0o1777)
    asking = fork.Process(target=lambda: (shared / "answer").write_text(in_another(ask, user=NOBODY)))
    asking.start()
    entry = s.get_or_make({"seed": 0}, slowly)
    asking.join()
    assert (shared / "answer").read_text() == str(entry)


def test_a_folder_that_another_user_keeps_for_himself_is_told(shared: Path) -> None:
    s = Store(shared, "models")
    s.get_or_make({"seed": 0}, _write)
    s.root.chmod(0o555)
    assert in_another(s.get, {"seed": 0}, user=NOBODY).endswith(s.key({"seed": 0})), "reading is possible"
    told = in_another(s.get_or_make, {"seed": 1}, _write, user=NOBODY)
    assert told == f"StoreError: {s.root}: belongs to {s.root.owner()} and may not be written to; {claims.SHARING}"
    assert [path.name for path in s.root.iterdir()] == [s.key({"seed": 0})]


def test_what_another_user_left_is_neither_broken_nor_waited_for(shared: Path) -> None:
    """A claim whose owner is gone, in a folder where only its user may remove it; or a begun entry that only its user may go on with."""
    s = Store(shared, "models")
    s.root.mkdir()
    s.root.chmod(0o1777)
    claim, partial = (s.root / f"{s.key({'seed': 0})}.{kind}" for kind in ("claim", "partial"))

    def die() -> None:
        claims._take(claim, "token")

    in_another(die)
    if os.getuid():
        s.root.chmod(0o555)
    told = in_another(s.get_or_make, {"seed": 0}, _write, user=NOBODY)
    assert told.startswith(f"StoreError: {s.root if os.getuid() else claim}: ")
    assert "may not remove it; ask for it to be deleted: rm -r" in told or "may not be written to" in told
    assert claim.is_dir()
    s.root.chmod(0o1777)
    shutil.rmtree(claim)
    partial.mkdir(mode=0o555)
    told = in_another(s.get_or_make, {"seed": 0}, _write, user=NOBODY)
    assert "was begun by another user and may not be written to; " in told
    assert not list(s.root.glob("*.claim"))


def test_an_unreadable_entry_is_not_taken_for_a_damaged_one(shared: Path) -> None:
    s = Store(shared, "models")
    entry = s.get_or_make({"seed": 0}, _write)
    (entry / "weights").chmod(0)
    told = in_another(s.get_or_make, {"seed": 0}, _write, user=NOBODY if os.getuid() == 0 else None)
    assert told == f"StoreError: {entry}/weights: cannot be read (Permission denied); {claims.SHARING}"
    assert entry.is_dir()


@pytest.mark.parametrize("skew", [-86400.0, 86400.0])
def test_clocks_of_different_machines_need_not_agree(skew: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT", 0.2)
    monkeypatch.setattr(claims, "STALE", 1.0)
    claim = tmp_path / "x.claim"

    def elsewhere() -> bool:
        claims._machine = lambda: "elsewhere"  # type: ignore[assignment]
        right = time.time
        time.time = lambda: right() + skew  # type: ignore[assignment]
        with claims.claimed(claim) as held:
            return held is not None

    with claims.claimed(claim) as held:
        assert held is not None
        time.sleep(1.2)
        assert in_another(elsewhere) == "False", "it beats"
    assert in_another(elsewhere) == "True"
    assert claims._take(claim, "dead")
    time.sleep(1.2)
    assert in_another(elsewhere) == "True", "it does not"


MODELS = 1000


def _some_tasks(root: Path, tasks: list[int], seed: int) -> None:
    """Tasks of an array, one after the other; now and then a training fails, and with it the process."""
    rng = random.Random(seed)
    claims.POLL = 0.01
    logging.disable(logging.CRITICAL)

    def make(folder: Path) -> None:
        inside = root / "inside" / folder.name
        if inside.exists() and claims._born(int(inside.read_text() or 0)) is not None:
            (root / "duplicates" / folder.name).touch()
        inside.write_text(str(os.getpid()))
        for part in range(3):
            (folder / f"part-{part}").write_text(f"{folder.name}-{part}")
            if rng.random() < 0.005:
                inside.unlink()
                raise SystemExit(1)
        with open(root / "made", "a") as f:
            f.write(f"{folder.name}\n")
        inside.unlink()

    for task in tasks:
        Store(root, "models").get_or_make({"task": task % MODELS}, make)


def test_a_thousand_trainings_under_failures_none_twice_none_lost(tmp_path: Path) -> None:
    """Two tasks want each of 1,000 models, on eight nodes; nodes are killed and trainings fail all the while, and are queued again."""
    for folder in ("inside", "duplicates"):
        (tmp_path / folder).mkdir()
    rng = random.Random(0)
    order = rng.sample(range(2 * MODELS), 2 * MODELS)
    queue = [order[n : n + 20] for n in range(0, len(order), 20)]
    running: dict[Any, tuple[Any, list[int]]] = {}
    started = failed = killed = 0
    while queue or running:
        while queue and len(running) < 8:
            tasks = queue.pop(0)
            process = fork.Process(target=_some_tasks, args=(tmp_path, tasks, started))
            process.start()
            started += 1
            running[process.sentinel] = process, tasks
        for sentinel in multiprocessing.connection.wait(list(running), timeout=0.02):
            process, tasks = running.pop(sentinel)
            process.join()
            if process.exitcode:
                queue.append(tasks)
                killed += process.exitcode == -signal.SIGKILL
                failed += process.exitcode == 1
            if running and killed < 60 and rng.random() < 0.5:  # as tasks end, not as time goes by: a fast machine is no safer
                rng.choice(list(running.values()))[0].kill()
    assert killed >= 20
    assert failed >= 5
    assert list((tmp_path / "duplicates").iterdir()) == [], "two processes made the same model at once"
    s = Store(tmp_path, "models")
    entries = [s.get({"task": n}) for n in range(MODELS)]
    assert all(entries), "lost"
    # A process may die before it has signed what it makes: the next one removes that, once it is old enough to be nobody's.
    left = set(s.root.iterdir()) - set(entries)
    assert all(".claim." in path.name and path.suffix == ".tmp" for path in left), left
    assert len(left) <= killed
    for path in left:
        os.utime(path, (0, 0))
    with claims.claimed(s.root / "another.claim"):
        pass
    assert set(s.root.iterdir()) == set(entries), "something was left behind"
    again = sum(Counter((tmp_path / "made").read_text().split()).values()) - MODELS
    assert again <= killed, "made again only where the maker was killed before it was published"
