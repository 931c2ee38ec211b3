"""Run folders: what a person finds under outputs/runs/, and the checks of names and places."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffmia_exp import claims
from diffmia_exp.config import Plain
from diffmia_exp.errors import ConfigError
from diffmia_exp.store import digest, sha256

log = logging.getLogger(__name__)


class Result(dict[str, Any]):
    """What `metrics.json` holds, where it lies, and whether it was found there rather than made."""

    cached: bool = False
    folder: Path | None = None
    tracked: str | None = None
    overrides: Sequence[str] = ()


def checked_name(name: Any) -> str:
    """A name that is safe as a folder name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,150}", name):
        raise ConfigError("name", name, "must be letters, digits and any of . _ = + - (at most 150)")
    return name


def writable(key: str, path: Any) -> Path:
    """An output folder, made if need be, that can be written to."""
    if not isinstance(path, str) or not path:
        raise ConfigError(key, path, "must be a folder")
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # without a name: a process that is killed here leaves nothing
            pass
    except OSError as e:
        raise ConfigError(key, path, f"cannot be written to ({e.strerror}); give another folder") from None
    return folder


def existing_file(key: str, path: Any) -> Path:
    """A file that is there."""
    file = Path(str(path)).expanduser()
    if not file.is_file():
        raise ConfigError(key, path, "no such file; give the path of one that exists")
    return file


def folder(output_dir: Path, name: str, run_key: str) -> Path:
    """Where a run is kept: its name, and enough of its key that runs of different settings never meet."""
    return output_dir / "runs" / f"{name}-{run_key[:8]}"


def finished(folder: Path, run_key: str) -> Result | None:
    """The result of a run that was finished and is unaltered, else None."""
    try:
        result = Result(json.loads((folder / "metrics.json").read_text()))
        if result["status"] == "done" and result["run_key"] == run_key and sha256(folder / "scores.parquet") == result["scores_sha256"]:
            result.cached = True
            return result
    except (OSError, ValueError, KeyError):
        pass
    return None


@contextlib.contextmanager
def logged() -> Iterator[io.StringIO]:
    """Collect everything logged meanwhile, for run.log."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield text
    finally:
        logging.getLogger().removeHandler(handler)


@contextlib.contextmanager
def exclusively(folder: Path) -> Iterator[None]:
    """One process at a time writes a run folder; what one that was killed left beside it is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with claims.exclusive(folder.with_name(f".{folder.name}.claim"), folder.name):
        for unfinished in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        yield


@contextlib.contextmanager
def writing(folder: Path, text: io.StringIO) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` once it is whole; `text` is its run.log."""
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        (unfinished / "run.log").write_text(text.getvalue())
        replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def alarm(text: io.StringIO, unsound: Sequence[str]) -> None:
    """Put what makes a run unsound before everything logged so far."""
    logged = text.getvalue()
    text.seek(0)
    text.write("".join(f"UNSOUND: {sentence}\n" for sentence in unsound) + logged)


def replace(source: Path, target: Path) -> None:
    """Put a folder in the place of another."""
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def not_applicable(output_dir: Path, name: str, config: Plain, reason: str, text: io.StringIO) -> Result:
    """Record a cell that its threat model rules out."""
    defense = {"defense": config["defense"]} if config["defense"].get("name") != "none" else {}
    where = folder(output_dir, name, digest({k: config[k] for k in ("threat_model", "attack", "seed", "name")} | defense))
    result = Result(identity(config) | {"name": where.name, "status": "not applicable", "reason": reason})
    result.folder = where
    log.info("not applicable: %s", reason)
    with writing(where, text) as unfinished:
        (unfinished / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (unfinished / "metrics.json").write_text(json.dumps(result, indent=1))
    return result


def identity(config: Plain) -> Plain:
    """What a run is called by; `label` names an attack with its host, its plug-in and how its settings were chosen."""
    attack = config["attack"]
    host, plugin = attack.get("host") or {}, attack.get("plugin") or {}
    label = attack["name"] + (f"({host['name']})" if host else "") + (f"+{plugin['name']}" if plugin else "")
    label += " selected" if attack["select"] == "shadow" else ""
    return {"label": label, "attack": config["attack"]["name"], "threat_model": config["threat_model"]["name"]} | {
        "dataset": config["dataset"]["name"],
        "defense": config["defense"].get("name", "?"),
        "seed": config["seed"],
    }
