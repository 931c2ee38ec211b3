"""A figure as a Vega-Lite specification with its data as a table, drawn by vl-convert to SVG or PNG.

Every figure is about 400 units wide, so that it fits a phone and three fit a laptop. Colours are named by the light theme's hex values;
in the SVG they become CSS variables, which the page sets for light and dark.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from diffmia_exp.config import Plain

INK, MUTED, LINE = "#1c2530", "#566270", "#dfe4ea"
SERIES = ("#0b6bb0", "#b4490a", "#0a7d5c", "#9a3f86", "#6b5a00", "#3d4fc4")
"""Told apart by people with any colour vision; beside the colour, lines differ in their dashes and points in their shapes."""
HEAT = "#0b6bb1"
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 3], [4, 2, 1, 2])
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", HEAT: "heat"} | {colour: f"s{n}" for n, colour in enumerate(SERIES)}
WIDTH = 330

_numbers = count()


@dataclass(frozen=True)
class Figure:
    """A drawing with what it says in words: `alt` in a sentence, `columns` and `rows` as a table."""

    key: str
    title: str
    caption: str
    alt: str
    spec: Plain
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def svg(self) -> str:
        """The drawing for a page that sets the variables --ink, --muted, --line, --heat and --s0 to --s5."""
        import vl_convert

        text = vl_convert.vegalite_to_svg(self.spec | {"config": CONFIG})
        text = re.sub(r' (?:role|aria-roledescription|aria-hidden|xmlns:xlink|version|font-family)="[^"]*"', "", text)
        text = text.replace(" aria-label=", " data-tip=")
        text = re.sub(r' (?:d|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
        prefix = f"f{next(_numbers)}-"  # ids must be unique in a page
        text = re.sub(r'(id="|url\(#)', rf"\g<1>{prefix}", text)
        for colour, name in VARIABLES.items():
            text = text.replace(f'"{colour}"', f'"var(--{name})"')
        head = f'<svg class="plot" role="img" aria-label="{html.escape(self.alt)}" style="max-width:'
        return re.sub(
            r'<svg (?:xmlns="[^"]*" )?class="marks" width="(\d+)" height="\d+" ',
            lambda m: f'{head}{1.2 * int(m[1]):.0f}px" ',
            text,
            count=1,
        )

    def png(self, scale: float = 2) -> bytes:
        """The drawing on white."""
        import vl_convert

        png: bytes = vl_convert.vegalite_to_png(self.spec | {"config": CONFIG | {"background": "white"}}, scale=scale)
        return png


_axis = {"labelColor": MUTED, "titleColor": MUTED, "gridColor": LINE, "domainColor": MUTED, "tickColor": MUTED, "labelFontSize": 11}
CONFIG: Plain = {
    "background": None,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": _axis | {"aria": False, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 6},
    "legend": {
        "aria": False,
        "labelColor": INK,
        "labelFontSize": 12,
        "orient": "bottom",
        "direction": "vertical",
        "title": None,
        "symbolStrokeWidth": 2,
    }
    | {"labelLimit": WIDTH - 40, "offset": 8, "symbolSize": 180, "symbolOpacity": 1},
    "text": {"color": INK, "fontSize": 12},
    "header": {"labelColor": INK, "labelFontSize": 12, "title": None, "labelLimit": 160, "labelPadding": 2},
}


def sheet(values: list[Plain], height: Any, layers: list[Plain], encoding: Plain) -> Plain:
    """A specification of layers over the same values and encoding. Marks say what they are where they have a description only."""
    for layer in layers:
        layer["mark"]["aria"] = "description" in layer["encoding"]
    return {"data": {"values": values}, "width": WIDTH, "height": height, "encoding": encoding, "layer": layers}


def interval(value: Sequence[float]) -> str:
    """A number with its interval, to three digits."""
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def three(value: float) -> str:
    """To three decimals."""
    return f"{value:.3f}"


def short(value: float) -> float:
    """To four digits, which is more than a drawing shows."""
    return float(f"{value:.4g}")


def number(value: object) -> str:
    """A number to four digits, a large one to the unit, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
