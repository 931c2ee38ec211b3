"""Logging to W&B: one run per trained model, one per attack, one per report.

Their job types are `train` (its id the model's store key), `attack` and `report`; they are grouped by sweep. The lineage is
model-<key> -> scores-<key> -> report-<name>. Offline unless asked otherwise; everything is kept below `<output_dir>/wandb`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffmia_exp.config import Plain
from diffmia_exp.errors import ConfigError, choice
from diffmia_exp.scores import ScoreTable
from diffmia_exp.tracking import tables
from diffmia_exp.tracking.tables import Table

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

MODES = ("offline", "online", "disabled")
FORBIDDEN = "/\\#?%:"
"""What W&B refuses in the name of a project."""

FINISHED = ".finished"
"""In the folder of an offline run: nothing more will be written to it."""

PICTURES = ("roc", "scores", "samples", "near_copies")
SCORES = ("scores.parquet", "metrics.json", "config.yaml")
MODEL = ("spec.yaml", "training.json")
"""Files of a run folder, and of a model's store entry, that stand for it as an artifact; never its weights."""


def project_name(key: str, value: Any) -> str:
    """`value` if it can be the name of a W&B project.

    Raises:
        ConfigError: naming `key`, if not.
    """
    if not isinstance(value, str) or not value.strip() or len(value) > 128 or any(c in FORBIDDEN for c in value):
        raise ConfigError(key, value, f"must be a name of at most 128 characters, none of them {' '.join(FORBIDDEN)}")
    return value


def keep_below(root: Path) -> None:
    """Let W&B keep below `<root>/wandb` what it would keep in the home directory."""
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(variable, str(root.resolve() / "wandb" / variable.split("_")[1].lower()))


@dataclass(frozen=True)
class Wandb:
    """Where and how to log.

    Args:
        project, entity: of W&B; entity None for the account's default.
        mode: `offline`, `online` or `disabled`; None for $WANDB_MODE if that is set, else offline.
        group: of the runs; None for the sweep's name.
        tags: of every run.
    """

    project: str = "diffmia_exp"
    entity: str | None = None
    mode: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        project_name("project", self.project)
        choice("mode", self.effective_mode, MODES)

    @property
    def effective_mode(self) -> str:
        """The mode in force."""
        return self.mode or os.environ.get("WANDB_MODE") or "offline"

    @property
    def place(self) -> Plain:
        """Where in W&B the runs stand."""
        return {"project": self.project, "entity": self.entity, "group": self.group, "tags": self.tags}

    @contextlib.contextmanager
    def _run(self, root: Path, job_type: str, **settings: Any) -> Iterator[Any]:
        import wandb

        keep_below(root)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run = wandb.init(
                    project=self.project,
                    entity=self.entity,
                    mode=self.effective_mode,  # type: ignore[arg-type]
                    dir=root.resolve(),
                    group=self.group,
                    job_type=job_type,
                    tags=self.tags,
                    resume="allow",
                    reinit="finish_previous",
                    settings=wandb.Settings(console="off", silent=True, save_code=False),
                    **settings,
                )
            except wandb.errors.UsageError as e:  # not logged in, no such entity
                key = "tracking.mode" if self.mode else "WANDB_MODE"
                raise ConfigError(key, self.effective_mode, f"W&B refuses ({e}); try {key}=offline") from None
            finished = Path(run.dir).with_name(FINISHED)
            try:
                with run:
                    yield run
            finally:
                if self.effective_mode == "offline":
                    finished.touch()

    @contextlib.contextmanager
    def training(self, root: Path, key: str, name: str, config: dict[str, Any], folder: Path) -> Iterator[Logger | None]:
        """A Lightning logger for the training of model `key` in `folder`.

        When it is trained, its description (not its weights) is logged as artifact model-<key>.
        """
        if self.effective_mode == "disabled":
            yield None
            return
        from pytorch_lightning.loggers import WandbLogger

        with self._run(root, "train", id=key, name=name, config=without_targets(config)) as run:
            yield WandbLogger(experiment=run)
            run.log_artifact(_artifact(f"model-{key}", "model", [folder / file for file in MODEL]))

    def attack(self, root: Path, run_folder: Path, config: dict[str, Any]) -> str | None:
        """Log a finished attack: everything that its run folder holds. Returns its address, or offline its folder."""
        if self.effective_mode == "disabled":
            return None
        import wandb

        result = json.loads((run_folder / "metrics.json").read_text())
        train_key, run_key = result["train_key"], result["run_key"]
        settings = {"id": run_key, "name": result["name"], "config": without_targets(config) | {"train_key": train_key}}
        with self._run(root, "attack", **settings) as run:
            model = root / "models" / train_key
            if model.is_dir():  # not where a checkpoint of one's own was attacked
                self._use(run, _artifact(f"model-{train_key}", "model", [model / file for file in MODEL], fixed=True))
            pictures = {name: wandb.Image(str(run_folder / f"{name}.png")) for name in PICTURES if (run_folder / f"{name}.png").exists()}
            run.log(tables.numbers(result) | pictures | {key: _table(table) for key, table in tables.of_run(run_folder).items()})
            run.summary.update(tables.words(result))
            run.define_metric("roc/fpr", summary="none")
            run.define_metric("roc/tpr", step_metric="roc/fpr", summary="none")
            for point in tables.roc_line(ScoreTable.load(run_folder / "scores.parquet")):
                run.log(point)
            files = [run_folder / file for file in SCORES]
            run.log_artifact(_artifact(f"scores-{run_key}", "scores", files, {"model": f"model-{train_key}"}))
            return self._where(run)

    def report(
        self,
        root: Path,
        name: str,
        config: Plain,
        content: Mapping[str, Table],
        figures: Mapping[str, Sequence[tuple[str, bytes]]],
        scores: Mapping[str, Path],
        files: Iterable[Path],
    ) -> str:
        """Log a report over many runs.

        Args:
            root: the output folder that wandb/ is in.
            name: of the W&B run and of the artifact.
            config: what the report is of.
            content: its tables, by key.
            figures: its figures by key, each with a caption and as PNG.
            scores: the run folder of every run that it is made from, by run key: the lineage.
            files: what the artifact holds, as the page.

        Returns:
            the run's address, or offline its folder.
        """
        import wandb

        with self._run(root, "report", name=name, config=config) as run:
            for key, folder in scores.items():
                self._use(run, _artifact(f"scores-{key}", "scores", [folder / file for file in SCORES], fixed=True))
            pictures = {key: [wandb.Image(p, caption=c) for c, p in _of_one_size(drawn)] for key, drawn in figures.items()}
            run.log(pictures | {key: _table(table) for key, table in content.items()})
            run.log_artifact(_artifact(name, "report", files, {"scores": [f"scores-{key}" for key in scores]}))
            return self._where(run)

    def _use(self, run: Any, artifact: Any) -> None:
        """Declare an artifact an input of a run; it is the one of the same name and files that was logged before, or else new."""
        if self.effective_mode == "online":
            run.use_artifact(artifact)
        else:  # use_artifact refuses to do offline what it does online, which is this, and what the upload can do later
            run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def _where(self, run: Any) -> str:
        return str(run.url) if self.effective_mode == "online" else os.path.relpath(Path(run.dir).parent)


def _artifact(name: str, kind: str, files: Iterable[Path], metadata: Plain | None = None, fixed: bool = False) -> Any:
    """An artifact of files. `fixed`: they are read where they are when they are uploaded, instead of copied now."""
    import wandb

    artifact = wandb.Artifact(name, type=kind, metadata=metadata)
    for file in files:
        artifact.add_file(str(file), name=file.name, policy="immutable" if fixed else "mutable")
    return artifact


def _table(table: Table) -> Any:
    """A W&B table, pixels as images."""
    import wandb

    def cell(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return wandb.Image(Image.fromarray(value[0] if len(value) == 1 else np.ascontiguousarray(value.transpose(1, 2, 0))))
        return value

    return wandb.Table(columns=list(table.columns), data=[[cell(value) for value in row] for row in table.rows])


def _of_one_size(drawn: Sequence[tuple[str, bytes]]) -> list[tuple[str, Image.Image]]:
    """Pictures with white below and beside them, as W&B shows those of one key at the size of the first."""
    pictures = [(caption, Image.open(io.BytesIO(png)).convert("RGB")) for caption, png in drawn]
    size = tuple(max(picture.size[side] for _, picture in pictures) for side in (0, 1))
    padded = []
    for caption, picture in pictures:
        sheet = Image.new("RGB", size, "white")  # type: ignore[arg-type]
        sheet.paste(picture)
        padded.append((caption, sheet))
    return padded


def without_targets(config: Any) -> Any:
    """A config without `_target_`s, as people filter and group by it."""
    if isinstance(config, dict):
        return {k: without_targets(v) for k, v in config.items() if k != "_target_"}
    return config
