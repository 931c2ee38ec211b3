"""python -m diffmia_exp.report RUNS.. [--format html|markdown|csv|latex] [--out PATH] [--wandb]: a report of all runs below folders."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from diffmia_exp.errors import UserError

SUFFIXES = {"html": "html", "markdown": "md", "csv": "csv", "latex": "tex"}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmia_exp.report", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with runs: outputs, outputs/runs, a sweep, or run folders")
    parser.add_argument("--format", choices=SUFFIXES, help="if not given, what --out ends in says, else html")
    parser.add_argument("--out", type=Path, help="file to write; report.html (.md, .csv, .tex) in the first folder if not given")
    parser.add_argument("--figures", type=Path, help="a folder that gets every figure as PNG")
    parser.add_argument(
        "--wandb", action="store_true", help="log the report's tables and figures to W&B too, offline unless $WANDB_MODE says so"
    )
    parser.add_argument("--project", help="of W&B; that of the runs if not given")
    parser.add_argument("--entity", help="of W&B; that of the runs if not given")
    given = parser.parse_args(arguments)
    ending = "" if given.out is None else given.out.suffix.removeprefix(".")
    form = given.format or next((form for form, suffix in SUFFIXES.items() if suffix == ending), "html")
    out = given.out or given.runs[0] / f"report.{SUFFIXES[form]}"
    try:
        if (given.project is not None or given.entity is not None) and not given.wandb:
            raise UserError("--project, --entity: say where in W&B the report is logged; add --wandb")
        print(report(given.runs, form, out, given.figures, (given.project, given.entity) if given.wandb else None))
    except UserError as e:
        sys.exit(f"error: {e}")
    except ModuleNotFoundError as e:
        sys.exit(f"error: {e.name} is missing; the report needs pip install -e '.[report]'")


def report(runs: list[Path], form: str, out: Path, pictures: Path | None = None, wandb: tuple[str | None, str | None] | None = None) -> str:
    """Write a report of the runs below some folders.

    Args:
        runs: folders with runs, sweeps or both.
        form: `html`, `markdown`, `csv` or `latex`.
        out: the file.
        pictures: a folder for every figure as PNG.
        wandb: log it to this project and entity of W&B, None for those of the runs.

    Returns:
        what was done, a sentence a line.

    Raises:
        UserError: if a folder is missing, a file cannot be written, or W&B refuses.
    """
    from diffmia_exp.report import collect, groups, tables

    found = collect.collect(runs)
    made = groups.grouped(found)
    content: list = []
    if form == "html" or wandb or pictures:
        from diffmia_exp.report import sections

        content = [sections.of(group, found) for group in made]
    if form == "html":
        from diffmia_exp.report import page

        text = page.html(found, content, runs)
    else:
        text = tables.to_csv(made) if form == "csv" else {"markdown": tables.to_markdown, "latex": tables.to_latex}[form](found, made)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
        if pictures is not None:
            _draw(content, pictures)
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be written to ({e.strerror}); give another place with --out or --figures") from None
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(note.kind for note in found.notes).items())
    beside = f"; beside them {kinds}" if kinds else ""
    said = f"{out}: {len(found.runs)} runs in {len(made)} {'group' if len(made) == 1 else 'groups'}{beside}"
    if wandb:
        from diffmia_exp.report import logged
        from diffmia_exp.summary import address

        where = logged.log(found, content, runs, out, *wandb)
        said += f"\nW&B: {address(where)}" if where else "\nW&B: nothing logged, for WANDB_MODE=disabled"
    return said


def _draw(sections: list, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for n, figure in enumerate(section["figures"]):
            (folder / f"{section['group'].letter}{n:02d}-{figure.key}.png").write_bytes(figure.png())


if __name__ == "__main__":
    main()
