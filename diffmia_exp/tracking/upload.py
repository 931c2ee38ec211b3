"""Uploading what was logged offline, once each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from diffmia_exp.errors import UserError
from diffmia_exp.tracking.runs import FINISHED, keep_below

SILENCE = 600
"""Seconds after which a run that was not finished counts as killed: a living one writes its machine's load every few seconds."""


@dataclass
class Offline:
    """Offline runs, each by its .wandb file: those to upload, those uploaded before, and those that are still being written.

    W&B takes an unfinished file for that of a crashed run, and marks it as uploaded; what is written later would be lost.
    """

    waiting: list[Path] = field(default_factory=list)
    uploaded: list[Path] = field(default_factory=list)
    running: list[Path] = field(default_factory=list)


def offline(root: Path) -> Offline:
    """The offline runs below `<root>/wandb`.

    Raises:
        UserError: if there are none.
    """
    found = Offline()
    for file in sorted((root / "wandb").glob("offline-run-*/*.wandb")):
        if is_uploaded(file):
            found.uploaded.append(file)
        elif file.with_name(FINISHED).exists() or time.time() - file.stat().st_mtime > SILENCE:
            found.waiting.append(file)
        else:
            found.running.append(file)
    if not (found.waiting or found.uploaded or found.running):
        raise UserError(f"{root}: no offline W&B runs in {root / 'wandb'}; give the output_dir of runs that were logged offline")
    return found


def is_uploaded(file: Path) -> bool:
    """Whether `wandb sync` has left its mark beside a .wandb file."""
    return file.with_name(f"{file.name}.synced").exists()


def upload(root: Path, files: list[Path]) -> list[Path]:
    """Upload offline runs with `wandb sync`, whose output is shown. Returns those that were not uploaded.

    Raises:
        UserError: without a login.
    """
    require_login()
    keep_below(root)
    subprocess.run([sys.executable, "-m", "wandb", "sync", "--yes", *map(str, files)], check=False)
    return [file for file in files if not is_uploaded(file)]


def require_login() -> None:
    """Refuse to go on without a login to W&B; none is asked for.

    Raises:
        UserError: without a login.
    """
    import wandb

    os.environ["WANDB_MODE"] = "online"  # which says how runs are logged, not whether they may be uploaded
    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as e:
        raise UserError(f"W&B does not accept the login ({e}); run wandb login, or set WANDB_API_KEY, and repeat this") from None
    if not known:
        raise UserError("not logged in to W&B; run wandb login, or set WANDB_API_KEY, and repeat this")
