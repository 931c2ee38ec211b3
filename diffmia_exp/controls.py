"""Controls: what an attack's number is worth. Where there is nothing to find, an AUC must be 1/2.

Each control is a table of scores like the attack's own. It fails where 1/2 lies outside the interval of its AUC at VERDICT_LEVEL;
then the split or the attack is unsound, whatever the attack's AUC says.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from diffmia_exp import blind, metrics
from diffmia_exp.attacks.trajectory import Trajectory, prior_bpd
from diffmia_exp.config import Plain
from diffmia_exp.diffusion import Schedule
from diffmia_exp.scores import ScoreTable

if TYPE_CHECKING:
    from diffmia_exp.selection import Candidate
    from diffmia_exp.workshop import Workshop

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

VERDICT_LEVEL = 0.999
"""Level of the interval that decides. The 95% interval, which is shown, misses 1/2 in one of twenty sound controls; at this level
five controls raise a false alarm in at most one of 200 sound runs, and those of ten runs in at most one grid of twenty."""

PERMUTATIONS = 9999

ABOUT = {
    "blind": "a classifier that sees the images and never the model",
    "permuted": "the attack's scores with membership permuted at random; p_value is that of the attack's AUC",
    "untrained": "the same attack on a freshly initialised network",
    "held_out": "the same attack on a model trained on the held-out images instead",
    "prior_bpd": "the variational bound's KL term, which depends on the image and the schedule alone",
    "generated": "the share of generated images that the attack calls members",
}
FAILED = {
    "blind": "the images alone tell members from non-members, so the split is unsound",
    "permuted": "scores with permuted membership are not at 1/2, so the metric is unsound",
    "untrained": "the attack tells them apart on an untrained network, so the split or the attack is unsound",
    "held_out": "the attack calls members on a model that never saw them, so the split or the attack is unsound",
    "prior_bpd": "a score without any model tells members from non-members, so the split is unsound",
}


def run(workshop: Workshop, table: ScoreTable, candidate: Candidate) -> Plain:
    """The controls that `evaluation.controls` names, and what they say of the run.

    Args:
        workshop: of the cell.
        table: the attack's scores on the target.
        candidate: the settings that gave them.

    Returns:
        `controls` by name, `sound` (None where no control gives a verdict), `unsound` (a sentence for each that failed) and
        `verdict_level`.
    """
    e = workshop.experiment
    out: dict[str, Plain] = {}
    for name in e.evaluation.controls:
        if name == "blind":
            if (tested := tested_blindly(workshop)) is not None:
                out[name] = verdict(name, tested)
        elif name == "permuted":
            shuffled = np.random.default_rng(e.seed).permutation(table.is_member)
            out[name] = verdict(name, replace(table, is_member=shuffled)) | {"p_value": p_value(table.is_member, table.score, e.seed)}
        elif name == "prior_bpd":
            if _follows_trajectories(candidate):
                out[name] = verdict(name, replace(table, score=_prior_scores(workshop)))
        elif name == "generated":
            out[name] = called_members(table, workshop.judged_generated(candidate))
        else:
            index = e.untrained if name == "untrained" else e.held_out
            out[name] = verdict(name, replace(table, score=workshop.judged(candidate, index)))
    verdicts = [control["sound"] for control in out.values() if control["sound"] is not None]
    unsound = [f"{name} control: {FAILED[name]} ({_shown(c)})" for name, c in out.items() if c["sound"] is False]
    return {"controls": out, "sound": all(verdicts) if verdicts else None, "unsound": unsound, "verdict_level": VERDICT_LEVEL}


def verdict(name: str, table: ScoreTable) -> Plain:
    """A control's AUC with its 95% interval, and whether the interval at VERDICT_LEVEL agrees with what is expected.

    Expected is 1/2, or at most 1/2 where an honest attack is on the other side: a model trained on the held-out images betrays those.
    """
    area, shown = metrics.auc(table.is_member, table.score)
    low, high = metrics.auc(table.is_member, table.score, VERDICT_LEVEL)[1]
    sound = low <= 0.5 if name == "held_out" else low <= 0.5 <= high
    expected = "at most 1/2" if name == "held_out" else "1/2"
    return {"auc": area, "auc_ci": list(shown), "sound": sound, "expected": expected, "what": ABOUT[name]}


def _shown(control: Plain) -> str:
    return f"AUC {control['auc']:.3f} [{control['auc_ci'][0]:.3f}, {control['auc_ci'][1]:.3f}], expected {control['expected']}"


def p_value(is_member: Mask, score: Floats, seed: int) -> float:
    """One-sided permutation test of AUC <= 1/2: (1 + #{permuted AUC >= AUC}) / (1 + PERMUTATIONS).

    The AUC is an affine function of the members' rank sum, so ranks are permuted and nothing is ranked again.
    """
    # Doubled, midranks are whole numbers and their sums exact.
    ranks, m = np.round(2 * stats.rankdata(score)).astype(np.int64), int(is_member.sum())
    observed, rng = ranks[is_member].sum(), np.random.default_rng([seed, 1])
    reached, chunk = 0, max(1, 4_000_000 // len(ranks))
    for start in range(0, PERMUTATIONS, chunk):
        rows = np.broadcast_to(ranks, (min(chunk, PERMUTATIONS - start), len(ranks)))
        reached += int((rng.permuted(rows, axis=1)[:, :m].sum(1) >= observed).sum())
    return (1 + reached) / (1 + PERMUTATIONS)


def called_members(table: ScoreTable, generated: Floats) -> Plain:
    """Which share of generated images the attack calls members at an FPR of 1% (or the smallest that the non-members resolve)."""
    fpr = max(0.01, 1 / int((~table.is_member).sum()))
    threshold = metrics.tpr_at_fpr(table.is_member, table.score, fpr)["threshold"]
    share = 0.0 if threshold is None else float((generated >= threshold).mean())
    return {"called_members": share, "n": len(generated), "at_fpr": fpr, "sound": None, "what": ABOUT["generated"]}


def _follows_trajectories(candidate: Candidate) -> bool:
    attack: Any = candidate.attack
    while not isinstance(attack, Trajectory) and hasattr(attack, "host"):
        attack = attack.host
    return isinstance(attack, Trajectory)


def _prior_scores(workshop: Workshop) -> Floats:
    e = workshop.experiment
    schedule, pixels = Schedule(e.alphas_cumprod), e.images.pixels[e.audited]
    parts = [torch.from_numpy(pixels[at : at + 1024]).double() / 127.5 - 1 for at in range(0, len(pixels), 1024)]
    return -np.concatenate([prior_bpd(schedule, x).numpy() for x in parts])


def tested_blindly(workshop: Workshop) -> ScoreTable | None:
    """The model-blind classifier's scores, which depend on images and membership alone and are kept for all attacks; None for too few."""
    e = workshop.experiment
    audited, is_member = e.images.where(e.audited), e.keep[e.audited]
    if (fewest := int(min(is_member.sum(), (~is_member).sum()))) < blind.LEAST:
        log.warning("blind control: left out, it needs %d members and as many non-members; there are %d", blind.LEAST, fewest)
        return None
    spec: Plain = {"control": "blind", "classifier": e.evaluation.blind, "images": audited.fingerprint}
    spec |= {"members": e.images.where(e.keep).fingerprint, "seed": e.seed}

    def make(folder: Path) -> None:
        tested, score = blind.classify(audited.pixels, is_member, e.evaluation.blind, e.seed)
        ScoreTable(audited.sample_id[tested], is_member[tested], score).save(folder / "scores.parquet")

    return ScoreTable.load(e.stores["controls"].get_or_make(spec, make) / "scores.parquet")
