"""The figures of a group: AUC by attack, ROC, cost, training; with those of its scores, every figure of the page."""

from __future__ import annotations

from collections.abc import Sequence

from diffmia_exp.config import Plain
from diffmia_exp.report import evidence
from diffmia_exp.report.drawing import DASHES, MUTED, SERIES, WIDTH, Figure, interval, sheet, short, three
from diffmia_exp.report.evidence import Agreement
from diffmia_exp.report.groups import Group, Row, names
from diffmia_exp.report.score_figures import histograms, overlap

HISTOGRAMS = 6
"""Panels in a figure at most."""


def of(group: Group, agree: Agreement | None) -> list[Figure]:
    """Every figure of a group that its runs give reason to draw."""
    made = [forest(group, tm) for tm in group.threat_models]
    made += [roc(group, tm) for tm in group.threat_models]
    made.append(cost(group, "nfe_per_image", "model evaluations per image"))
    if any(row.mean("shadow_trainings") for row in group.final):
        made.append(cost(group, "shadow_trainings", "models that the adversary trains"))
    made += [along_training(group, tm) for tm in group.threat_models if _trained(group, tm)]
    made += [histograms(rows) for rows in _chunks(group.final, HISTOGRAMS)]
    return made + ([overlap(agree)] if agree else [])


def forest(group: Group, threat_model: str) -> Figure:
    """AUC with its interval, one line per attack."""
    rows = group.under(threat_model)
    values = [
        {"y": n, "name": row.name, "auc": row.auc[0], "low": row.auc[1], "high": row.auc[2], "text": interval(row.auc), "tip": _tip(row)}
        for n, row in enumerate(rows)
    ]
    least = min(0.45, *(row.auc[1] for row in rows))
    x = {"field": "auc", "type": "quantitative", "scale": {"domain": [least, 1], "nice": False, "zero": False}, "title": "AUC"}
    y = {"field": "y", "type": "ordinal", "axis": None, "scale": {"padding": 0.5}}
    text = {"type": "text", "baseline": "bottom", "dy": -7}
    tip = {"field": "tip", "type": "nominal"}
    spec = sheet(
        values,
        {"step": 36},
        [
            {"mark": {"type": "rule", "color": MUTED, "strokeDash": [3, 3]}, "encoding": {"x": {"datum": 0.5}, "y": None}},
            {
                "mark": {"type": "rule", "strokeWidth": 3, "color": SERIES[0]},
                "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}},
            },
            {"mark": {"type": "point", "filled": True, "size": 90, "color": SERIES[0], "opacity": 1}}
            | {"encoding": {"x": x, "description": tip}},
            {"mark": text | {"align": "left", "limit": WIDTH - 120}, "encoding": {"x": {"value": 0}, "text": {"field": "name"}}},
            {"mark": text | {"align": "right", "color": MUTED}, "encoding": {"x": {"value": WIDTH}, "text": {"field": "text"}}},
        ],
        {"y": y},
    )
    best = rows[0]
    alt = f"AUC of {len(rows)} attacks under {threat_model}; the highest is {best.name} with {interval(best.auc)}."
    caption = "AUC with its 95% interval; the dashed line is chance."
    table = [[row.name, len(row.runs), *map(three, row.auc)] for row in rows]
    return Figure("forest", f"AUC, {threat_model}", caption, alt, spec, ("attack", "runs", "AUC", "low", "high"), table)


def roc(group: Group, threat_model: str) -> Figure:
    """ROC curves on log-log axes, the best attacks in colour with their bands."""
    rows = group.under(threat_model)
    curves = [evidence.curve(row) for row in rows]
    floor = min(float(c.fpr[0]) for c in curves)
    least = min(floor, *(1 / row.first.metrics["n_members"] for row in rows))
    legend = [f"{row.name}  {row.auc[0]:.3f}" for row in rows]
    values = [
        {"s": name, "n": n, "fpr": short(f), "tpr": short(max(t, least)), "low": short(max(lo, least)), "high": short(max(hi, least))}
        for n, (name, c) in enumerate(zip(legend, curves, strict=True))
        for f, t, lo, hi in zip(c.fpr, c.tpr, c.low, c.high, strict=True)
    ]

    def log(low: float) -> Plain:
        return {"type": "quantitative", "axis": {"format": "~g", "values": [v for v in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1) if v >= low]}}

    x = {"field": "fpr", **log(floor), "scale": {"type": "log", "domain": [floor, 1], "nice": False}, "title": "false positive rate"}
    y = {
        "field": "tpr",
        **log(least),
        "scale": {"type": "log", "domain": [least, 1], "nice": False, "clamp": True},
        "title": "true positive rate",
    }
    colour, dash = _series(legend)
    top, rest = f"datum.n < {len(SERIES)}", f"datum.n >= {len(SERIES)}"
    step = {"interpolate": "step-after"}
    spec = sheet(
        values,
        280,
        [
            {"data": {"values": [{"fpr": max(floor, least), "tpr": max(floor, least)}, {"fpr": 1, "tpr": 1}]}}
            | {"mark": {"type": "line", "color": MUTED, "strokeWidth": 1, "strokeDash": [3, 3]}, "encoding": {"y": y}},
            {"transform": [{"filter": top}], "mark": {"type": "area", "opacity": 0.13, **step}}
            | {"encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour}},
            {"transform": [{"filter": rest}], "mark": {"type": "line", "color": MUTED, "strokeWidth": 1, "opacity": 0.45, **step}}
            | {"encoding": {"y": y, "detail": {"field": "s"}, "description": {"field": "s"}}},
            {"transform": [{"filter": top}], "mark": {"type": "line", "strokeWidth": 2, **step}}
            | {"encoding": {"y": y, "color": colour, "strokeDash": dash, "description": {"field": "s"}}},
        ],
        {"x": x},
    )
    alt = f"ROC curves of {len(rows)} attacks under {threat_model} on logarithmic axes; the best is {rows[0].name}."
    more = f" {len(rows) - len(SERIES)} further attacks in grey." if len(rows) > len(SERIES) else ""
    caption = f"On logarithmic axes, with 95% bands, of several runs their range; the number is the AUC, the dashed line chance.{more}"
    fprs = [fpr for fpr in ("0.1", "0.01", "0.001", "0.0001") if any(row.tpr(fpr) for row in rows)]
    table = [[row.name, *(interval(at) if (at := row.tpr(fpr)) else "unresolvable" for fpr in fprs)] for row in rows]
    return Figure("roc", f"ROC, {threat_model}", caption, alt, spec, ("attack", *(f"TPR at {float(f):.2%} FPR" for f in fprs)), table)


def cost(group: Group, key: str, title: str) -> Figure:
    """AUC against what an attack costs, with the attacks that none beats at less cost joined by a line."""
    rows = sorted(group.final, key=lambda row: (row.mean(key), -row.auc[0]))
    front, best = [], -1.0
    for row in rows:
        if row.auc[0] > best:
            front.append(row)
            best = row.auc[0]
    whole, called = key == "shadow_trainings", names(rows)
    points: list[Plain] = [
        {"cost": row.mean(key), "auc": row.auc[0], "low": row.auc[1], "high": row.auc[2], "name": name}
        for row, name in zip(rows, called, strict=True)
    ]
    for row, point in zip(rows, points, strict=True):
        point |= {"tm": row.threat_model, "tip": f"{_tip(row)}, {row.mean(key):.4g} {title}", "front": row in front}
    costs = [row.mean(key) for row in rows]
    log = not whole and min(costs) > 0
    x = {"field": "cost", "type": "quantitative", "title": title, "axis": {"format": "~s", "tickCount": 5, "grid": False}}
    x |= {"scale": {"type": "log", "nice": False, "padding": 18} if log else {"zero": True, "nice": True}}
    y = {"field": "auc", "type": "quantitative", "title": "AUC", "scale": {"zero": False, "nice": True, "padding": 14}}
    colour = {"field": "tm", "type": "nominal", "scale": {"domain": group.threat_models, "range": list(SERIES)}}
    right = (min(costs) * max(costs)) ** 0.5 if log else (min(costs) + max(costs)) / 2  # names to the left of points past the middle
    named = {"type": "text", "dy": -11, "limit": 150}
    spec = sheet(
        points,
        250,
        [
            {
                "transform": [{"filter": "datum.front"}],
                "mark": {"type": "line", "interpolate": "step-after", "color": MUTED, "strokeWidth": 1.5},
            }
            | {"encoding": {"y": y, "order": {"field": "cost"}}},
            {"mark": {"type": "rule", "opacity": 0.5}, "encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour}},
            {"mark": {"type": "point", "filled": True, "size": 80, "opacity": 1}}
            | {
                "encoding": {
                    "y": y,
                    "color": colour,
                    "shape": colour | {"scale": {"domain": group.threat_models}},
                    "description": {"field": "tip"},
                }
            },
            *(
                {"transform": [{"filter": f"datum.front && datum.cost {side} {right!r}"}], "mark": named | {"align": align, "dx": dx}}
                | {"encoding": {"y": y, "text": {"field": "name"}}}
                for side, align, dx in (("<=", "left", -5), (">", "right", 5))
            ),
        ],
        {"x": x},
    )
    alt = f"AUC against {title} of {len(rows)} attacks; not beaten at their cost: {', '.join(names(front))}."
    caption = "Named and joined: attacks that none beats at the same cost or less (the Pareto front). Bars are 95% intervals."
    table = [[row.name, row.threat_model, f"{row.mean(key):.4g}", three(row.auc[0]), "yes" if row in front else "no"] for row in rows]
    return Figure("cost", f"AUC against {title}", caption, alt, spec, ("attack", "threat model", title, "AUC", "on the front"), table)


def _trained(group: Group, threat_model: str) -> dict[str, list[Row]]:
    """Rows that are snapshots of one attack, if it has several, by the attack's name."""
    by_base: dict[str, list[Row]] = {}
    for row in group.rows:
        if row.threat_model == threat_model and row.epochs is not None:
            by_base.setdefault(row.base, []).append(row)
    series = sorted((rows for rows in by_base.values() if len(rows) > 1), key=lambda rows: -max(row.auc[0] for row in rows))
    return {rows[0].plain_name: sorted(rows, key=lambda row: row.epochs or 0) for rows in series}


def along_training(group: Group, threat_model: str) -> Figure:
    """AUC of attacks on snapshots of the same training, with intervals."""
    series = _trained(group, threat_model)
    values = [
        {
            "s": name,
            "n": n,
            "x": row.epochs,
            "auc": row.auc[0],
            "low": row.auc[1],
            "high": row.auc[2],
            "tip": f"{_tip(row)}, {row.epochs:g} epochs",
        }
        for n, (name, rows) in enumerate(series.items())
        for row in rows
    ]
    colour, dash = _series(list(series))
    grey = len(series) > len(SERIES)
    x = {"field": "x", "type": "quantitative", "title": "epochs of training", "scale": {"type": "log", "nice": False, "padding": 8}}
    x |= {"axis": {"format": "~s", "tickCount": 5, "grid": False}}
    y = {"field": "auc", "type": "quantitative", "title": "AUC", "scale": {"zero": False, "nice": True}}
    top = [{"filter": f"datum.n < {len(SERIES)}"}]
    layers: list[Plain] = [
        {"mark": {"type": "rule", "color": MUTED, "strokeDash": [3, 3]}, "encoding": {"x": {}, "y": {"datum": 0.5}}},
        {"transform": top, "mark": {"type": "area", "opacity": 0.1}}
        | {"encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour}},
        {"transform": top, "mark": {"type": "line", "strokeWidth": 2}, "encoding": {"x": x, "y": y, "color": colour, "strokeDash": dash}},
        {"transform": top, "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1}}
        | {"encoding": {"x": x, "y": y, "color": colour, "description": {"field": "tip"}}},
    ]
    if grey:
        layers.insert(1, {"transform": [{"filter": f"datum.n >= {len(SERIES)}"}], "mark": {"type": "line", "color": MUTED, "opacity": 0.45}}
                      | {"encoding": {"x": x, "y": y, "detail": {"field": "s"}}})  # fmt: skip
    spec = sheet(values, 260, layers, {})
    alt = f"AUC along training of {len(series)} attacks under {threat_model}, " + "; ".join(
        f"{name} from {rows[0].auc[0]:.3f} to {rows[-1].auc[0]:.3f}" for name, rows in list(series.items())[: len(SERIES)]
    )
    table = [[name, f"{row.epochs:g}", *map(three, row.auc)] for name, rows in series.items() for row in rows]
    caption = "The same attacks after more and more training of the same target, with 95% bands."
    return Figure(
        "training", f"AUC along training, {threat_model}", caption, alt + ".", spec, ("attack", "epochs", "AUC", "low", "high"), table
    )


def _series(called: Sequence[str]) -> tuple[Plain, Plain]:
    shown = list(called[: len(SERIES)])
    kind = {"field": "s", "type": "nominal"}
    legend = {"symbolType": "stroke", "symbolSize": 500}
    colour = {"scale": {"domain": shown, "range": list(SERIES)}, "legend": legend}
    return kind | colour, kind | {"scale": {"domain": shown, "range": list(DASHES)}, "legend": legend}


def _chunks(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _tip(row: Row) -> str:
    return f"{row.name}, {row.threat_model}: AUC {interval(row.auc)}" + (f", {len(row.runs)} runs" if len(row.runs) > 1 else "")
