"""Around the pipeline: a cell of a grid, errors in one line. Imports nothing heavy before a cell runs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffmia_exp import claims, grid, ranks, summary
from diffmia_exp.config import GROUPS, SETTINGS, checked
from diffmia_exp.errors import UserError, near

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOST = (errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN)
RERUN = "--rerun-failed"
_finished: list[Any] = []
_failed: list[tuple[str, str]] = []
"""Overrides (none for a run that is not part of a grid) and error."""
_sweeps: list[Path] = []


def cell(cfg: DictConfig) -> float | None:
    """Run one cell of a grid (or the only one) and return its AUC."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    given: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # an override may hold an interpolation
    overrides = " ".join(given) or "defaults"
    sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    if sweep and sweep not in _sweeps:
        _sweeps.append(sweep)
    folder = sweep / hydra.sweep.subdir if sweep else None
    if ranks.rank():  # its errors are the first task's to tell
        from diffmia_exp.pipeline import run

        run(checked(cfg), sweep.name if sweep else None)
        return None
    with contextlib.ExitStack() as held:
        try:
            config = checked(cfg)  # before the seconds that torch takes to import
            if folder:
                held.enter_context(claims.exclusive(folder / "cell.claim", f"cell {folder.name}"))
            from diffmia_exp.pipeline import run

            result = run(config, sweep.name if sweep else None)
            if folder:
                done = {"status": result["status"], "cached": result.cached, "overrides": overrides, "given": given, "run": result["name"]}
                done |= {"folder": str(result.folder)} if result.folder else {}
                done |= {"tracked": result.tracked} if result.tracked else {}
                grid.ended(folder, **done)
                log.info("%s: %s%s", overrides, result["status"], " (found, not computed again)" if result.cached else "")
        except Exception as e:
            e = _put_right(e, f"output_dir={cfg.output_dir}", Path(str(cfg.output_dir)))
            if folder:
                _failed.append((overrides, one_line(e)))
                log.error("failed: %s: %s", *_failed[-1], exc_info=None if isinstance(e, UserError) else e)
                with contextlib.suppress(OSError):  # the disk may be full
                    grid.ended(folder, status="failed", overrides=overrides, error=one_line(e))
            elif isinstance(e, UserError):
                _failed.append(("", one_line(e)))
                sys.exit(1)  # unlike an exception, this is not commented on by Hydra
            raise e
    result.overrides = given
    _finished.append(result)
    auc = result.get("auc")
    return float(auc) if auc is not None else None


def gather(sweep: Path) -> None:
    """Have the results of a grid told whose cells may have run in other processes, and what came to nothing."""
    if sweep not in _sweeps:
        _sweeps.append(sweep)
    for one in grid.cells(sweep):
        if one.state in ("failed", "lost", "waiting", "running"):
            failure = " ".join(one.overrides), str(one.facts.get("error", "ended without a result"))
            if failure not in _failed:
                _failed.append(failure)


def _put_right(e: Exception, where: str, folder: Path | None = None) -> Exception:
    """A full disk or a lost file system is no bug: say what to do. Libraries wrap the error, or keep only its text."""
    chain: BaseException | None = e
    while chain is not None:
        text = str(chain)
        if (isinstance(chain, OSError) and chain.errno in DISK_FULL) or "No space left" in text or "File too large" in text:
            return UserError(f"{where}: the disk is full; free some space and run the same command again, it resumes")
        if isinstance(chain, OSError) and chain.errno in LOST:
            return UserError(f"{where}: the file system fails ({chain.strerror}); once it is back, run the same command again, it resumes")
        chain = chain.__cause__ or chain.__context__
    if folder is not None and not folder.is_dir() and not isinstance(e, UserError):
        return UserError(f"{where}: the folder has vanished; once it is back, run the same command again, it resumes")
    return e


def guard(main: Callable[[], Any]) -> None:
    """Run the command line: a user's mistake gives one line and exit status 1, a bug its traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through, unformatted
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that claims are given back on the way out
    try:
        sys.argv[1:] = _arranged(_rerun(sys.argv[1:]))
        main()
    except (KeyboardInterrupt, SystemExit) as e:
        if isinstance(e, KeyboardInterrupt) or isinstance(e.__context__, KeyboardInterrupt):  # Lightning turns one into the other
            _tell()
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
            sys.exit(130)
        if not _failed:
            raise
    except Exception as e:
        if not _failed:  # not from a cell of this process
            e = _put_right(e, "output_dir")
            if isinstance(e, OSError) and not isinstance(e, HydraException) and not _finished:
                e = UserError(f"output_dir: {e.filename} cannot be written to ({e.strerror}); give another folder")
            if not isinstance(e, UserError | HydraException | OmegaConfBaseException | ValueError):
                _tell()
                raise
            _failed.append(("", one_line(e)))
    if _tell():
        sys.exit(1)


def _tell() -> bool:
    """Print the results, and every error as the last lines. Returns whether there was one."""
    failed = [failure for sweep in _sweeps for failure in summary.sweep(sweep)]
    if not _sweeps and _finished:
        summary.single(_finished[0])
    for line in summary.told(dict.fromkeys(failed + _failed)):
        print(f"error: {line}", file=sys.stderr)
    return bool(_failed)


def _rerun(arguments: list[str]) -> list[str]:
    """`--rerun-failed [FOLDER] [key=value ..]` as the command that runs a grid's unfinished cells again, with these changes."""
    if RERUN not in arguments:
        return arguments
    rest = [a for a in arguments if a not in (RERUN, "-m", "--multirun")]
    folders = [a for a in rest if "=" not in a and a[:1] not in ("-", "~")]
    output_dir = next((a.split("=", 1)[1] for a in rest if a.startswith("output_dir=")), "outputs")
    sweep = Path(folders[0]) if folders else grid.latest(Path(output_dir))
    begun = grid.planned(sweep)
    changes = [a for a in rest if a not in folders]
    return ["-m", *begun["hydra"], *begun["task"], *changes, f"hydra.sweeper.again='{sweep.resolve()}'"]


def _arranged(arguments: list[str]) -> list[str]:
    """Overrides first: argparse takes them from one place only. Raises UserError for an option that does not exist."""
    from hydra._internal.utils import get_args_parser

    overrides = [a for a in arguments if a[:1] not in ("", "-") and ("=" in a or a[0] == "~")]
    arranged = overrides + [a for a in arguments if a not in overrides]
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        unknown = parser.parse_known_args(arranged)[1]
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see python run.py --hydra-help") from None
    if unknown:
        hint = near(unknown[0], (RERUN, "--help", "--hydra-help", "--multirun", "--cfg", "--info", "--resolve"))
        raise UserError(f"{unknown[0]}: no such option{hint}; settings are given as key=value, without dashes")
    return arranged


def one_line(e: BaseException) -> str:
    """An error as one line, Hydra's with the nearest names added."""
    from hydra.errors import MissingConfigException, OverrideParseException

    text = " ".join(str(e).split()) or type(e).__name__
    if isinstance(e, UserError):
        return text
    if isinstance(e, MissingConfigException):
        return _no_such_choice(e.missing_cfg_file or "", e.options or [])
    if isinstance(e, OverrideParseException):
        reason = e.message.removeprefix(f"Error parsing override '{e.override}'").strip().splitlines()[0]
        return f"{e.override}: cannot be parsed ({reason}); write key=value, and quote special characters: 'key=\"value\"'"
    if match := re.match(r"Could not (?:override|delete from config\.|delete) '([^']+)'", text):
        return _no_such_key(match.group(1))
    if match := re.match(r"Ambiguous value for argument '(.+?)' 1\.", text):
        return f"{match.group(1)}: several values; add -m to run one after the other, or write a list as key=[1,2]"
    if match := re.match(r"Multiple values for (\w+)", text):
        return f"{match.group(1)}: chosen twice; leave out the +"
    if text.startswith("Config group override must be"):
        return f"{text}; choose a group's file by its name, as attack=pia"
    cause = str(e.__cause__ or "").splitlines()
    return f"{text}: {cause[0]}" if cause else text


def _no_such_choice(path: str, options: Sequence[str]) -> str:
    group, _, given = path.rpartition("/")
    if not group:
        return f"{given}: no such config; leave out --config-name"
    if path == "hydra/launcher/slurm":
        return "cluster=slurm: needs the SLURM launcher; install it with pip install -e '.[slurm]'"
    return f"{group}={given}: no such {group}; there are {', '.join(options)}{near(given, options)}"


def _no_such_key(key: str) -> str:
    owners = _keys()
    if key in owners:
        return f"{key}: no such key with the {key.split('.')[0]} chosen; choose {' or '.join(owners[key])} to have it"
    elsewhere = [known for known in owners if known.endswith(f".{key}")]  # the group was forgotten
    hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else near(key, [k for k in owners if k.count(".") == key.count(".")])
    return f"{key}: no such key{hint}; python run.py --cfg {'hydra' if key.startswith('hydra') else 'job'} shows them all"


def _keys() -> dict[str, list[str]]:
    """Every key of the shipped configs, as it is overridden, and the choices (`attack=pia`) that have it."""
    owners: dict[str, list[str]] = {group: ["config"] for group in GROUPS}

    def walk(prefix: str, node: dict[str, Any], owner: str) -> None:
        for name, child in node.items():
            owners.setdefault(f"{prefix}{name}", []).append(owner)
            if isinstance(child, dict):
                walk(f"{prefix}{name}.", child, owner)

    conf = Path(sys.argv[0]).resolve().parent / "conf"
    walk("", dict.fromkeys(SETTINGS), "config")
    for group in GROUPS:
        for file in sorted((conf / group).glob("*.yaml")):
            content: Any = OmegaConf.to_container(OmegaConf.load(file))
            walk(f"{group}.", {k: v for k, v in content.items() if k not in ("defaults", "hydra", group)}, f"{group}={file.stem}")
    return owners
