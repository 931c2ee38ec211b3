"""python -m diffmia_exp.sync [OUTPUT_DIR] [--dry-run]: upload the W&B runs that were logged offline. It can be repeated."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffmia_exp.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmia_exp.sync", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("output_dir", nargs="?", type=Path, default=Path("outputs"), help="of the runs; outputs if not given")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and upload nothing")
    given = parser.parse_args(arguments)
    try:
        print(sync(given.output_dir, given.dry_run))
    except UserError as e:
        sys.exit(f"error: {e}")


def sync(output_dir: Path, dry_run: bool = False) -> str:
    """Upload the offline runs that were not uploaded before.

    Args:
        output_dir: of the runs, which wandb/ is in.
        dry_run: upload nothing.

    Returns:
        how many were uploaded, now and before, and how many have not ended yet; in a dry run, which would be.

    Raises:
        UserError: if there are no offline runs, without a login, or if some were not uploaded.
    """
    from diffmia_exp.tracking import upload

    found = upload.offline(output_dir)
    said = f"; {len(found.uploaded)} uploaded before" if found.uploaded else ""
    said += f"; {len(found.running)} still being written, repeat this when they have ended" if found.running else ""
    if dry_run:
        return "\n".join([f"{len(found.waiting)} runs to upload{said}", *(f"  {file.parent}" for file in found.waiting)])
    missing = upload.upload(output_dir, found.waiting) if found.waiting else []
    if missing:
        raise UserError(f"{len(missing)} of {len(found.waiting)} runs were not uploaded, as W&B says above; repeat this to upload them")
    return f"{len(found.waiting)} runs uploaded{said}"


if __name__ == "__main__":
    main()
