"""The study in words and numbers: Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np

from diffmia_exp.report.drawing import interval
from diffmia_exp.study.drawing import MEASURES, budget, figures
from diffmia_exp.study.factors import Factor, effects


def to_markdown(found: Sequence[Factor]) -> str:
    """Per factor the AUC at every value, and the differences."""
    parts = []
    for factor in found:
        parts.append(f"## {factor.name} (`{factor.key}`)\n")
        parts += [f"![{drawn.alt}](figures/{drawn.key}.png)\n\n{drawn.caption}\n" for drawn in figures(factor)]
        values = list(dict.fromkeys(level.text for levels in factor.attacks.values() for level in levels))
        parts.append(f"| attack, by {factor.axis} | {' | '.join(values)} |\n|{'---|' * (len(values) + 1)}")
        for attack, levels in factor.attacks.items():
            at = {level.text: interval(level.auc) for level in levels}
            parts.append(f"| {attack} | {' | '.join(at.get(value, '') for value in values)} |")
        for measure, called in MEASURES.items():
            if worth := factor.worth(measure):
                told = ["" if (w := worth.get(value)) is None else f"{w[0]:.3g} [{w[1]:.3g}, {w[2]:.3g}]" for value in values]
                parts.append(f"| *{called}* | {' | '.join(told)} |")
        parts.append("")
        for e in effects(factor):
            how = "the same targets" if e.paired else "Welch"
            said = f"{e.difference[0]:+.3f} [{e.difference[1]:+.3f}, {e.difference[2]:+.3f}], {how}" if e.difference else "one target only"
            parts.append(f"- {e.attack}, {e.before.text} → {e.after.text}: {said}")
        parts.append("")
    if drawn := budget(found):
        parts.append(f"## budget\n\n![{drawn.alt}](figures/{drawn.key}.png)\n\n{drawn.caption}\n")
        parts.append(f"| {' | '.join(drawn.columns)} |\n|{'---|' * len(drawn.columns)}")
        parts += [f"| {' | '.join(map(str, row))} |" for row in drawn.rows] + [""]
    return "\n".join(parts)


def to_csv(found: Sequence[Factor]) -> str:
    """A line for each factor, attack and value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    worth = [f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high")]
    writer.writerow(("factor", "key", "attack", "value", "targets", "auc", "auc_low", "auc_high", *worth, "learned"))
    for factor in found:
        for attack, levels in factor.attacks.items():
            for level in levels:
                known = [f"{v:.6g}" for measure in MEASURES for v in level.utility(measure) or (np.nan,) * 3]
                aucs = [f"{v:.4f}" for v in level.auc]
                writer.writerow((factor.name, factor.key, attack, level.text, len(level.runs), *aucs, *known, level.learned))
    return out.getvalue()
