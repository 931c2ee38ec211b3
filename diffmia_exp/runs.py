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
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from diffmia_exp import __version__, claims
from diffmia_exp.config import Plain
from diffmia_exp.errors import ConfigError
from diffmia_exp.scores import ScoreTable
from diffmia_exp.store import digest, sha256

if TYPE_CHECKING:
    from diffmia_exp.audit import Bound
    from diffmia_exp.experiment import Experiment
    from diffmia_exp.workshop import Workshop

log = logging.getLogger(__name__)

MOST_EXPOSED, LEAST_EXPOSED = 32, 16
"""Members that exposed.npz shows."""

AUDIT_SHARES = (1, 2, 4, 8, 16)
"""The one-run audit guesses all images, or one in two, .., the surest ones; its bound is corrected for taking the best."""

LIBRARIES = ("torch", "pytorch-lightning", "diffusers", "numpy", "scikit-learn")


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


def write(folder: Path, name: str, workshop: Workshop) -> Result:
    """Write everything that a run folder holds; metrics.json comes last."""
    from diffmia_exp import controls, figures, metrics, selection  # seconds to import, and a cached run needs none of them

    experiment = workshop.experiment
    entry = workshop.scores()
    table = ScoreTable.load(entry / "scores.parquet")
    facts = json.loads((entry / "facts.json").read_text())
    training = facts["training"]
    config = experiment.config
    defended = "" if config["defense"].get("name") == "none" else f", defense {config['defense'].get('name', '?')}"
    title = f"{config['attack']['name']}, {config['threat_model']['name']}, {config['dataset']['name']}{defended}, seed {experiment.seed}"
    shutil.copyfile(entry / "scores.parquet", folder / "scores.parquet")
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    figures.roc(folder / "roc.png", table, title)
    figures.histogram(folder / "scores.png", table, title)
    figures.samples(folder / "samples.png", workshop.preview(), experiment.images.pixels[experiment.keep])
    memorisation = workshop.memorisation()
    shutil.copyfile(memorisation / "near_copies.npz", folder / "near_copies.npz")
    with np.load(folder / "near_copies.npz", allow_pickle=False) as pairs:
        figures.near_copies(folder / "near_copies.png", pairs["generated"], pairs["training"], pairs["ratio"])
    _save_exposed(folder / "exposed.npz", table, experiment)
    chosen = next(c for c in experiment.candidates if c.settings == facts["selection"]["settings"])
    found, private = controls.run(workshop, table, chosen), privacy(experiment, table, training)
    if private and private["refuted"]:
        found |= {"sound": False, "unsound": [private["refuted"], *found["unsound"]]}
    result = Result(
        {"status": "done", "name": name}
        | identity(config)
        | experiment.comparable()
        | metrics.evaluate(table.is_member, table.score, experiment.evaluation.fprs)
        | _by_copies(experiment, table)
        | found
        | {"memorisation": json.loads((memorisation / "memorisation.json").read_text())}
        | ({} if experiment.utility is None else {"utility": workshop.utility()})
        | ({"privacy": private} if private else {})
        | facts["cost"]
        | {
            "weights": experiment.weights,
            "snapshot": experiment.snapshot,
            "selection": facts["selection"],
            "epsilon": epsilon(experiment, table, facts["selection"].get("thresholds", {})),
            "transfer": selection.transferred(table.is_member, table.score, facts["selection"].get("thresholds", {})),
            "train_key": experiment.key(experiment.target_index),
            "run_key": experiment.run_key(),
            "epochs": _epochs(training, experiment),
            "train_seconds": training.get("seconds"),
            "parameters": training.get("parameters"),
            "duplicates_across_split": experiment.duplicates,
            "scores_sha256": sha256(folder / "scores.parquet"),
            "versions": {"diffmia_exp": __version__} | {library: version(library) for library in LIBRARIES},
        }
    )
    (folder / "metrics.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    log.info("AUC %.4f, 95%% interval [%.4f, %.4f]", result["auc"], *result["auc_ci"])
    if not result.get("utility", {}).get("learned", True):
        log.warning("utility: the model has not learned: its loss is not clearly below that of a linear denoiser")
    return result


def epsilon(experiment: Experiment, table: ScoreTable, thresholds: dict[str, float | None]) -> Plain:
    """Lower bounds of epsilon at `evaluation.delta`, by name, with `valid` and where need be `why` (not).

    Args:
        experiment: the cell.
        table: its scores.
        thresholds: those chosen on shadows, by FPR.
    """
    from diffmia_exp import audit

    delta, bound = experiment.evaluation.delta, _audited(experiment, table, experiment.evaluation.delta)
    if isinstance(bound, str):
        return {"one_run": {"valid": False, "why": bound}}
    out: Plain = {"one_run": asdict(bound) | {"valid": True}}
    if chosen := [threshold for threshold in thresholds.values() if threshold is not None]:
        bound = audit.classical(table.is_member, table.score, chosen, delta=delta)
        out["classical"] = asdict(bound) | {"valid": None, "why": "presumes that the images of one training are independent trials"}
    return out


def _by_copies(experiment: Experiment, table: ScoreTable) -> Plain:
    """`auc_by_copies`: of the members that are in the training set so many times, against all non-members; nothing without copies."""
    from diffmia_exp import metrics

    if experiment.split.copies is None:
        return {}
    copies, out = experiment.split.copies[experiment.audited], {}
    for number in np.unique(copies[table.is_member]):
        of = ~table.is_member | (copies == number)
        area, interval = metrics.auc(table.is_member[of], table.score[of])
        out[str(number)] = {"auc": area, "auc_ci": list(interval), "n_members": int(table.is_member[of].sum())}
    return {"auc_by_copies": out}


def privacy(experiment: Experiment, table: ScoreTable, training: Plain) -> Plain | None:
    """What the accountant of a differentially private training says of the attacked weights, and what the audit says to that.

    Returns:
        what `training.json` has of it, with `epsilon` and `steps` those of the snapshot if one is attacked; `audited`, the one-run
        audit's lower bound at the same delta, None where it is not valid; and `refuted`, a sentence if that is above epsilon.
        None for a training without an accountant.
    """
    from diffmia_exp import audit

    told = training.get("defense", {})
    if "accountant" not in told:
        return None
    at = {k: v for k, v in told.items() if k != "snapshots"}
    if experiment.snapshot is not None:
        at |= {"epsilon": told["snapshots"][str(experiment.snapshot)], "steps": experiment.snapshot}
    bound = _audited(experiment, table, at["delta"])
    audited = None if isinstance(bound, str) else bound.epsilon
    return at | {"audited": audited, "refuted": None if audited is None else audit.refuted(audited, at["epsilon"])}


def _audited(experiment: Experiment, table: ScoreTable, delta: float) -> Bound | str:
    """The bound of the audit with one training run; why not, where it is not valid."""
    from diffmia_exp import audit

    if experiment.config["split"]["_target_"] != "diffmia_exp.split.bernoulli":
        return "the split did not include every image independently with probability 1/2, as split=bernoulli does"
    if len(table.score) < experiment.split.pool[experiment.target_index].sum():
        return "evaluation.drop_duplicates left out images by their membership"
    images = len(table.score)
    guesses = sorted({max(2, images // share // 2 * 2) for share in AUDIT_SHARES})
    return audit.one_run(table.is_member, table.score, guesses, bernoulli=True, delta=delta, seed=experiment.seed)


def _save_exposed(path: Path, table: ScoreTable, experiment: Experiment) -> None:
    """The members with the highest and the lowest scores, highest first: `sample_id`, `score`, `images`."""
    order = np.argsort(-table.score, kind="stable")
    members = order[table.is_member[order]]
    members = np.concatenate([members[:MOST_EXPOSED], members[MOST_EXPOSED:][-LEAST_EXPOSED:]])
    images = experiment.images.pixels[np.flatnonzero(experiment.audited)[members]]
    np.savez(path, allow_pickle=False, sample_id=table.sample_id[members], score=table.score[members], images=images)


def _epochs(training: Plain, experiment: Experiment) -> float | None:
    if not training:
        return None
    share = 1.0 if experiment.snapshot is None else experiment.snapshot / training["steps"]
    return float(training["epochs"] * share)
