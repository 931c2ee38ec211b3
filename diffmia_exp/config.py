"""From resolved config to objects: the one place that instantiates, for allowed targets only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffmia_exp.errors import ConfigError, near

ALLOWED = ("diffmia_exp.", "diffusers.", "torch.nn.", "torch.optim.", "pytorch_lightning.", "opacus.", "sklearn.")
"""Where a `_target_` may point: a config is data, and may come from someone else."""

Plain = dict[str, Any]


def plain(cfg: Mapping[str, Any]) -> Plain:
    """A resolved config as plain Python values.

    Raises:
        ConfigError: for a mandatory value that was not given (`???`) or an interpolation that leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

    try:
        return OmegaConf.to_container(OmegaConf.create(dict(cfg)), resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as e:
        key = e.full_key or str(e).split(": ")[-1]
        raise ConfigError(key, "???", f"must be given on the command line, as {key}=...") from None
    except InterpolationResolutionError as e:
        raise ConfigError(e.full_key or "config", "${..}", str(e).splitlines()[0]) from None


def build(group: str, cfg: Plain, **extra: Any) -> Any:
    """The object that a group's config describes: `_target_` called with the other keys (but `name`) and `extra`.

    A mistake that the constructor finds is reported under `group`.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    _check_targets(group, cfg)
    arguments = {k: v for k, v in cfg.items() if k != "name"}
    _check_arguments(group, arguments, extra)
    try:
        return instantiate(arguments, **extra, _convert_="all")
    except InstantiationException as e:
        cause = e.__cause__
        if isinstance(cause, ConfigError):
            raise cause.under(group) from None
        if isinstance(cause, TypeError | ValueError):
            raise ConfigError(group, cfg["_target_"], f"refuses these settings ({str(cause).splitlines()[0]})") from e
        raise cause or e from None
    except ConfigError as e:
        raise e.under(group) from None


def _check_targets(key: str, node: Any) -> None:
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and not str(target).startswith(ALLOWED):
            raise ConfigError(f"{key}._target_", target, f"must begin with one of {' '.join(ALLOWED)}")
        for name, child in node.items():
            _check_targets(f"{key}.{name}", child)
    elif isinstance(node, list):
        for n, child in enumerate(node):
            _check_targets(f"{key}[{n}]", child)


def _check_arguments(group: str, arguments: Plain, extra: Plain) -> None:
    from hydra.utils import get_object

    try:
        target = get_object(arguments["_target_"])
        parameters = inspect.signature(target).parameters
    except (ImportError, ValueError) as e:
        raise ConfigError(f"{group}._target_", arguments["_target_"], f"cannot be loaded ({str(e).splitlines()[0]})") from None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in arguments:
        if not name.startswith("_") and (name not in parameters or name in extra):
            options = [p for p in parameters if p not in extra]
            raise ConfigError(f"{group}.{name}", arguments[name], f"no such setting; there are {', '.join(options)}{near(name, options)}")
