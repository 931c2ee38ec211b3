"""Run folders as `results.write` leaves them, with made-up scores instead of a trained model's, so that many take a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diffmia_exp import metrics, runs
from diffmia_exp.scores import ScoreTable
from diffmia_exp.store import digest, sha256
from tests.composing import composed

Plain = dict[str, Any]
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
VERSIONS = {"diffmia_exp": "0.1.0", "torch": "2.13.0"}


def config(attack: str = "pia", threat_model: str = "gray_box", *, seed: int = 0, target_index: int = 0, **settings: Any) -> Plain:
    """The resolved config of a cell; `settings` are `group__key=value`."""
    made = composed("tracking=none")
    made["attack"] |= {"name": attack, "seed": seed}
    made["threat_model"] |= {"name": threat_model, "access": threat_model}
    made |= {"seed": seed, "snapshot": settings.pop("snapshot", None), "name": f"{attack}-{threat_model}-digits-s{seed}"}
    made["split"]["target_index"] = target_index
    for key, value in settings.items():
        *groups, name = key.split("__")
        place = made
        for group in groups:
            place = place[group]
        place[name] = value
    return made


def scores(seed: int, target_index: int, snapshot: int | None, attack: str, effect: float, n: int) -> ScoreTable:
    """Normal scores, members' higher by `effect`; attacks on one target share the images, their membership and half of the noise."""
    shared = np.random.default_rng([seed, target_index])
    is_member = shared.random(n) < 0.5
    is_member[:2] = True, False
    common = shared.normal(size=n)
    own = np.random.default_rng([seed, target_index, snapshot or 0, *attack.encode()]).normal(size=n)
    score = effect * is_member + (common + own) / np.sqrt(2)
    return ScoreTable(np.arange(n) * 3 + 7, is_member, score)


def write(
    folder: Path, cell: Plain, effect: float = 1.5, n: int = 240, versions: Plain | None = None, files: bool = True, **more: Any
) -> Path:
    """A run folder below `folder`, of a cell's config; `more` is added to its metrics. Returns its path."""
    identity = runs.identity(cell)
    seed, target_index, snapshot = cell["seed"], cell["split"]["target_index"], cell["snapshot"]
    table = scores(seed, target_index, snapshot, identity["label"], effect, n)
    key = digest([cell, effect, n, versions, str(more)])
    where = folder / f"{cell['name']}-{key[:8]}"
    where.mkdir(parents=True)
    table.save(where / "scores.parquet")
    (where / "config.yaml").write_text(yaml.dump(cell, sort_keys=False, Dumper=_DUMPER))
    (where / "run.log").write_text("made\n")
    steps = cell["training"]["steps"]
    result = {"status": "done", "name": where.name} | identity
    result |= metrics.evaluate(table.is_member, table.score, (0.1, 0.01, 0.001))
    result |= {"nfe_per_image": 2.0, "seconds": 0.2, "shadow_trainings": 0, "weights": "ema", "snapshot": snapshot, "selection": {}}
    result |= {"train_key": digest([seed, target_index, cell["training"]]), "run_key": key, "epochs": 500.0 * (snapshot or steps) / steps}
    result |= {"parameters": 1000, "duplicates_across_split": 0, "scores_sha256": sha256(where / "scores.parquet")}
    result |= {"versions": versions or VERSIONS} | more
    (where / "metrics.json").write_text(json.dumps(result, indent=1))
    if files:
        _pictures(where, table)
    return where


def _pictures(where: Path, table: ScoreTable) -> None:
    members = np.flatnonzero(table.is_member)
    order = members[np.argsort(-table.score[members])]
    shown = np.concatenate([order[:12], order[-12:]])
    images = np.random.default_rng(0).integers(0, 255, (int(table.sample_id.max()) + 1, 1, 8, 8), dtype=np.uint8)[table.sample_id[shown]]
    np.savez(where / "exposed.npz", sample_id=table.sample_id[shown], score=table.score[shown], images=images)
    np.savez(
        where / "near_copies.npz", generated=images[:3], training=images[:3], sample_id=table.sample_id[shown[:3]], ratio=[0.3, 0.1, 0.2]
    )


def controls(sound: bool = True) -> Plain:
    """What the controls of a run add to its metrics."""
    blind = {"auc": 0.51 if sound else 0.93, "auc_ci": [0.44, 0.58] if sound else [0.9, 0.96], "sound": sound, "expected": "1/2"}
    generated = {"called_members": 0.4, "n": 64, "at_fpr": 0.01, "sound": None, "what": "share of generated images"}
    return {
        "controls": {"blind": blind | {"what": "a classifier that never sees the model"}, "generated": generated},
        "sound": sound,
        "unsound": [] if sound else ["blind control: the images alone tell members from non-members, so the split is unsound"],
        "epsilon": {
            "one_run": {"epsilon": 1.25, "delta": 1e-5, "confidence": 0.95, "guesses": 100, "correct": 88, "valid": True, "why": None},
            "classical": {"epsilon": 0.8, "delta": 1e-5, "confidence": 0.95, "valid": True},
        },
        "memorisation": {"n_generated": 64, "near_copies": 3},
    }


def sweep(outputs: Path) -> Path:
    """34 runs of nine attacks, three data sets, seeds and snapshots, and beside them what can go wrong. Returns `outputs`."""
    folder, cells = outputs / "runs", outputs / "sweeps" / "grid-1"
    attacks = {"gray_box": ("loss", "pia", "pian", "sima", "secmi", "multi_loss"), "white_box": ("gsa2", "loss"), "samples_only": ("knn",)}
    n = 0
    for seed in (0, 1):
        for threat_model, names in attacks.items():
            for place, attack in enumerate(names):
                cell, effect = config(attack, threat_model, seed=seed), 0.4 * place + 0.2
                cost = {"nfe_per_image": float(10**place), "shadow_trainings": 8 if attack == "gsa2" else 0, "seconds": 0.5 + place}
                where = write(folder, cell, effect, **cost, **controls())
                _status(
                    cells, n := n + 1, {"status": "done", "cached": False, "overrides": f"attack={attack} seed={seed}", "run": where.name}
                )
    for snapshot in (100, 200, 400):
        for attack in ("loss", "pia", "secmi"):
            write(folder, config(attack, seed=0, snapshot=snapshot), snapshot / 500)
    for dataset in ("cifar10", "fashion_mnist"):
        for seed in (0, 1, 2):
            write(
                folder, config("pia", seed=seed, dataset__name=dataset, name=f"pia-gray_box-{dataset}-s{seed}"), 0.1, **controls(seed > 0)
            )
    write(folder, config("loss", threat_model="gray_box", seed=5), 0.5, versions={"diffmia_exp": "0.0.9"})
    _status(cells, n + 1, {"status": "failed", "overrides": "attack=lira", "error": "split.n_models=1: must be at least 3"})
    (cells / str(n + 2)).mkdir()
    (cells / "multirun.yaml").write_text("{}")
    skipped = folder / "gsa2-gray_box-digits-s0-00000000"
    skipped.mkdir()
    (skipped / "metrics.json").write_text(json.dumps({"status": "not applicable", "reason": "attack=gsa2 needs white_box access"}))
    (folder / ".pia-gray_box-digits-s0-1234.0123abcd.tmp").mkdir()
    return outputs


def _status(cells: Path, n: int, status: Plain) -> None:
    (cells / str(n)).mkdir(parents=True)
    (cells / str(n) / "status.json").write_text(json.dumps(status))
