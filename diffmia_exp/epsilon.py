"""Differential privacy of a run: the epsilon that its scores prove, and the one that an accountant allows."""

from __future__ import annotations

from dataclasses import asdict

from diffmia_exp import audit
from diffmia_exp.audit import Bound
from diffmia_exp.config import Plain
from diffmia_exp.experiment import Experiment
from diffmia_exp.scores import ScoreTable

AUDIT_SHARES = (1, 2, 4, 8, 16)
"""The one-run audit guesses all images, or one in two, .., the surest ones; its bound is corrected for taking the best."""


def bounds(experiment: Experiment, table: ScoreTable, thresholds: dict[str, float | None]) -> Plain:
    """Lower bounds of epsilon at `evaluation.delta`, by name, with `valid` and where need be `why` (not).

    Args:
        experiment: the cell.
        table: its scores.
        thresholds: those chosen on shadows, by FPR.
    """
    delta, bound = experiment.evaluation.delta, _audited(experiment, table, experiment.evaluation.delta)
    if isinstance(bound, str):
        return {"one_run": {"valid": False, "why": bound}}
    out: Plain = {"one_run": asdict(bound) | {"valid": True}}
    if chosen := [threshold for threshold in thresholds.values() if threshold is not None]:
        bound = audit.classical(table.is_member, table.score, chosen, delta=delta)
        out["classical"] = asdict(bound) | {"valid": None, "why": "presumes that the images of one training are independent trials"}
    return out


def accounted(experiment: Experiment, table: ScoreTable, training: Plain) -> Plain | None:
    """What the accountant of a differentially private training says of the attacked weights, and what the audit says to that.

    Returns:
        what `training.json` has of it, with `epsilon` and `steps` those of the snapshot if one is attacked; `audited`, the one-run
        audit's lower bound at the same delta, None where it is not valid; and `refuted`, a sentence if that is above epsilon.
        None for a training without an accountant.
    """
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
    if experiment.config["split"]["_target_"] != "diffmia_exp.split.bernoulli":
        return "the split did not include every image independently with probability 1/2, as split=bernoulli does"
    if len(table.score) < experiment.split.pool[experiment.target_index].sum():
        return "evaluation.drop_duplicates left out images by their membership"
    images = len(table.score)
    guesses = sorted({max(2, images // share // 2 * 2) for share in AUDIT_SHARES})
    return audit.one_run(table.is_member, table.score, guesses, bernoulli=True, delta=delta, seed=experiment.seed)
