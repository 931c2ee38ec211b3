"""python -m diffmia_exp.study [OUTPUTS] [--out FOLDER]: what each factor does to what a model leaks, from the grids that sweep one.

For each factor there is a figure of the AUC along its key, and the difference that the key makes, with intervals over targets.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffmia_exp.errors import UserError
from diffmia_exp.study.drawing import budget, figures
from diffmia_exp.study.factors import read_all
from diffmia_exp.study.writing import to_csv, to_markdown


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmia_exp.study", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("outputs", nargs="?", type=Path, default=Path("outputs"), help="the grids' output_dir")
    parser.add_argument("--out", type=Path, help="folder of study.md, study.csv and figures; study below the first if not given")
    given = parser.parse_args(arguments)
    out = given.out or given.outputs / "study"
    try:
        found = read_all(given.outputs)
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
    runs = {run.folder for factor in found for levels in factor.attacks.values() for level in levels for run in level.runs}
    print(f"{out}: {len(found)} factors, {len(runs)} runs")


if __name__ == "__main__":
    main()
