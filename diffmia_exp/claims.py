"""Claims: one process does a thing, the others see who, and nobody waits for the dead.

A claim is a folder, put in place by a rename and so never seen without its `owner.json`, whose time of change is the owner's
heartbeat. It also holds `progress.json`, for `diffmia_exp.status`.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffmia_exp.errors import UserError

log = logging.getLogger(__name__)

HEARTBEAT = 5.0
"""Seconds between two signs of life of a claim's owner."""

STALE = 60.0
"""Seconds without a sign of life after which a claim on another machine is broken. On the same machine a dead owner is seen at once."""

POLL = 1.0
"""Seconds between two looks at a claim that another process holds."""


_swept: set[Path] = set()


class StoreError(UserError):
    """A place in the output folder that must not or may not be used."""


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is either absent (or as it was) or whole, even after a power cut."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def claimed(claim: Path) -> Iterator[Callable[[], None] | None]:
    """Try to hold `claim`; yields None if another process does, else a function that raises if the claim was lost meanwhile.

    Raises:
        StoreError: if the claim is another user's and may not be read, or not be removed though its owner is gone.
    """
    token = uuid.uuid4().hex
    _sweep(claim.parent)
    if not _take(claim, token):
        found = owner(claim)
        if found is None or not is_stale(claim, found):
            yield None
            return
        _break(claim, found)
        if not _take(claim, token):
            yield None
            return

    def check() -> None:
        if (owner(claim) or {}).get("token") != token:
            raise StoreError(
                f"{claim}: lost; it was taken over by another process, or the file system was away; run the same command again"
            )

    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(claim / "owner.json")

    thread = threading.Thread(target=beat, name="claim-heartbeat", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        stop.set()
        thread.join()
        if (owner(claim) or {}).get("token") == token:
            shutil.rmtree(claim, ignore_errors=True)


@contextlib.contextmanager
def exclusive(claim: Path, what: str) -> Iterator[None]:
    """Hold `claim`, after waiting for whoever holds it."""
    told = False
    while True:
        with claimed(claim) as held:
            if held:
                yield
                return
        if not told:
            log.info("waiting for %s, which %s has in hand", what, describe(claim))
            told = True
        time.sleep(POLL)


def owner(claim: Path) -> dict[str, Any] | None:
    """Who holds a claim: `user`, `host`, `pid`, `slurm_job_id`, `since`; None if nobody does."""
    try:
        return json.loads((claim / "owner.json").read_text())
    except PermissionError:
        raise StoreError(f"{claim}: belongs to {_user_of(claim)} and may not be read; {SHARING}") from None
    except (OSError, ValueError):
        return None


SHARING = "users who share a store need a common group and umask 002 (docs/clusters.md)"


def describe(claim: Path) -> str:
    """The owner of a claim in words."""
    who = owner(claim) or {}
    job = f", SLURM job {who['slurm_job_id']}" if who.get("slurm_job_id") else ""
    return f"process {who.get('pid', '?')} of {who.get('user', '?')} on {who.get('host', '?')}{job} (since {who.get('since', '?')})"


def is_stale(claim: Path, who: dict[str, Any]) -> bool:
    """Whether the owner of a claim is gone.

    Args:
        claim: the folder.
        who: its owner.
    """
    if who["machine"] == _machine():
        return _born(who["pid"]) != who["born"]
    # Both times are the file system's, so that clocks of different machines need not agree.
    probe = claim.with_name(f"{claim.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        probe.touch()
        return probe.stat().st_mtime - (claim / "owner.json").stat().st_mtime > STALE
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _take(claim: Path, token: str) -> bool:
    """Claim by renaming a folder into place: atomic, also on network file systems, and never seen without its owner."""
    mine = claim.with_name(f"{claim.name}.{token[:8]}.tmp")
    who = {"token": token, "machine": _machine(), "host": _host(), "pid": os.getpid(), "born": _born(os.getpid())}
    who |= {"user": _me(), "slurm_job_id": os.environ.get("SLURM_JOB_ID"), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        mine.mkdir()
        (mine / "owner.json").write_text(json.dumps(who))
    except PermissionError:
        raise StoreError(f"{claim.parent}: belongs to {_user_of(claim.parent)} and may not be written to; {SHARING}") from None
    except OSError:
        shutil.rmtree(mine, ignore_errors=True)
        raise
    try:
        os.rename(mine, claim)
    except OSError:
        shutil.rmtree(mine, ignore_errors=True)
        return False
    return True


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed in the midst of claiming have left in a folder; once a process."""
    if folder in _swept or not folder.is_dir():
        return
    _swept.add(folder)
    for left in [Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".tmp") and ".claim." in entry.name]:
        who = owner(left)
        if is_stale(left, who) if who is not None else _is_old(left, folder):
            shutil.rmtree(left, ignore_errors=True)


def _is_old(left: Path, folder: Path) -> bool:
    """Whether a thing without an owner was there long before the last change of its folder; both times are the file system's."""
    try:
        return folder.stat().st_mtime - left.stat().st_mtime > STALE
    except OSError:
        return False


def _break(claim: Path, who: dict[str, Any]) -> None:
    """Remove the stale claim of `who`, and only that one, however many processes try."""
    grave = claim.with_name(f"{claim.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        os.rename(claim, grave)
    except PermissionError:
        gone = f"its owner, a process of {who.get('user', '?')} on {who.get('host', '?')}, is gone, but you may not remove it"
        raise StoreError(f"{claim}: {gone}; ask for it to be deleted: rm -r {claim}") from None
    except OSError:
        return
    if (owner(grave) or {}).get("token") != who["token"]:  # someone else broke it first, and this is the new owner's: give it back
        with contextlib.suppress(OSError):
            os.rename(grave, claim)
    else:
        log.info("%s: its owner is gone; taking over", claim.name)
    shutil.rmtree(grave, ignore_errors=True)


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _me() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in this container
        return str(os.getuid())


def _user_of(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return "another user"


def _machine() -> str:
    """One name for the processes whose pids mean the same thing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a process started (pids are used again); None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if stat[0] in "ZX" else stat[19]
    except OSError:
        if Path("/proc/self").exists():
            return None
    try:  # no /proc: all that can be said is whether it runs
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
