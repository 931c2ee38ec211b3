"""The leaderboard for other programs and for papers: CSV with every digit, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from diffmia_exp.report.collect import Collection
from diffmia_exp.report.drawing import interval
from diffmia_exp.report.groups import Estimate, Group, Row

FPRS = ("0.1", "0.01", "0.001", "0.0001")
UTILITY = ("kid", "fid", "precision", "recall", "loss_heldout", "learned")
VERDICTS = {True: "sound", False: "unsound", None: "not checked"}
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {c: f"\\{c}" for c in "&%$#_{}"}


def to_csv(groups: Sequence[Group]) -> str:
    """One line per attack, threat model and snapshot; an unresolvable TPR is empty."""
    lines = [line(group, row) for group in groups for row in group.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0] if lines else ("group",), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def line(group: Group, row: Row) -> dict[str, Any]:
    """A line of the leaderboard, every number in full; None where a TPR is unresolvable."""
    start = {
        "group": group.letter,
        "dataset": group.dataset,
        "experiment": group.title,
        "attack": row.label,
        "settings": row.settings,
        "threat_model": row.threat_model,
        "snapshot": row.snapshot,
        "epochs": row.epochs,
        "runs": len(row.runs),
        "seeds": " ".join(dict.fromkeys(str(run.seed) for run in row.runs)),
        **_three("auc", row.auc),
    }
    for fpr in FPRS:
        start |= _three(f"tpr_at_{fpr}_fpr", row.tpr(fpr))
    cost = {key: row.mean(key) for key in ("nfe_per_image", "shadow_trainings", "seconds")}
    worth = {key: _mean([run.metrics["utility"].get(key) for run in row.runs if run.metrics.get("utility")]) for key in UTILITY}
    private = {"epsilon_accounted": _mean([run.metrics["privacy"].get("epsilon") for run in row.runs if run.metrics.get("privacy")])}
    return start | cost | worth | private | {"controls": VERDICTS[row.sound], "unsound": "; ".join(row.unsound)}


def _mean(values: Sequence[Any]) -> float | None:
    """Mean of what is known; None for nothing."""
    known = [float(value) for value in values if isinstance(value, int | float)]
    return sum(known) / len(known) if known else None


def _three(name: str, value: Estimate | None) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), value or (None, None, None), strict=True))


def to_markdown(found: Collection, groups: Sequence[Group]) -> str:
    """A table per group, and what is not among the results."""
    parts = []
    for group in groups:
        lines = [f"### {group.letter}: {_plain(group.title)}" if len(groups) > 1 else f"### {_plain(group.title)}", ""]
        lines += [f"**Unsound:** {_plain(why)}\n" for why in dict.fromkeys(why for row in group.final for why in row.unsound)]
        lines.append(
            "| attack | threat model | runs | AUC [95% interval] | TPR at 1% FPR | evaluations per image | models trained | controls |"
        )
        lines.append("|---|---|---|---|---|---|---|---|")
        lines += ["| " + " | ".join(map(_plain, _cells(row))) + " |" for row in group.rows]
        lines += _worth(group)
        parts.append("\n".join(lines))
    if found.notes:
        lines = ["### Not among the results, or with a reservation", ""]
        lines += [f"- {note.kind}: {_plain(note.where)}: {_plain(note.why)}" for note in found.notes]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _worth(group: Group) -> list[str]:
    """A line on the models' utility and one on their accounted privacy, where these are known; each model counts once."""
    models = {run.target: run.metrics for row in group.final for run in row.runs if run.metrics.get("utility")}
    lines = []
    if models:
        means = {key: _mean([m["utility"].get(key) for m in models.values()]) for key in UTILITY}
        told = ", ".join(f"{key} {value:.3g}" for key, value in means.items() if value is not None and key != "learned")
        learned = sum(m["utility"].get("learned") is True for m in models.values())
        lines += ["", f"Utility, mean of {len(models)} models: {told}; {learned} of them have learned."]
    private = [run.metrics["privacy"] for row in group.final for run in row.runs if run.metrics.get("privacy")]
    if private:
        audited = [p["audited"] for p in private if p.get("audited") is not None]
        least = f"; the audit proves {max(audited):.3g} at most" if audited else ""
        lines += ["", f"Differential privacy: the accountant's epsilon is {max(p['epsilon'] for p in private):.3g}{least}."]
    return lines


def to_latex(found: Collection, groups: Sequence[Group]) -> str:
    """A booktabs table per group; what is not among the results stands in comments."""
    parts = ["% needs \\usepackage{booktabs}"]
    parts += [f"% {note.kind}: {note.where}: {note.why}".replace("\n", " ") for note in found.notes]
    for group in groups:
        parts += ["", f"% {group.letter}: {group.title}", r"\begin{tabular}{llrrrrrl}", r"\toprule"]
        parts.append(r"attack & threat model & runs & AUC & TPR at 1\% FPR & evaluations & models trained & controls \\ \midrule")
        before = None
        for row in group.rows:
            if before not in (None, row.threat_model):
                parts.append(r"\midrule")
            before = row.threat_model
            parts.append(" & ".join(map(_tex, _cells(row))) + r" \\")
        parts += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(parts) + "\n"


def _cells(row: Row) -> list[str]:
    tpr = row.tpr("0.01")
    cost = [f"{row.mean('nfe_per_image'):.4g}", f"{row.mean('shadow_trainings'):.4g}"]
    shown = interval(tpr) if tpr else "unresolvable"
    return [row.name, row.threat_model, str(len(row.runs)), interval(row.auc), shown, *cost, VERDICTS[row.sound]]


def _plain(text: str) -> str:
    """Text that Markdown takes literally."""
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", " ".join(text.split())) if re.search(r"[\\`*<|#]", text) else " ".join(text.split())


def _tex(text: str) -> str:
    return "".join(SPECIAL.get(c, c) for c in text)
