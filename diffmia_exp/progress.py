"""How far a piece of work is: a bar on the terminal, and a small file beside its claim, which `diffmia_exp.status` reads."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

EVERY = 3.0
"""Seconds between two writings of the file, at least."""


class Bar:
    """Counts towards a total.

    Args:
        label: what is done.
        total, unit: of what there is to do.
        folder: the store's, in which it is done; None for work that is not the store's.
        done: how much of it had been done before.
        hidden: nothing on the terminal.
        leave: the bar stays there when all is done.
    """

    def __init__(
        self, label: str, total: int, unit: str, folder: Path | None = None, done: int = 0, hidden: bool = False, leave: bool = True
    ) -> None:
        every = 0.1 if sys.stderr.isatty() else 5
        self.bar = tqdm(total=total, mininterval=every, initial=done, desc=label, unit=unit, disable=hidden, leave=leave)
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.claim = None if folder is None else folder.with_name(folder.name.removesuffix(".partial") + ".claim")
        self.written = 0.0
        self._write()

    def update(self, n: int = 1) -> None:
        """So much more is done."""
        self.done += n
        self.bar.update(n)
        if self.claim is not None and time.monotonic() - self.written > EVERY:
            self._write()

    def _write(self) -> None:
        if self.claim is None:
            return
        self.written = time.monotonic()
        unfinished = self.claim / f"progress.{os.getpid()}.tmp"
        with contextlib.suppress(OSError):  # no claim, or a full disk: of no account
            unfinished.write_text(json.dumps({"label": self.label, "done": self.done, "total": self.total, "unit": self.unit}))
            os.replace(unfinished, self.claim / "progress.json")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
