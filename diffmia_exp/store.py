"""A content-addressed store: ask for a thing by the full description of how it is made; it is made once, and found ever after.

    outputs/<kind>/<key>/            a finished entry: its files, `spec.yaml`, and `DONE` with their checksums, written last
    outputs/<kind>/<key>.partial/    an entry being made, or one whose making was killed: the next process resumes it
    outputs/<kind>/<key>.claim/      who is making it, with a heartbeat

The key is a hash of the resolved spec and `VERSION`: never a file name, never a difference to defaults.
"""

from __future__ import annotations

import contextlib
import hashlib
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

import yaml

from diffmia_exp.errors import UserError

log = logging.getLogger(__name__)

VERSION = 1
"""Raise it when the code changes what a spec yields: every stored entry then counts as another one."""

HEARTBEAT = 5.0
"""Seconds between two signs of life of a claim's owner."""

STALE = 60.0
"""Seconds without a sign of life after which a claim on another machine is broken. On the same machine a dead owner is seen at once."""


class StoreError(UserError):
    """An entry that must not be used."""


def digest(value: Any) -> str:
    """Hash of a plain (JSON) value, independent of the order of keys; 16 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Store:
    """The entries of one kind under an output folder.

    Args:
        root: the output folder.
        kind: `models`, `scores` or `samples`.
    """

    def __init__(self, root: Path, kind: str) -> None:
        self.root = root / kind
        self.kind = kind

    def key(self, spec: dict[str, Any]) -> str:
        """The entry's name: hash of kind, VERSION and spec."""
        return digest({"kind": self.kind, "version": VERSION, "spec": spec})

    def get(self, spec: dict[str, Any]) -> Path | None:
        """The finished entry, verified; None if there is none.

        Raises:
            StoreError: if the entry is not, byte for byte, what was written.
        """
        path = self.root / self.key(spec)
        if not path.is_dir():
            return None
        remedy = f"delete the folder to have it made again: rm -r {path}"
        try:
            recorded = json.loads((path / "DONE").read_text())["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(f"{path}: the entry is incomplete (DONE is missing or damaged); {remedy}") from None
        for name, checksum in recorded.items():
            if not (path / name).is_file() or sha256(path / name) != checksum:
                raise StoreError(f"{path}: {name} is missing, truncated or altered (its checksum differs); {remedy}")
        return path

    def get_or_make(self, spec: dict[str, Any], make: Callable[[Path], None]) -> Path:
        """The finished entry, made by `make(folder)` if need be.

        One process makes an entry; others that want it wait and use its result. `make` finds in the folder whatever a killed
        predecessor left there, and may resume from it.
        """
        path = self.root / self.key(spec)
        partial, claim = path.with_name(path.name + ".partial"), path.with_name(path.name + ".claim")
        told = False
        while True:
            if (found := self.get(spec)) is not None:
                return found
            self.root.mkdir(parents=True, exist_ok=True)
            with _claimed(claim) as held:
                if held:
                    if (found := self.get(spec)) is not None:
                        return found
                    with _resumable(partial):
                        write_atomic(partial / "spec.yaml", yaml.safe_dump(spec, sort_keys=False))
                        make(partial)
                    held()
                    self._publish(partial, path)
                    return path
            if not told:
                log.info("waiting for %s/%s, which %s is making", self.kind, path.name, _describe(claim))
                told = True
            time.sleep(1.0)

    def _publish(self, partial: Path, path: Path) -> None:
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        write_atomic(partial / "DONE", json.dumps({"sha256": {str(p.relative_to(partial)): sha256(p) for p in files}}, indent=1))
        os.rename(partial, path)


@contextlib.contextmanager
def _resumable(partial: Path) -> Iterator[None]:
    """A folder to make an entry in. If that fails it stays, but only with files to resume from."""

    def drop_unfinished() -> None:
        for file in partial.rglob("*.tmp"):
            file.unlink()

    partial.mkdir(exist_ok=True)
    drop_unfinished()  # of a predecessor that was killed
    try:
        yield
    except BaseException:
        drop_unfinished()
        if {p.name for p in partial.iterdir()} <= {"spec.yaml"}:
            shutil.rmtree(partial)
        raise


@contextlib.contextmanager
def _claimed(claim: Path) -> Iterator[Callable[[], None] | None]:
    """Try to hold `claim`; yields None if another process does, else a function that raises if the claim was lost meanwhile."""
    token = uuid.uuid4().hex
    if not _take(claim, token):
        owner = _owner(claim)
        if owner is None or not _is_stale(claim, owner):
            yield None
            return
        _break(claim, owner["token"])
        if not _take(claim, token):
            yield None
            return

    def check() -> None:
        if (_owner(claim) or {}).get("token") != token:
            raise StoreError(f"{claim}: the claim was taken over by another process; run the same command again")

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
        if (_owner(claim) or {}).get("token") == token:
            shutil.rmtree(claim, ignore_errors=True)


def _take(claim: Path, token: str) -> bool:
    """Claim by renaming a folder into place: atomic, also on network file systems, and never seen without its owner."""
    mine = claim.with_name(f"{claim.name}.{token[:8]}.tmp")
    mine.mkdir()
    owner = {"token": token, "machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
    try:
        (mine / "owner.json").write_text(json.dumps(owner | {"slurm_job_id": os.environ.get("SLURM_JOB_ID"), "since": time.ctime()}))
    except OSError:
        shutil.rmtree(mine, ignore_errors=True)
        raise
    try:
        os.rename(mine, claim)
    except OSError:
        shutil.rmtree(mine, ignore_errors=True)
        return False
    return True


def _break(claim: Path, token: str) -> None:
    """Remove the stale claim of `token`, and only that one, however many processes try."""
    grave = claim.with_name(f"{claim.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        os.rename(claim, grave)
    except OSError:
        return
    if (_owner(grave) or {}).get("token") != token:  # someone else broke it first, and this is the new owner's: give it back
        with contextlib.suppress(OSError):
            os.rename(grave, claim)
    else:
        log.info("%s: its owner is gone; taking over", claim.name)
    shutil.rmtree(grave, ignore_errors=True)


def _owner(claim: Path) -> dict[str, Any] | None:
    try:
        return json.loads((claim / "owner.json").read_text())
    except (OSError, ValueError):
        return None


def _describe(claim: Path) -> str:
    owner = _owner(claim) or {}
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')} (since {owner.get('since', '?')})"


def _is_stale(claim: Path, owner: dict[str, Any]) -> bool:
    if owner["machine"] == _machine():
        return _born(owner["pid"]) != owner["born"]
    # Both times are the file system's, so that clocks of different machines need not agree.
    probe = claim.with_name(f"{claim.name}.{uuid.uuid4().hex[:8]}.tmp")
    probe.touch()
    try:
        return probe.stat().st_mtime - (claim / "owner.json").stat().st_mtime > STALE
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


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
