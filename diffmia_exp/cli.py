"""Around the pipeline: errors in one line, results in a table. Imports nothing heavy before a cell runs."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffmia_exp.errors import UserError, near

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_finished: list[Any] = []
_failed: list[tuple[str, str]] = []


def cell(cfg: DictConfig) -> float | None:
    """Run one cell of a grid (or the only one) and return its AUC."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    in_sweep = hydra.mode == RunMode.MULTIRUN
    overrides = " ".join(hydra.overrides.task) or "defaults"
    status = Path(hydra.sweep.dir, hydra.sweep.subdir, "status.json") if in_sweep else None
    try:
        from diffmia_exp.pipeline import run

        result = run(cfg, Path(hydra.sweep.dir).name if in_sweep else None)
    except Exception as e:
        e = _out_of_space(e, cfg)
        _failed.append((overrides, one_line(e)))
        if status is not None:
            log.error("%s: %s", overrides, one_line(e), exc_info=None if isinstance(e, UserError) else e)
            status.write_text(json.dumps({"status": "failed", "overrides": overrides, "error": one_line(e)}, indent=1))
        raise e
    _finished.append(result)
    if status is not None:
        done = {"status": result["status"], "cached": result.cached, "overrides": overrides, "run": result["name"]}
        status.write_text(json.dumps(done, indent=1))
        log.info("%s: %s%s", overrides, result["status"], " (found, not computed again)" if result.cached else "")
    auc = result.get("auc")
    return float(auc) if auc is not None else None


def _out_of_space(e: Exception, cfg: DictConfig) -> Exception:
    """A full disk is no bug: say what to do. Libraries wrap the error, or keep only its text."""
    chain: BaseException | None = e
    while chain is not None:
        text = str(chain)
        if (isinstance(chain, OSError) and chain.errno in DISK_FULL) or "No space left" in text or "File too large" in text:
            return UserError(f"output_dir={cfg.output_dir}: the disk is full; free some space and run the same command again, it resumes")
        chain = chain.__cause__ or chain.__context__
    return e


def guard(main: Callable[[], Any]) -> None:
    """Run the command line: a user's mistake gives one line and exit status 1, a bug its traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let exceptions through, unformatted
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        main()
    except (UserError, HydraException, OmegaConfBaseException) as e:
        _print_results()
        _print_failures(one_line(e))
        sys.exit(1)
    except OSError as e:
        if _finished or _failed:
            _print_results()
            raise
        print(f"error: output_dir: {e.filename} cannot be written to ({e.strerror}); give another folder", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BaseException:
        _print_results()
        raise
    _print_results()


def _print_failures(last: str) -> None:
    if len(_failed) > 1:
        for overrides, line in _failed:
            print(f"failed: {overrides}: {line}", file=sys.stderr)
    else:
        print(f"error: {last}", file=sys.stderr)


def one_line(e: BaseException) -> str:
    """An error as one line, Hydra's with the nearest names added."""
    text = str(e) or type(e).__name__
    if isinstance(e, UserError):
        return " ".join(text.split())
    if match := re.search(r"(?:Could not find|In '[^']*': Could not find) '([\w/]+)/([^'/]+)'", text):
        group, given = match.groups()
        options = list(_options(group))
        hint = near(given, options)
        return f"{group}={given}: no such {group}; there are {', '.join(options)}{hint}" if options else f"{group}={given}: no such option"
    if match := re.search(
        r"(?:Could not override|Key|Error merging override) '?([\w.@/]+?)(?:=[^']*)?'?(?: is not in struct|[.\n]|$)", text
    ):
        key = match.group(1)
        return f"{key}: no such key{near(key, _keys())}; see python run.py --cfg job"
    return " ".join(text.split())


def _conf() -> Path:
    return Path(sys.argv[0]).resolve().parent / "conf"


def _options(group: str) -> Iterator[str]:
    return (f.stem for f in sorted((_conf() / group).glob("*.yaml")))


def _keys() -> list[str]:
    """Every key of the shipped configs, as it is overridden."""
    keys: set[str] = set()

    def walk(prefix: str, node: Any) -> None:
        for name, child in node.items():
            keys.add(f"{prefix}{name}")
            if isinstance(child, dict):
                walk(f"{prefix}{name}.", child)

    for f in _conf().rglob("*.yaml"):
        group = f.relative_to(_conf()).parent
        if group.parts[:1] in ((), ("hydra",), ("experiment",), ("cluster",), ("debug",), ("local",)) and f.name != "config.yaml":
            continue
        content = OmegaConf.to_container(OmegaConf.load(f))
        if isinstance(content, dict):
            keys.update(group.parts)
            walk("".join(f"{part}." for part in group.parts), {k: v for k, v in content.items() if k not in ("defaults", "hydra")})
    return sorted(keys)


def _print_results() -> None:
    rows = [r for r in _finished if r["status"] != "trained"]
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    fprs = list(dict.fromkeys(fpr for r in rows for fpr in r.get("tpr_at_fpr", {}) if fpr in ("0.01", "0.001")))
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("attack", "threat model", "dataset", "seed"):
        table.add_column(heading, no_wrap=True)
    for heading in ("AUC [95% interval]", *(f"TPR@{float(fpr):.1%} FPR" for fpr in fprs), "evals/image", "time"):
        table.add_column(heading, justify="right")
    for r in rows:
        start = [r["attack"], r["threat_model"], r["dataset"], str(r["seed"])]
        if r["status"] != "done":
            table.add_row(*start, r["status"])
            continue
        cost = [f"{r['nfe_per_image']:g}", "found" if r.cached else f"{r['seconds']:.1f} s"]
        table.add_row(*start, _interval(r["auc"], r["auc_ci"]), *(_tpr(r, fpr) for fpr in fprs), *cost)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    if len(rows) == 1 and rows[0].folder is not None:
        console.print(f"run folder: {rows[0].folder}", soft_wrap=True, highlight=False)
    for address in dict.fromkeys(_sync_command(r.tracked) for r in rows if r.tracked):
        console.print(f"W&B: {address}", soft_wrap=True, highlight=False)


def _sync_command(tracked: str) -> str:
    """The address of an online run, or the command that uploads the offline ones, training runs included."""
    return tracked if "://" in tracked else f"wandb sync --yes {os.path.dirname(tracked)}/offline-run-*"


def _interval(value: float, ci: list[float]) -> str:
    return f"{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"


def _tpr(result: dict[str, Any], fpr: str) -> str:
    at = result["tpr_at_fpr"][fpr]
    if not at["resolvable"]:
        return f"unresolvable (1/{result['n_nonmembers']})"
    return _interval(at["tpr"], at["ci"])
