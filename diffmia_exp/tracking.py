"""Every Weights & Biases call of the project.

One W&B run per trained model (job type `train`, its id the store key) and one per attack (job type `attack`), grouped by sweep,
with the lineage model-<key> -> scores-<key>. Offline unless asked otherwise; everything is kept below `<output_dir>/wandb`.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmia_exp.errors import ConfigError, choice
from diffmia_exp.scores import ScoreTable

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

MODES = ("offline", "online", "disabled")
ROC_ROWS = 2000


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
        choice("mode", self.effective_mode, MODES)

    @property
    def effective_mode(self) -> str:
        """The mode in force."""
        return self.mode or os.environ.get("WANDB_MODE") or "offline"

    @contextlib.contextmanager
    def _run(self, root: Path, job_type: str, **settings: Any) -> Iterator[Any]:
        import wandb

        folder = root.resolve()
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(variable, str(folder / "wandb" / variable.split("_")[1].lower()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run = wandb.init(
                    project=self.project,
                    entity=self.entity,
                    mode=self.effective_mode,  # type: ignore[arg-type]
                    dir=folder,
                    group=self.group,
                    job_type=job_type,
                    tags=self.tags,
                    resume="allow",
                    reinit="finish_previous",
                    settings=wandb.Settings(console="off", silent=True, save_code=False),
                    **settings,
                )
            except wandb.errors.UsageError as e:  # not logged in, no such entity
                raise ConfigError("tracking.mode", self.effective_mode, f"W&B refuses ({e}); try tracking.mode=offline") from None
            with run:
                yield run

    @contextlib.contextmanager
    def training(
        self, root: Path, key: str, name: str, config: dict[str, Any], folder: Path, files: tuple[str, ...]
    ) -> Iterator[Logger | None]:
        """A Lightning logger for the training of model `key` in `folder`.

        When it is trained, its description (these files, not its weights) is logged as artifact model-<key>.
        """
        if self.effective_mode == "disabled":
            yield None
            return
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        with self._run(root, "train", id=key, name=name, config=without_targets(config)) as run:
            yield WandbLogger(experiment=run)
            artifact = wandb.Artifact(f"model-{key}", type="model")
            for name in files:
                artifact.add_file(str(folder / name), name=name)
            run.log_artifact(artifact)

    def attack(self, root: Path, run_folder: Path, config: dict[str, Any]) -> str | None:
        """Log a finished attack from its run folder. Returns its address, or offline its folder."""
        if self.effective_mode == "disabled":
            return None
        import wandb

        result = json.loads((run_folder / "metrics.json").read_text())
        table = ScoreTable.load(run_folder / "scores.parquet")
        settings = {"id": result["run_key"], "name": result["name"], "config": without_targets(config) | {"train_key": result["train_key"]}}
        with self._run(root, "attack", **settings) as run:
            if self.effective_mode == "online":
                with contextlib.suppress(wandb.errors.CommError):  # the model may have been trained with tracking=none
                    run.use_artifact(f"model-{result['train_key']}:latest")
            run.summary.update(summary(result))
            pictures = {name: wandb.Image(str(run_folder / f"{name}.png")) for name in ("roc", "scores", "samples")}
            rows = [[int(i), bool(m), float(s)] for i, m, s in zip(table.sample_id, table.is_member, table.score, strict=True)]
            scores = wandb.Table(columns=["sample_id", "is_member", "score"], data=rows)
            curve = wandb.Table(columns=["fpr", "tpr", "threshold"], data=roc_rows(table))
            run.log({**pictures, "score_table": scores, "roc_table": curve})
            artifact = wandb.Artifact(f"scores-{result['run_key']}", type="scores", metadata={"model": f"model-{result['train_key']}"})
            for name in ("scores.parquet", "metrics.json", "config.yaml"):
                artifact.add_file(str(run_folder / name), name=name)
            run.log_artifact(artifact)
            where = run.url if self.effective_mode == "online" else os.path.relpath(Path(run.dir).parent)
        return where


def roc_rows(table: ScoreTable) -> list[list[float]]:
    """The exact ROC curve as rows; past ROC_ROWS only its right part is thinned, every point below an FPR of 1% stays."""
    from diffmia_exp import metrics

    curve = metrics.roc(table.is_member, table.score)
    low = np.flatnonzero(curve.fpr <= 0.01)
    rest = np.flatnonzero(curve.fpr > 0.01)
    if len(rest) > ROC_ROWS:
        rest = rest[np.linspace(0, len(rest) - 1, ROC_ROWS).round().astype(int)]
    kept = np.concatenate([low, rest])
    threshold = np.where(np.isfinite(curve.threshold), curve.threshold, table.score.max())
    return [[float(curve.fpr[i]), float(curve.tpr[i]), float(threshold[i])] for i in kept]


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of `metrics.json` under W&B summary keys."""
    flat = {
        "test/auc": result["auc"],
        "test/auc_low": result["auc_ci"][0],
        "test/auc_high": result["auc_ci"][1],
        "test/balanced_accuracy": result["balanced_accuracy"],
        "cost/nfe_per_image": result["nfe_per_image"],
        "cost/seconds": result["seconds"],
    }
    resolved = {f"test/tpr_at_fpr_{fpr}": at["tpr"] for fpr, at in result["tpr_at_fpr"].items() if at["resolvable"]}
    return flat | resolved


def without_targets(config: Any) -> Any:
    """A config without `_target_`s, as people filter and group by it."""
    if isinstance(config, dict):
        return {k: without_targets(v) for k, v in config.items() if k != "_target_"}
    return config
