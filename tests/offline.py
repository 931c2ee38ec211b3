"""Offline W&B runs, read back with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def wandb(*arguments: str) -> str:
    """What the command line of W&B prints."""
    done = subprocess.run([Path(sys.executable).with_name("wandb"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout or done.stderr


class Logged:
    """An offline run below an output folder: the only one whose id begins so, or the one in a folder."""

    def __init__(self, output_dir: Path, run_id: str = "", folder: Path | None = None) -> None:
        (self.folder,) = [folder] if folder else (output_dir / "wandb").glob(f"offline-run-*-{run_id}*")
        (self.file,) = self.folder.glob("*.wandb")
        self.records: dict[str, list[dict[str, Any]]] = {}
        for line in wandb("leet", "inspect", "--json", str(self.file)).splitlines():
            record = json.loads(line)
            self.records.setdefault(record["type"], []).append(record[record["type"]])
        (self.run,) = self.records["run"]
        self.steps = [record["item"] for record in self.records.get("history", [])]
        self.summary: dict[str, Any] = {}
        for record in self.records["summary"]:
            self.summary |= record.get("update", {})

    @property
    def keys(self) -> set[str]:
        """What was logged: numbers, texts, tables and pictures."""
        flat = {key for item in [*self.steps, self.summary] for key in item}
        media = {key.removesuffix("._type") for key in flat if key.endswith("._type")}
        return media | {key for key in flat if not key.startswith("_") and not any(key.startswith(f"{m}.") for m in media)}

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of a table; pictures in it are named only."""
        content = json.loads((self.folder / "files" / self.steps[0][f"{key}.path"]).read_text())
        return content["columns"], content["data"]

    def pictures(self, key: str) -> list[Path]:
        """The files of a picture, or of several under one key."""
        item = self.steps[0]
        names = item.get(f"{key}.filenames") or [item[f"{key}.path"]]
        return [self.folder / "files" / name for name in names]

    def artifacts(self) -> dict[str, dict[str, Any]]:
        """Artifacts by name, but for those that tables are kept in."""
        return {record["name"]: record for record in self.records.get("artifact", []) if not record["name"].startswith("run-")}
