"""The study's figures: AUC along a factor, privacy against utility, and every attack against what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffmia_exp.config import Plain
from diffmia_exp.report.collect import Collection
from diffmia_exp.report.drawing import DASHES, MUTED, SERIES, Figure, interval, sheet, three
from diffmia_exp.report.groups import access, grouped
from diffmia_exp.report.reading import Run
from diffmia_exp.report.settings import flat, identity
from diffmia_exp.store import digest
from diffmia_exp.study.factors import Factor, Level

MEASURES = {"kid": "KID", "loss_heldout": "loss on held-out images"}
"""Measures of utility that a front is drawn of, less being better."""

APART = 10
"""A value so many times worse than the median needs an axis that shows small and large ones."""

BUDGET = ("threat_model", "noises", "variations")
"""Factors whose attacks are also drawn against the model evaluations they cost."""


def figure(factor: Factor) -> Figure:
    """AUC along the factor, with intervals over targets; of many attacks, of the strongest at each value and then the strongest of all."""
    at_values: dict[str, dict[str, float]] = {}
    for attack, levels in sorted(factor.attacks.items(), key=lambda of: -len(of[1])):  # those that know all values first
        for level in levels:
            at_values.setdefault(level.text, {})[attack] = level.auc[0]
    strongest = {max(at, key=lambda attack: at[attack]) for at in at_values.values()}
    best = sorted(factor.attacks, key=lambda attack: (attack not in strongest, -max(level.auc[0] for level in factor.attacks[attack])))
    shown = {attack: factor.attacks[attack] for attack in best[: len(SERIES)]}
    values = [
        {"s": attack, "x": level.number if factor.numeric else level.text, "auc": level.auc[0], "low": level.auc[1], "high": level.auc[2]}
        | {"tip": f"{attack}, {factor.axis} {level.text}: AUC {interval(level.auc)}, {len(level.runs)} targets"}
        for attack, levels in shown.items()
        for level in levels
    ]
    x: Plain = {"field": "x", "title": factor.axis}
    if factor.numeric:
        at = [level.number or 0.0 for levels in shown.values() for level in levels]
        wide = min(at) > 0 and max(at) >= 8 * min(at)
        x |= {"type": "quantitative", "scale": {"type": "log" if wide else "linear", "nice": False, "zero": False, "padding": 10}}
        x |= {"axis": {"grid": False, "values": sorted(set(at)), "format": ".6~g", "labelOverlap": True}}
    else:
        x |= {"type": "nominal", "sort": list(at_values), "axis": {"labelAngle": -30}}
    y = {"field": "auc", "type": "quantitative", "title": "AUC", "scale": {"zero": False, "nice": True}}
    names = list(shown)
    kind, legend = {"field": "s", "type": "nominal"}, {"symbolType": "stroke", "symbolSize": 500}
    colour = kind | {"scale": {"domain": names, "range": list(SERIES)}, "legend": legend}
    dash = kind | {"scale": {"domain": names, "range": list(DASHES)}, "legend": legend}
    offset = {} if factor.numeric else {"xOffset": kind}
    layers: list[Plain] = [
        {"mark": {"type": "rule", "color": MUTED, "strokeDash": [3, 3]}, "encoding": {"y": {"datum": 0.5, "type": "quantitative"}}},
        {"mark": {"type": "rule", "strokeWidth": 2}}
        | {"encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour, **offset}},
        {"mark": {"type": "point", "filled": True, "size": 55, "opacity": 1}}
        | {"encoding": {"x": x, "y": y, "color": colour, "description": {"field": "tip"}, **offset}},
    ]
    if factor.numeric:
        layers.insert(2, {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"x": x, "y": y, "color": colour, "strokeDash": dash}})
    alt = f"AUC along {factor.axis}; " + "; ".join(
        f"{attack} from {levels[0].auc[0]:.3f} at {levels[0].text} to {levels[-1].auc[0]:.3f} at {levels[-1].text}"
        for attack, levels in shown.items()
    )
    rows = [[a, level.text, len(level.runs), *map(three, level.auc)] for a, levels in factor.attacks.items() for level in levels]
    more = f" {len(best) - len(shown)} weaker attacks are in the table only." if len(best) > len(shown) else ""
    caption = f"Mean AUC over targets with 95% intervals; the dashed line is chance.{more}"
    columns = ("attack", factor.axis, "targets", "AUC", "low", "high")
    return Figure(factor.name, f"AUC along {factor.axis}", caption, alt + ".", sheet(values, 260, layers, {}), columns, rows)


def figures(factor: Factor) -> list[Figure]:
    """Every figure that a factor's runs give reason to draw."""
    traded = not factor.numeric or factor.key.startswith("defense.")
    fronts = [front(factor, measure) for measure in MEASURES if traded and factor.worth(measure)]
    return [figure(factor), *(drawn for drawn in fronts if drawn)]


def budget(found: Sequence[Factor]) -> Figure | None:
    """Every attack against the model evaluations that it asks for; None where the parts that tell were not run.

    What more noises or variations buy is seen too, and an attack is shown with the least access under which it was run.
    """
    runs = [run for f in found if f.name in BUDGET for levels in f.attacks.values() for level in levels for run in level.runs]
    once: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: access(str(run.metrics["threat_model"]))):
        once.setdefault(digest(flat(identity(run) | {"threat_model": None, "target": run.target, "images": run.images})), run)
    if not once:
        return None
    rows = sorted(grouped(Collection(list(once.values())))[0].final, key=lambda row: (row.mean("nfe_per_image"), -row.auc[0]))
    title = "model evaluations per image"
    points = [
        {"name": f"{row.name}, {row.threat_model}", "x": row.mean("nfe_per_image"), "auc": row.auc}
        | {"tip": f"{row.name}, {row.threat_model}: AUC {interval(row.auc)}, {row.mean('nfe_per_image'):.4g} {title}"}
        for row in rows
    ]
    x = {"title": title, "scale": {"type": "log", "nice": False, "padding": 16}, "axis": {"format": "~s", "tickCount": 5, "grid": False}}
    caption = (
        "Mean AUC over targets with 95% intervals; the dashed line is chance. Numbers grow with the evaluations, then fall with the AUC."
    )
    alt = f"AUC against {title}; " + "; ".join(str(point["tip"]) for point in points) + "."
    table = [[row.name, row.threat_model, f"{row.mean('nfe_per_image'):.4g}", *map(three, row.auc)] for row in rows]
    columns = ("attack", "threat model", title, "AUC", "low", "high")
    return Figure("budget", f"AUC against {title}", caption, alt, _numbered(points, x, "AUC"), columns, table)


def front(factor: Factor, measure: str = "kid") -> Figure | None:
    """What every value of a factor betrays against what its models are worth; None where utility was not measured.

    A value lies at the mean AUC of the attack that is strongest on average, so that a defence is not praised for failing one attack.
    """
    strongest: dict[str, tuple[str, Level]] = {}
    for attack, levels in factor.attacks.items():
        for level in levels:
            if level.value not in strongest or level.auc[0] > strongest[level.value][1].auc[0]:
                strongest[level.value] = attack, level
    points: list[Plain] = []
    rows = []
    for attack, level in strongest.values():
        if (worth := level.utility(measure)) is None:
            return None
        name = level.text + ("" if level.learned else " (not learned)")
        points.append(
            {"name": name, "x": worth[0], "ends": worth[1:], "auc": level.auc, "cross": not level.learned}
            | {"tip": f"{name}: AUC {interval(level.auc)} by {attack}; {measure} {worth[0]:.3g}"}
        )
        rows.append([name, attack, *map(three, level.auc), *(f"{v:.4g}" for v in worth)])
    x: Plain = {"title": MEASURES[measure], "scale": {"zero": False, "nice": True, "padding": 12}, "axis": {"grid": False, "tickCount": 6}}
    far = max(point["x"] for point in points)
    if far > 0 and far > APART * float(np.median([point["x"] for point in points])):  # else the others lie on top of each other
        x["scale"] = {"type": "symlog", "constant": far / 100, "nice": False, "padding": 12}
        steps = [f * 10.0 ** (np.floor(np.log10(far)) - down) for down in (2, 1, 0) for f in (1, 3)]
        x["axis"] |= {"values": [0.0, *(float(step) for step in steps if step <= far)], "format": ".1~g"}
    alt = f"AUC of the strongest attack against {MEASURES[measure]}; " + "; ".join(str(point["tip"]) for point in points) + "."
    caption = "Lower left is better. Means over targets with 95% intervals; a cross marks models that have not learned."
    columns = (factor.key, "strongest attack", "AUC", "low", "high", measure, "low", "high")
    key, spec = f"{factor.name}-{measure}", _numbered(points, x, "AUC of the strongest attack")
    return Figure(key, f"AUC against {MEASURES[measure]}", caption, alt, spec, columns, rows)


def _numbered(points: Sequence[Plain], x: Plain, y_title: str) -> Plain:
    """Points with the intervals of their AUC, and of x where they have `ends`; numbered, for they lie close together."""
    values: list[Plain] = []
    for n, point in enumerate(points, 1):
        left, right = point.get("ends", (point["x"], point["x"]))
        auc, low, high = point["auc"]
        values.append(
            {"n": str(n), "left_side": n % 2 == 0, "s": f"{n}  {point['name']}", "tip": point["tip"], "cross": point.get("cross", False)}
            | {"x": point["x"], "left": left, "right": right, "auc": auc, "low": low, "high": high}
        )
    x = {"field": "x", "type": "quantitative"} | x
    y: Plain = {"field": "auc", "type": "quantitative", "title": y_title, "scale": {"zero": False, "nice": True}}
    shape = {"field": "cross", "type": "nominal", "legend": None, "scale": {"domain": [False, True], "range": ["circle", "cross"]}}
    bar = {"type": "rule", "strokeWidth": 1.5, "color": SERIES[0], "opacity": 0.35}
    called = [v["s"] for v in values]  # names stand in the legend
    colour = {"field": "s", "type": "nominal", "legend": {"symbolSize": 0, "columns": 2}}
    colour |= {"scale": {"domain": called, "range": [SERIES[0]] * len(called)}}
    layers: list[Plain] = [
        {"mark": {"type": "rule", "color": MUTED, "strokeDash": [3, 3]}, "encoding": {"y": {"datum": 0.5, "type": "quantitative"}}},
        {"mark": dict(bar), "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}}},
        {"mark": dict(bar), "encoding": {"x": x | {"field": "left"}, "x2": {"field": "right"}, "y": y}},
        {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}}
        | {"encoding": {"x": x, "y": y, "color": colour, "shape": shape, "description": {"field": "tip"}}},
    ]
    for side, align, dx in ((False, "left", 5), (True, "right", -5)):
        where = [{"filter": f"datum.left_side == {str(side).lower()}"}]
        text = {"mark": {"type": "text", "align": align, "dx": dx, "dy": -7}, "encoding": {"x": x, "y": y, "text": {"field": "n"}}}
        layers.append({"transform": where, **text})
    return sheet(values, 300, layers, {})
