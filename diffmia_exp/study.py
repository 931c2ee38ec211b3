"""python -m diffmia_exp.study [OUTPUTS] [--out FOLDER]: what each factor does to what a model leaks, from the grids that sweep one.

A grid `experiment=study_<factor>` sweeps one key, with everything else fixed, over targets and attacks. For each there is a figure of
the AUC along that key, and the difference that the key makes, with intervals over targets.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from diffmia_exp import grid, intervals
from diffmia_exp.config import Plain
from diffmia_exp.errors import UserError
from diffmia_exp.report.collect import Collection
from diffmia_exp.report.drawing import DASHES, MUTED, SERIES, Figure, interval, sheet, three
from diffmia_exp.report.figures import cost
from diffmia_exp.report.groups import Estimate, access, estimate, grouped
from diffmia_exp.report.reading import NotDone, Run, read
from diffmia_exp.report.settings import comparable, flat, identity
from diffmia_exp.store import digest

PREFIX = "study_"
MEASURES = {"kid": "KID", "loss_heldout": "loss on held-out images"}
"""Measures of utility that a front is drawn of, less being better."""

BUDGET = ("threat_model", "noises", "variations")
"""Factors whose attacks are also drawn against the model evaluations they cost."""

REPEATED = ("attack", "attack/plugin", "threat_model", "split.target_index", "seed", "experiment")
"""What a grid may sweep beside its factor."""


@dataclass(frozen=True)
class Level:
    """One value of a factor, as it was typed, with the runs of one attack at it."""

    value: str
    runs: tuple[Run, ...]

    @property
    def number(self) -> float | None:
        """Where it lies on an axis of numbers; None for a name. A snapshot lies at its epochs."""
        if self.value.startswith("snapshot="):
            return float(np.mean([run.metrics["epochs"] for run in self.runs]))
        try:
            return float(self.value.split("=", 1)[1])
        except ValueError:
            return None

    @property
    def text(self) -> str:
        """The value for people."""
        return f"{self.number:.4g}" if self.number is not None else self.value.split("=", 1)[1]

    @property
    def aucs(self) -> list[float]:
        """AUC of each run."""
        return [float(run.metrics["auc"]) for run in self.runs]

    @property
    def auc(self) -> Estimate:
        """Mean AUC over targets with its 95% interval (Student's t), that of the one run where there is one only."""
        return estimate(self.aucs, self.runs[0].metrics["auc_ci"])

    def utility(self, key: str) -> Estimate | None:
        """Mean of a measure of utility over targets with its 95% interval; None where it was not measured, or of one target only."""
        values = [run.metrics["utility"][key] for run in self.runs if "utility" in run.metrics]
        if len(values) < max(2, len(self.runs)):
            return None
        mean, (low, high) = intervals.mean_interval(values)
        return mean, low, high

    @property
    def learned(self) -> bool:
        """Whether every model has learned, as far as that is known."""
        return all(run.metrics.get("utility", {}).get("learned", True) for run in self.runs)


@dataclass(frozen=True)
class Factor:
    """A key that was swept: for every attack the levels, in the order of the key's values."""

    name: str
    key: str
    attacks: dict[str, tuple[Level, ...]]

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        return all(level.number is not None for levels in self.attacks.values() for level in levels)

    @property
    def axis(self) -> str:
        """What its values are, for people."""
        return "epochs of training" if self.key == "snapshot" else self.key


@dataclass(frozen=True)
class Effect:
    """What a factor does to an attack's AUC between two values: the difference with its 95% interval, over so many targets."""

    attack: str
    before: Level
    after: Level
    difference: Estimate | None
    paired: bool


def factors(outputs: Path) -> list[Factor]:
    """The factors that grids under `outputs` have swept, by name; several grids of one experiment count as one.

    Raises:
        UserError: if there is none, a grid sweeps more than one key, or runs of one value are not repetitions of each other.
    """
    sweeps: dict[str, list[Path]] = {}
    for file in sorted(outputs.glob(f"sweeps/*{PREFIX}*/cells.json")):
        sweeps.setdefault(file.parent.name.rsplit("-", 6)[0], []).append(file.parent)
    found = [factor for name, folders in sweeps.items() if (factor := _factor(name, folders, outputs)) is not None]
    if not found:
        raise UserError(f"{outputs}: holds no finished grid of a factor; python run.py experiment={PREFIX}members makes one")
    return found


def _factor(name: str, folders: Sequence[Path], outputs: Path) -> Factor | None:
    runs: dict[str, tuple[list[str], Run]] = {}
    for cell in (cell for folder in folders for cell in grid.cells(folder)):
        if cell.state in ("done", "cached"):
            try:
                runs[cell.facts["run"]] = cell.overrides, read(outputs / "runs" / cell.facts["run"], None)
            except NotDone as e:
                raise UserError(f"{outputs / 'runs' / cell.facts['run']}: {e}; run experiment={name} again") from None
    values: dict[str, dict[str, None]] = {}
    for overrides, _ in runs.values():
        for key, value in (o.split("=", 1) for o in overrides):
            values.setdefault(key, {})[value] = None
    several = [key for key, seen in values.items() if len(seen) > 1]
    swept = [key for key in several if key not in REPEATED] or [key for key in several if key == "threat_model"]
    if not swept:
        return None
    if len(swept) > 1:
        raise UserError(f"{name}: sweeps {', '.join(swept)}; a factor is one key, so sweep them in experiments of their own")
    key = swept[0]
    attacks: dict[str, dict[str, list[Run]]] = {}
    alike: dict[str, tuple[str, Run]] = {}
    for overrides, run in runs.values():
        value = next(o for o in overrides if o.startswith(f"{key}="))
        _compare(name, value, run, alike)
        attack = run.label if key == "threat_model" else f"{run.label}, {run.metrics['threat_model']}"
        attacks.setdefault(attack, {}).setdefault(value, []).append(run)
    order = [f"{key}={value}" for value in values[key]]
    return Factor(name.replace(PREFIX, "", 1), key, {attack: _levels(at, order) for attack, at in attacks.items()})


def _compare(name: str, value: str, run: Run, alike: dict[str, tuple[str, Run]]) -> None:
    """Refuse a run that is no repetition of those that came before it, in `alike` by what they must agree in."""
    facts = comparable(run)
    agree = {
        f"{value}, whatever attacks it,": digest(flat(facts)),
        "all values": digest(flat({"versions": facts["versions"]})),
        f"{run.label}, {run.metrics['threat_model']}, {value}, {run.seed}, {run.target_index}": str(run.metrics["run_key"]),
    }
    for what, of in agree.items():
        seen, other = alike.setdefault(what, (of, run))
        if seen != of:
            why = f"{other.folder.name} and {run.folder.name} differ in settings or versions"
            raise UserError(f"{name}: {what}: {why}; move the folder of the older grid out of sweeps/, or give another output_dir")


def _levels(runs: dict[str, list[Run]], order: Sequence[str]) -> tuple[Level, ...]:
    levels = [Level(value, tuple(sorted(runs[value], key=lambda run: (run.seed, run.target_index)))) for value in order if value in runs]
    return tuple(sorted(levels, key=lambda level: level.number if level.number is not None else 0))


def effects(factor: Factor) -> list[Effect]:
    """What the factor does: from the smallest to the largest number, or from the first name to each other one."""
    made = []
    for attack, levels in factor.attacks.items():
        for after in levels[-1:] if factor.numeric else levels[1:]:
            if after is not levels[0]:
                made.append(Effect(attack, levels[0], after, *difference(levels[0], after)))
    return made


def difference(before: Level, after: Level) -> tuple[Estimate | None, bool]:
    """Mean difference of AUC with its 95% interval, None for fewer than two targets a level; and whether targets were paired.

    Targets are paired where both levels have the same ones, with the same images and members; else Welch's interval is taken.
    """
    a, b = before.aucs, after.aucs
    if min(len(a), len(b)) < 2:
        return None, False
    same = [run.images for run in before.runs] == [run.images for run in after.runs]
    test = stats.ttest_rel(b, a) if same else stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return (float(np.mean(b) - np.mean(a)), float(low), float(high)), same


def figure(factor: Factor) -> Figure:
    """AUC along the factor, with intervals over targets; of many attacks, of those with the highest AUC at any value."""
    best = sorted(factor.attacks, key=lambda attack: -max(level.auc[0] for level in factor.attacks[attack]))
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
        x |= {"type": "nominal", "sort": None, "axis": {"labelAngle": -30}}
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
    fronts = [] if factor.numeric else [front(factor, measure) for measure in MEASURES]
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
    drawn = cost(grouped(Collection(list(once.values())))[0], "nfe_per_image", "model evaluations per image")
    return replace(drawn, key="budget")


def front(factor: Factor, measure: str = "kid") -> Figure | None:
    """What every value of a factor betrays against what its models are worth; None where utility was not measured.

    A value lies at the mean AUC of the attack that is strongest on average, so that a defence is not praised for failing one attack.
    """
    strongest: dict[str, tuple[str, Level]] = {}
    for attack, levels in factor.attacks.items():
        for level in levels:
            if level.value not in strongest or level.auc[0] > strongest[level.value][1].auc[0]:
                strongest[level.value] = attack, level
    values: list[Plain] = []
    rows = []
    for n, (attack, level) in enumerate(strongest.values(), 1):
        if (worth := level.utility(measure)) is None:
            return None
        name = level.text + ("" if level.learned else " (not learned)")
        values.append(
            {
                "n": str(n),
                "s": f"{n}  {name}",
                "x": worth[0],
                "left": worth[1],
                "right": worth[2],
                "auc": level.auc[0],
                "low": level.auc[1],
                "high": level.auc[2],
            }
            | {"tip": f"{name}: AUC {interval(level.auc)} by {attack}; {measure} {worth[0]:.3g}", "learned": level.learned}
        )
        rows.append([name, attack, *map(three, level.auc), *(f"{v:.4g}" for v in worth)])
    x: Plain = {
        "field": "x",
        "type": "quantitative",
        "title": f"{MEASURES[measure]}",
        "scale": {"zero": False, "nice": True, "padding": 12},
    }
    y: Plain = {"field": "auc", "type": "quantitative", "title": "AUC of the strongest attack", "scale": {"zero": False, "nice": True}}
    shape = {"field": "learned", "type": "nominal", "legend": None, "scale": {"domain": [True, False], "range": ["circle", "cross"]}}
    bar = {"type": "rule", "strokeWidth": 1.5, "color": SERIES[0], "opacity": 0.35}
    called = [v["s"] for v in values]  # names stand in the legend, for points lie close together
    colour = {"field": "s", "type": "nominal", "legend": {"symbolSize": 0, "columns": 2}}
    colour |= {"scale": {"domain": called, "range": [SERIES[0]] * len(called)}}
    layers: list[Plain] = [
        {"mark": {"type": "rule", "color": MUTED, "strokeDash": [3, 3]}, "encoding": {"y": {"datum": 0.5, "type": "quantitative"}}},
        {"mark": dict(bar), "encoding": {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}}},
        {"mark": dict(bar), "encoding": {"x": x | {"field": "left"}, "x2": {"field": "right"}, "y": y}},
        {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}}
        | {"encoding": {"x": x, "y": y, "color": colour, "shape": shape, "description": {"field": "tip"}}},
        {"mark": {"type": "text", "align": "left", "dx": 5, "dy": -7}, "encoding": {"x": x, "y": y, "text": {"field": "n"}}},
    ]
    alt = f"AUC of the strongest attack against {MEASURES[measure]}; " + "; ".join(v["tip"] for v in values)
    caption = "Lower left is better. Means over targets with 95% intervals; a cross marks models that have not learned."
    columns = (factor.key, "strongest attack", "AUC", "low", "high", measure, "low", "high")
    key = f"{factor.name}-{measure}"
    return Figure(key, f"AUC against {MEASURES[measure]}", caption, alt + ".", sheet(values, 300, layers, {}), columns, rows)


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
            worth = {level.text: level.utility(measure) for levels in factor.attacks.values() for level in levels}
            if any(worth.values()):
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


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmia_exp.study", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("outputs", nargs="?", type=Path, default=Path("outputs"), help="the grids' output_dir")
    parser.add_argument("--out", type=Path, help="folder of study.md, study.csv and figures; study below the first if not given")
    given = parser.parse_args(arguments)
    out = given.out or given.outputs / "study"
    try:
        found = factors(given.outputs)
        (out / "figures").mkdir(parents=True, exist_ok=True)
        spent = budget(found)
        for drawn in [drawn for factor in found for drawn in figures(factor)] + ([spent] if spent else []):
            (out / "figures" / f"{drawn.key}.png").write_bytes(drawn.png())
        (out / "study.md").write_text(to_markdown(found))
        (out / "study.csv").write_text(to_csv(found))
    except UserError as e:
        sys.exit(f"error: {e}")
    except ModuleNotFoundError as e:
        sys.exit(f"error: {e.name} is missing; the figures need pip install -e '.[report]'")
    except OSError as e:
        sys.exit(f"error: {e.filename}: cannot be written to ({e.strerror}); give another place with --out")
    print(f"{out}: {len(found)} factors, {sum(len(level.runs) for f in found for ls in f.attacks.values() for level in ls)} runs")


if __name__ == "__main__":
    main()
