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
from diffmia_exp.report import evidence, figures, pictures
from diffmia_exp.report.collect import Collection, Note
from diffmia_exp.report.drawing import interval
from diffmia_exp.report.groups import Group, Row, target_runs
from diffmia_exp.report.reading import Run
from diffmia_exp.report.settings import varying

TEMPLATES = Path(__file__).with_name("templates")
SHOWN = 12
"""Most and least exposed images, and near-copies, at most."""

KINDS = ("failed", "damaged", "unfinished", "not applicable", "counted once", "older format", "nothing here")
"""What is not among the results, in the order of the page."""


def html(found: Collection, groups: Sequence[Group], sources: Iterable[Path]) -> str:
    """The page."""
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
    }
    script = (TEMPLATES / "page.js").read_text()
    return environment.get_template("page.html").render(
        groups=[_section(group, found) for group in groups],
        notes=_ordered(found.notes),
        runs=len(found.runs),
        attacks=len({run.label for run in found.runs}),
        rows=[(group, row) for group in groups for row in group.rows],
        filters=_filters(groups),
        separating=_separating(groups),
        sources=[str(source) for source in sources],
        now=datetime.now().astimezone(),
        version=__version__,
        style=Markup((TEMPLATES / "page.css").read_text()),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_sha(script)}'",
    )


def _sha(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _section(group: Group, found: Collection) -> Plain:
    """What the page says of a group."""
    on = target_runs(group)[0][1]
    agree = evidence.agreement(on)
    kept = pictures.exposed(group, found)
    exposed = evidence.exposure(group, kept)
    measured = {"attacks": len(group.final), "targets": len({run.target for row in group.final for run in row.runs})}
    return {
        "group": group,
        "figures": [(figure, Markup(figure.svg())) for figure in figures.of(group, agree)],
        "verdicts": [_verdict(group, tm) for tm in group.threat_models],
        "controls": _controls(group),
        "comparisons": evidence.comparisons(on),
        "epsilons": _epsilons(group),
        "cdi": evidence.set_level(on),
        "most": [(e, png(e.pixels)) for e in exposed[:SHOWN]],
        "least": [(e, png(e.pixels)) for e in exposed[SHOWN:][-SHOWN:][::-1]],
        "pictured": any(e.pixels is not None for e in exposed[:SHOWN]),
        "measured": measured,
        "memorisation": _memorisation(group, found),
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


def _memorisation(group: Group, found: Collection) -> list[Plain]:
    """Near-copies among the generated images of each target, as pairs of pictures; most copied first."""
    seen: dict[object, Plain] = {}
    for row in group.rows:
        for run in row.runs:
            if run.target in seen or not run.metrics.get("memorisation"):
                continue
            pairs = [(png(a), png(b), i, r) for a, b, i, r in pictures.near_copies(run, found)[:SHOWN]]
            seen[run.target] = {"run": run, "numbers": run.metrics["memorisation"], "pairs": pairs}
    return list(seen.values())


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


def _separating(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """The settings in which groups differ, with each group's value."""
    differing = varying([group.facts for group in groups])
    return [(key, [values[key] for values in differing]) for key in (differing[0] if differing else {})]


def _ordered(notes: Iterable[Note]) -> list[Note]:
    return sorted(notes, key=lambda note: KINDS.index(note.kind))


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


def number(value: object) -> str:
    """A number to four digits, a large one to the unit, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


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
