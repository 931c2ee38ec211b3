"""What a report says of each group of runs: the same for the page and for W&B."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffmia_exp.config import Plain
from diffmia_exp.report import evidence, figures, pictures
from diffmia_exp.report.collect import Collection, Note
from diffmia_exp.report.drawing import number
from diffmia_exp.report.groups import Group, Row, estimate, target_runs
from diffmia_exp.report.settings import varying

SHOWN = 12
"""Most and least exposed images, and near-copies, at most."""

ACCOUNT = ("epsilon", "delta", "accountant", "noise_multiplier", "audited", "refuted")
"""What is said of a differentially private training, as in the metrics."""

KINDS = ("failed", "damaged", "unfinished", "not applicable", "counted once", "older format", "nothing here")
"""What is not among the results, in the order of the page."""


def of(group: Group, found: Collection) -> Plain:
    """What is said of a group, under the names that the page's template uses. Pictures that cannot be read are noted."""
    on = target_runs(group)[0][1]
    agree = evidence.agreement(on)
    kept = pictures.exposed(group, found)
    exposed = evidence.exposure(group, kept)
    measured = {"attacks": len(group.final), "targets": len({run.target for row in group.final for run in row.runs})}
    return {
        "group": group,
        "figures": figures.of(group, agree),
        "verdicts": [_verdict(group, tm) for tm in group.threat_models],
        "controls": _controls(group),
        "comparisons": evidence.comparisons(on),
        "epsilons": _epsilons(group),
        "accounts": _accounts(group),
        "copies": _copies(group),
        "cdi": evidence.set_level(on),
        "most": exposed[:SHOWN],
        "least": exposed[SHOWN:][-SHOWN:][::-1],
        "pictured": any(e.pixels is not None for e in exposed[:SHOWN]),
        "measured": measured,
        "memorisation": _memorisation(group, found),
        "utility": _utility(group),
        "common": {k: v for k, v in group.facts.items() if k not in ("versions", "format")},
        "versions": group.facts["versions"],
    }


def _verdict(group: Group, threat_model: str) -> Plain:
    rows = group.under(threat_model)
    best = rows[0]
    unsound = list(dict.fromkeys(why for row in rows for why in row.unsound))
    said = "above chance" if best.auc[1] > 0.5 else "not told from chance" if best.auc[2] >= 0.5 else "below chance"
    return {"threat_model": threat_model, "row": best, "of": len(rows), "said": said, "sound": _joint(rows), "unsound": unsound} | {
        "over_targets": evidence.over_targets(best)
    }


def _joint(rows: Sequence[Row]) -> bool | None:
    verdicts = [row.sound for row in rows]
    return False if False in verdicts else rows[0].sound


def _controls(group: Group) -> Plain:
    """Controls as a table: one line per attack, one column per control; a cell holds the worst run."""
    names: dict[str, str] = {}
    lines = []
    for row in group.final:
        cells: dict[str, Plain] = {}
        for run in row.runs:
            for name, control in (run.metrics.get("controls") or {}).items():
                names.setdefault(str(name), str(control.get("what", "")))
                if name not in cells or control.get("sound") is False:
                    cells[str(name)] = control
        if cells:
            lines.append((row, cells))
    return {"names": names, "lines": lines}


def _epsilons(group: Group) -> list[Plain]:
    """Lower bounds of epsilon: one line per attack and kind of bound, with that of each run."""
    lines = []
    for row in group.final:
        found = [run.metrics.get("epsilon") or {} for run in row.runs]
        for bound in dict.fromkeys(name for bounds in found for name in bounds):
            of = [bounds[bound] for bounds in found if bound in bounds]
            guessed = [f"{number(b.get('correct'))} of {number(b['guesses'])}" for b in of if b.get("guesses") is not None]
            verdicts = [b.get("valid") for b in of]
            line = {
                "row": row,
                "bound": str(bound),
                "epsilon": ", ".join(number(b.get("epsilon")) for b in of),
                "guesses": ", ".join(guessed),
            }
            line |= {"delta": of[0].get("delta"), "confidence": of[0].get("confidence")}
            line |= {
                "valid": False if False in verdicts else verdicts[0],
                "whys": list(dict.fromkeys(b["why"] for b in of if b.get("why"))),
            }
            lines.append(line)
    return lines


def _accounts(group: Group) -> list[Plain]:
    """What accountants of differentially private trainings say, and what the audit by each attack says to that: one line per run."""
    told = [(row, run, run.metrics.get("privacy") or {}) for row in group.final for run in row.runs]
    return [{"row": row, "run": run, **{key: at.get(key) for key in ACCOUNT}} for row, run, at in told if at]


def _copies(group: Group) -> Plain:
    """AUC of the members that were in the training set so many times: one line per attack, one column per number of copies."""
    lines = []
    for row in group.final:
        by = [run.metrics.get("auc_by_copies") or {} for run in row.runs]
        numbers = dict.fromkeys(number for groups in by for number in groups)
        of = {number: [groups[number] for groups in by if number in groups] for number in numbers}
        if of:
            lines.append((row, {number: estimate([at["auc"] for at in found], found[0]["auc_ci"]) for number, found in of.items()}))
    return {"numbers": sorted({number for _, cells in lines for number in cells}, key=lambda n: (len(n), n)), "lines": lines}


def _memorisation(group: Group, found: Collection) -> list[Plain]:
    """Near-copies among the generated images of each target, as pairs of images; most copied first."""
    seen: dict[object, Plain] = {}
    for row in group.rows:
        for run in row.runs:
            if run.target in seen or not run.metrics.get("memorisation"):
                continue
            pairs = pictures.near_copies(run, found)[:SHOWN]
            seen[run.target] = {"run": run, "numbers": run.metrics["memorisation"], "pairs": pairs}
    return list(seen.values())


def _utility(group: Group) -> list[Plain]:
    """The utility of each target, in each feature space in which it was measured."""
    seen: dict[object, Plain] = {}
    for row in group.rows:
        for run in row.runs:
            if numbers := run.metrics.get("utility"):
                seen.setdefault((run.target, str(run.config.get("utility"))), {"run": run, "numbers": numbers})
    return list(seen.values())


def separating(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """The settings in which groups differ, with each group's value."""
    differing = varying([group.facts for group in groups])
    return [(key, [values[key] for values in differing]) for key in (differing[0] if differing else {})]


def ordered(notes: Iterable[Note]) -> list[Note]:
    """What is not among the results, by its kind."""
    return sorted(notes, key=lambda note: KINDS.index(note.kind))
