"""python -m diffmia_exp.report RUNS.. [--format html|markdown|csv|latex] [--out PATH]: a report of all runs below these folders."""

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
    parser.add_argument("--format", choices=SUFFIXES, default="html")
    parser.add_argument("--out", type=Path, help="file to write; report.html (.md, .csv, .tex) in the first folder if not given")
    parser.add_argument("--figures", type=Path, help="a folder that gets every figure as PNG")
    given = parser.parse_args(arguments)
    out = given.out or given.runs[0] / f"report.{SUFFIXES[given.format]}"
    try:
        print(report(given.runs, given.format, out, given.figures))
    except UserError as e:
        sys.exit(f"error: {e}")
    except ModuleNotFoundError as e:
        sys.exit(f"error: {e.name} is missing; the report needs pip install -e '.[report]'")


def report(runs: list[Path], form: str, out: Path, pictures: Path | None = None) -> str:
    """Write a report of the runs below some folders.

    Args:
        runs: folders with runs, sweeps or both.
        form: `html`, `markdown`, `csv` or `latex`.
        out: the file.
        pictures: a folder for every figure as PNG.

    Returns:
        What was written, in a sentence.

    Raises:
        UserError: if a folder is missing or a file cannot be written.
    """
    from diffmia_exp.report import collect, groups, tables

    found = collect.collect(runs)
    made = groups.grouped(found)
    if form == "html":
        from diffmia_exp.report import page

        text = page.html(found, made, runs)
    else:
        text = tables.to_csv(made) if form == "csv" else {"markdown": tables.to_markdown, "latex": tables.to_latex}[form](found, made)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
        if pictures is not None:
            _draw(made, pictures)
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be written to ({e.strerror}); give another place with --out or --figures") from None
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(note.kind for note in found.notes).items())
    return f"{out}: {len(found.runs)} runs in {len(made)} {'group' if len(made) == 1 else 'groups'}" + (
        f"; beside them {kinds}" if kinds else ""
    )


def _draw(made: list, folder: Path) -> None:
    from diffmia_exp.report import evidence, figures, groups

    folder.mkdir(parents=True, exist_ok=True)
    for group in made:
        for n, figure in enumerate(figures.of(group, evidence.agreement(groups.target_runs(group)[0][1]))):
            (folder / f"{group.letter}{n:02d}-{figure.key}.png").write_bytes(figure.png())


if __name__ == "__main__":
    main()
