"""The report as one HTML file: no script, style, font or picture from elsewhere, and a policy in the page that forbids any."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from diffmia_exp import __version__
from diffmia_exp.config import Plain
from diffmia_exp.report.collect import Collection
from diffmia_exp.report.drawing import interval, number
from diffmia_exp.report.groups import Group, Row
from diffmia_exp.report.reading import Run
from diffmia_exp.report.sections import ordered, separating

TEMPLATES = Path(__file__).with_name("templates")


def html(found: Collection, sections: Sequence[Plain], sources: Iterable[Path]) -> str:
    """The page, of the sections that `sections.of` made."""
    groups: list[Group] = [section["group"] for section in sections]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "interval": interval,
        "number": number,
        "duration": duration,
        "facet": facet,
        "yaml": as_yaml,
        "share": share,
        "p": p_value,
        "svg": lambda figure: Markup(figure.svg()),
        "png": png,
    }
    script = (TEMPLATES / "page.js").read_text()
    return environment.get_template("page.html").render(
        groups=sections,
        notes=ordered(found.notes),
        runs=len(found.runs),
        attacks=len({run.label for run in found.runs}),
        rows=[(group, row) for group in groups for row in group.rows],
        filters=_filters(groups),
        separating=separating(groups),
        sources=[str(source) for source in sources],
        now=datetime.now().astimezone(),
        version=__version__,
        style=Markup((TEMPLATES / "page.css").read_text()),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_sha(script)}'",
    )


def _sha(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _filters(groups: Sequence[Group]) -> list[tuple[str, str, list[str]]]:
    rows = [row for group in groups for row in group.rows]
    threat_models = dict.fromkeys(tm for group in groups for tm in group.threat_models)
    return [
        ("dataset", "Data set", sorted({group.dataset for group in groups})),
        ("threat", "Threat model", list(threat_models)),
        ("attack", "Attack", sorted({row.label for row in rows})),
        ("seed", "Seed", [str(seed) for seed in sorted({run.seed for row in rows for run in row.runs})]),
        ("trained", "Training", ["complete", "snapshots"] if any(row.snapshot is not None for row in rows) else []),
    ]


def facet(value: Group | Row | Run, group: Group) -> str:
    """What the filters ask of an element, as JSON for its data-of attribute."""
    rows = value.rows if isinstance(value, Group) else [value] if isinstance(value, Row) else []
    runs = [value] if isinstance(value, Run) else [run for row in rows for run in row.runs]
    facets = {
        "dataset": [group.dataset],
        "threat": sorted({str(run.metrics["threat_model"]) for run in runs}),
        "attack": sorted({run.label for run in runs}),
        "seed": sorted({str(run.seed) for run in runs}),
        "trained": sorted({"complete" if run.metrics.get("snapshot") is None else "snapshots" for run in runs}),
    }
    return json.dumps(facets)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def p_value(value: float) -> str:
    """A p-value as papers print it."""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.3g}%"


def as_yaml(value: Plain) -> str:
    """Settings as YAML."""
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=False).strip()


def png(pixels: NDArray[np.uint8] | None) -> str | None:
    """Pixels [C, H, W] as a data URI."""
    if pixels is None:
        return None
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
