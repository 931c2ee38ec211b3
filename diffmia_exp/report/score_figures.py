"""The figures of scores: histograms of members and non-members, and which members attacks find."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffmia_exp.config import Plain
from diffmia_exp.report.drawing import HEAT, SERIES, Figure, sheet, short
from diffmia_exp.report.evidence import AGREEING, Agreement
from diffmia_exp.report.groups import Row, names


def histograms(rows: Sequence[Row]) -> Figure:
    """Scores of members and non-members, one panel per attack, of its first run."""
    values, table, called = [], [], names(rows)
    for row, name in zip(rows, called, strict=True):
        scores = row.first.table
        low, high = np.quantile(scores.score, [0.005, 0.995])
        edges = np.linspace(low, high if high > low else low + 1, 31)
        for mask, kind in ((scores.is_member, "members"), (~scores.is_member, "non-members")):
            counts = np.histogram(np.clip(scores.score[mask], edges[0], edges[-1]), edges)[0] / mask.sum()
            heights = [*counts, counts[-1]]
            values += [{"s": name, "kind": kind, "x": short(x), "share": short(h)} for x, h in zip(edges, heights, strict=True)]
            table.append([name, kind, *(f"{q:.4g}" for q in np.quantile(scores.score[mask], [0.25, 0.5, 0.75]))])
    kinds = {"field": "kind", "type": "nominal", "scale": {"domain": ["members", "non-members"], "range": [SERIES[1], SERIES[0]]}}
    step = {"interpolate": "step-after"}
    panel = {
        "width": 150,
        "height": 80,
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "title": None,
                "axis": {"tickCount": 3, "grid": False},
                "scale": {"zero": False, "nice": False},
            },
            "y": {"field": "share", "type": "quantitative", "axis": None, "stack": None},
            "color": kinds,
        },
        "layer": [
            {"mark": {"type": "area", "opacity": 0.25, "aria": False, **step}},
            {"mark": {"type": "line", "strokeWidth": 1.5, "aria": False, **step}},
        ],
    }
    facet = {"field": "s", "type": "nominal", "sort": called}
    spec = {"data": {"values": values}, "facet": facet, "columns": 2, "spec": panel, "spacing": {"row": 14, "column": 24}}
    spec |= {"resolve": {"scale": {"x": "independent", "y": "independent"}}}
    alt = f"Histograms of the scores of members and non-members for {', '.join(called)}."
    caption = "Higher scores look more like members. The outer 1% is drawn at the edges; each panel has its own scale."
    columns = ("attack", "images", "lower quartile", "median", "upper quartile")
    return Figure("histogram", "Scores of members and non-members", caption, alt, spec, columns, table)


def overlap(agree: Agreement) -> Figure:
    """Which members two attacks both find, for every pair."""
    called = names(agree.rows)
    values, table = [], []
    for a, first in enumerate(called):
        for b, second in enumerate(called):
            both, either = agree.both(a, b)
            share = both / either if either else None
            said = f"{both} of {either} found by either are found by both"
            text = "" if share is None else f"{share:.2f}".removeprefix("0")
            values.append({"a": first, "b": second, "share": share, "text": text, "tip": f"{first} and {second}: {said}"})
            if a < b:
                table.append([first, second, both, either, f"{agree.correlation[a, b]:.2f}"])
    axis = {"title": None, "labelLimit": 110, "labelFontSize": 11, "ticks": False, "domain": False}
    x = {"field": "a", "type": "nominal", "sort": called, "axis": axis | {"labelAngle": -60, "orient": "top"}}
    y = {"field": "b", "type": "nominal", "sort": called, "axis": axis}
    opacity = {"field": "share", "type": "quantitative", "scale": {"domain": [0, 1], "range": [0.05, 0.7]}, "legend": None}
    side = min(290, 40 * len(called))
    layers: list[Plain] = [{"mark": {"type": "rect", "color": HEAT}, "encoding": {"opacity": opacity, "description": {"field": "tip"}}}]
    if len(called) <= 10:
        layers.append({"mark": {"type": "text", "fontSize": 11}, "encoding": {"text": {"field": "text"}}})
    spec = sheet(values, side, layers, {"x": x, "y": y}) | {"width": side}
    caption = f"Share of the members found by either attack that both find, at {agree.fpr:.0%} FPR on one target."
    caption += f" 1 where they find the same; at most {AGREEING} attacks, strongest first."
    alt = f"For every pair of {len(called)} attacks, the share of the members found by either that both find."
    columns = ("attack", "and", "members both find", "either finds", "rank correlation")
    return Figure("agreement", "Do attacks find the same members?", caption, alt, spec, columns, table)
