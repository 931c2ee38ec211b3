"""python -m diffmia_exp.dashboard --entity E [--project P] [--report] [--offline FILE.json]: a W&B workspace, or report, over a project."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from diffmia_exp.errors import ConfigError, UserError


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmia_exp.dashboard", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--entity", help="the W&B user or team that owns the project")
    parser.add_argument("--project", default="diffmia_exp", help="tracking.project of the runs; diffmia_exp if not given")
    parser.add_argument("--report", action="store_true", help="a W&B report instead of a workspace")
    parser.add_argument(
        "--offline", type=Path, metavar="FILE", help="write its specification to this JSON file instead of saving it in W&B"
    )
    given = parser.parse_args(arguments)
    try:
        print(dashboard(given.entity, given.project, given.report, given.offline))
    except UserError as e:
        sys.exit(f"error: {e}")
    except ModuleNotFoundError as e:
        sys.exit(f"error: {e.name} is missing; the dashboard needs pip install -e '.[report]'")


def dashboard(entity: str | None, project: str, report: bool = False, offline: Path | None = None) -> str:
    """Save a workspace or a report in W&B, or write its specification.

    Args:
        entity, project: of W&B.
        report: a report instead of a workspace.
        offline: the file for the specification, which needs no login; None to save in W&B.

    Returns:
        where it is.

    Raises:
        UserError: for an entity or project that cannot be, a file that cannot be written, without a login, or if W&B refuses.
    """
    from diffmia_exp.tracking import views
    from diffmia_exp.tracking.runs import project_name

    if not entity or "/" in entity:
        raise ConfigError("--entity", entity, "must name the W&B user or team that owns the project")
    project_name("--project", project)
    view = views.report(entity, project) if report else views.workspace(entity, project)
    if offline is None:
        return f"saved: {views.save(view)}"
    try:
        offline.write_text(json.dumps(views.spec(view), indent=1))
    except OSError as e:
        raise UserError(f"{offline}: cannot be written to ({e.strerror}); give another place with --offline") from None
    return f"{offline}: the specification of a W&B {'report' if report else 'workspace'} for {entity}/{project}"


if __name__ == "__main__":
    main()
