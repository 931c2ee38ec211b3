"""What must be equal for runs to be averaged or compared, and in what they differ."""

from __future__ import annotations

from collections.abc import Sequence

from diffmia_exp.config import Plain
from diffmia_exp.report.reading import Run


def comparable(run: Run) -> Plain:
    """What must be equal for two runs to be compared, from the config and the metrics."""
    # In the metrics, a split file stands with its checksum.
    split, training = run.metrics.get("split") or run.group("split"), run.group("training")
    facts = {
        "dataset": run.group("dataset"),
        "split": {k: v for k, v in split.items() if k not in ("name", "n_models", "target_index")},
        "model": run.group("model"),
        "diffusion": run.group("diffusion"),
        "training": {k: v for k, v in training.items() if k != "snapshots"},
        "defense": {k: v for k, v in run.group("defense").items() if k != "_target_"} or {"name": "none"},
        "precision": run.group("trainer").get("precision"),
        "audit": {k: run.group("evaluation").get(k) for k in ("precision", "drop_duplicates")},
        "versions": run.metrics.get("versions") or {},
        "format": "older, lacks " + ", ".join(run.older) if run.older else "current",
    }
    if run.config.get("checkpoint") is not None:  # weights of unknown origin are no repetition of others
        facts["checkpoint"] = run.metrics["train_key"]
    return {name: _without(value, ("_target_",) if name in ("dataset", "training") else ()) for name, value in facts.items()}


def identity(run: Run) -> Plain:
    """What must be equal beside for two runs to be repetitions: attack, threat model, and which weights were attacked."""
    attack = run.group("attack")
    chosen = attack.get("select") == "shadow"
    return {
        "threat_model": run.group("threat_model"),
        "attack": _seedless({k: v for k, v in attack.items() if k not in ("select", "rehearsals", "grid") or chosen}, run.seed),
        "shadow_trainings": run.metrics.get("shadow_trainings", 0),
        "weights": run.metrics.get("weights"),
        "snapshot": run.metrics.get("snapshot"),
        "label": run.label,
    }


def _seedless(settings: Plain, seed: int) -> Plain:
    """Settings without the seeds that follow the run's own."""
    kept = {k: v for k, v in settings.items() if (k, v) != ("seed", seed)}
    return {k: _seedless(v, seed) if isinstance(v, dict) else v for k, v in kept.items()}


def varying(facts: Sequence[Plain]) -> list[dict[str, str]]:
    """Of several nested mappings, the leaves in which they differ, as `group.key: value` for each."""
    leaves = [flat(fact) for fact in facts]
    keys = [key for key in dict.fromkeys(key for f in leaves for key in f) if len({f.get(key, "-") for f in leaves}) > 1]
    return [{key: f.get(key, "-") for key in keys} for f in leaves]


def flat(value: Plain, prefix: str = "") -> dict[str, str]:
    """The leaves of a nested mapping as text, by their path."""
    leaves: dict[str, str] = {}
    for key, child in value.items():
        leaves |= flat(child, f"{prefix}{key}.") if isinstance(child, dict) and child else {f"{prefix}{key}": _said(child)}
    return leaves


def _said(value: object) -> str:
    return "null" if value is None else "-" if value == {} else str(value)


def _without(value: object, keys: tuple[str, ...]) -> object:
    return {k: _without(v, keys) for k, v in value.items() if k not in keys} if isinstance(value, dict) else value
