"""A content-addressed store: ask for a thing by the full description of how it is made; it is made once, and found ever after.

    outputs/<kind>/<key>/              a finished entry: its files, `spec.yaml`, and `DONE` with their checksums, written last
    outputs/<kind>/<key>.partial/      an entry being made, or one whose making was killed: the next process resumes it
    outputs/<kind>/<key>.claim/        who is making it, with a heartbeat
    outputs/<kind>/<key>.damaged-<n>/  an entry that was no longer what had been written, set aside and made again

The key is a hash of the resolved spec and `VERSION`: never a file name, never a difference to defaults.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from diffmia_exp import claims
from diffmia_exp.claims import SHARING, StoreError, write_atomic

log = logging.getLogger(__name__)

VERSION = 1
"""Raise it when the code changes what a spec yields: every stored entry then counts as another one."""


def digest(value: Any) -> str:
    """Hash of a plain (JSON) value, independent of the order of keys; 16 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Damaged(Exception):
    """An entry that is not, byte for byte, what was written."""


class Store:
    """The entries of one kind under an output folder.

    Args:
        root: the output folder.
        kind: `models`, `samples`, `signals`, `scores` or `controls`.
    """

    def __init__(self, root: Path, kind: str) -> None:
        self.root = root / kind
        self.kind = kind

    def key(self, spec: dict[str, Any]) -> str:
        """The entry's name: hash of kind, VERSION and spec."""
        return digest({"kind": self.kind, "version": VERSION, "spec": spec})

    def get(self, spec: dict[str, Any]) -> Path | None:
        """The finished entry, verified byte for byte; None if there is none that is whole.

        Raises:
            StoreError: if there is one that cannot be read.
        """
        try:
            found = self._verified(spec)
        except Damaged:
            return None
        if found is not None and (claim := found.with_name(f"{found.name}.claim")).exists():
            # Its maker is about to remove it, or was killed before it could.
            with contextlib.suppress(StoreError), claims.claimed(claim):
                pass
        return found

    def _verified(self, spec: dict[str, Any]) -> Path | None:
        path = self.root / self.key(spec)
        if not path.is_dir():
            return None
        try:
            recorded = json.loads((path / "DONE").read_text())["sha256"]
            for name, checksum in recorded.items():
                if not (path / name).is_file() or sha256(path / name) != checksum:
                    raise Damaged(f"{name} is missing, truncated or altered (its checksum differs)")
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            if not path.is_dir():  # set aside meanwhile
                return None
            raise Damaged("the entry is incomplete (DONE is missing or damaged)") from None
        except OSError as e:  # which says nothing of the entry
            raise StoreError(f"{e.filename}: cannot be read ({e.strerror}); {SHARING}") from None
        return path

    def get_or_make(self, spec: dict[str, Any], make: Callable[[Path], None]) -> Path:
        """The finished entry, made by `make(folder)` if need be.

        One process makes an entry; others that want it wait and use its result. `make` finds in the folder whatever a killed
        predecessor left there, and may resume from it. A damaged entry is set aside with a warning, and made again.

        Raises:
            StoreError: if the store may not be written to, or the claim was lost meanwhile.
        """
        path = self.root / self.key(spec)
        partial, claim = path.with_name(path.name + ".partial"), path.with_name(path.name + ".claim")
        told = False
        while True:
            if (found := self.get(spec)) is not None:
                return found
            self.root.mkdir(parents=True, exist_ok=True)
            with claims.claimed(claim) as held:
                if held:
                    if (found := self._whole(spec)) is not None:
                        return found
                    with _resumable(partial):
                        (partial / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
                        make(partial)
                    held()
                    self._publish(partial, path)
                    return path
            if not told:
                log.info("waiting for %s/%s, which %s is making", self.kind, path.name, claims.describe(claim))
                told = True
            time.sleep(claims.POLL)

    def _whole(self, spec: dict[str, Any]) -> Path | None:
        """The finished entry, a damaged one set aside. Only who holds the claim may do that: another would move the new one away."""
        try:
            return self._verified(spec)
        except Damaged as e:
            path = self.root / self.key(spec)
            aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.damaged-{n}")).exists())
            try:
                os.rename(path, aside)
            except PermissionError:
                raise StoreError(f"{path}: {e}, and you may not set it aside; ask for it to be deleted: rm -r {path}") from None
            log.warning("%s: %s; it was set aside as %s and is made again", path, e, aside.name)
            return None

    def _publish(self, partial: Path, path: Path) -> None:
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        write_atomic(partial / "DONE", json.dumps({"sha256": {str(p.relative_to(partial)): sha256(p) for p in files}}, indent=1))
        os.rename(partial, path)


@contextlib.contextmanager
def _resumable(partial: Path) -> Iterator[None]:
    """A folder to make an entry in. If that fails it stays, but only with files to resume from."""

    def drop_unfinished() -> None:
        for file in (*partial.rglob("*.tmp"), partial / "DONE"):  # DONE: killed just before it was renamed
            file.unlink(missing_ok=True)

    partial.mkdir(exist_ok=True)
    try:
        drop_unfinished()  # of a predecessor that was killed
        yield
    except BaseException as e:
        with contextlib.suppress(OSError):
            drop_unfinished()
            if {p.name for p in partial.iterdir()} <= {"spec.yaml"}:
                shutil.rmtree(partial)
        if isinstance(e, PermissionError) and str(e.filename).startswith(str(partial)):
            raise StoreError(f"{e.filename}: was begun by another user and may not be written to; {SHARING}") from None
        raise
