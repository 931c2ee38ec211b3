"""What a run folder says of its cell: scores, figures, and in metrics.json every number with its controls, settings and cost."""

from __future__ import annotations

import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

from diffmia_exp import __version__, controls, epsilon, figures, metrics, selection, specs
from diffmia_exp.config import Plain
from diffmia_exp.experiment import Experiment
from diffmia_exp.runs import Result, identity
from diffmia_exp.scores import ScoreTable
from diffmia_exp.store import sha256
from diffmia_exp.workshop import Workshop

log = logging.getLogger(__name__)

MOST_EXPOSED, LEAST_EXPOSED = 32, 16
"""Members that exposed.npz shows."""

LIBRARIES = ("torch", "pytorch-lightning", "diffusers", "numpy", "scikit-learn")


def write(folder: Path, name: str, workshop: Workshop) -> Result:
    """Write everything that a run folder holds; metrics.json comes last."""
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
    found, private = controls.run(workshop, table, chosen), epsilon.accounted(experiment, table, training)
    if private and private["refuted"]:
        found |= {"sound": False, "unsound": [private["refuted"], *found["unsound"]]}
    result = Result(
        {"status": "done", "name": name}
        | identity(config)
        | specs.comparable(experiment)
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
            "epsilon": epsilon.bounds(experiment, table, facts["selection"].get("thresholds", {})),
            "transfer": selection.transferred(table.is_member, table.score, facts["selection"].get("thresholds", {})),
            "train_key": specs.key(experiment, experiment.target_index),
            "run_key": specs.run_key(experiment),
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


def _by_copies(experiment: Experiment, table: ScoreTable) -> Plain:
    """`auc_by_copies`: of the members that are in the training set so many times, against all non-members; nothing without copies."""
    if experiment.split.copies is None:
        return {}
    copies, out = experiment.split.copies[experiment.audited], {}
    for number in np.unique(copies[table.is_member]):
        of = ~table.is_member | (copies == number)
        area, interval = metrics.auc(table.is_member[of], table.score[of])
        out[str(number)] = {"auc": area, "auc_ci": list(interval), "n_members": int(table.is_member[of].sum())}
    return {"auc_by_copies": out}


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
