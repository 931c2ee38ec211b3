"""From resolved config to objects: the one place that instantiates, for allowed targets only."""

from __future__ import annotations

import functools
import inspect
import pydoc
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from omegaconf import OmegaConf

from diffmia_exp.errors import ConfigError, UserError, choice, flag, near, number, whole

ALLOWED = ("diffmia_exp.", "diffusers.", "torch.nn.", "torch.optim.", "pytorch_lightning.", "opacus.", "sklearn.")
"""Where a `_target_` may point: a config is data, and may come from someone else."""

GROUPS = (
    "dataset",
    "split",
    "model",
    "diffusion",
    "training",
    "defense",
    "trainer",
    "threat_model",
    "attack",
    "evaluation",
    "utility",
    "tracking",
    "cluster",
)
"""The groups whose choices a config holds."""

SETTINGS = ("seed", "stage", "model_index", "part", "weights", "snapshot", "checkpoint", "on_incompatible", "name", "output_dir")
"""What a config holds beside them."""

NO_UTILITY: dict[str, Any] = {"name": "none"}
"""conf/utility/none.yaml: a group that a checked config only has where it asks for something, so that all others stay as they were."""

STAGES = ("all", "train", "attack", "report")

OF_CONDITIONAL_MODELS = {"dataset": "label_column", "diffusion": "conditional", "training": "label_dropout", "threat_model": "knows_label"}
"""What means something for class-conditional models alone. Else it is left out, and so is part of no key."""

UNDEFENDED = "diffmia_exp.defenses.base.Defense"
"""The absence of a defence, where `threat_model.shadow_defense` means nothing and is left out too."""

Plain = dict[str, Any]

OmegaConf.register_new_resolver("or", lambda value, otherwise: value or otherwise, replace=True)
"""In configs: `${or:${x},y}` is y where x is null."""


def _when_training(stage: str, wanted: Any) -> int:
    """What a SLURM job asks for if it trains, else 1."""
    if stage in ("attack", "report"):
        return 1
    if wanted == "auto":
        raise ConfigError("trainer.devices", wanted, "must be a number with cluster=slurm, the devices of a node")
    return whole("trainer.devices", wanted, least=1)


OmegaConf.register_new_resolver("share", lambda part, of: round(part * of), replace=True)
"""In configs: `${share:0.2,1000}` is 200."""

OmegaConf.register_new_resolver("when_training", _when_training, replace=True)
OmegaConf.register_new_resolver("gpus_a_node", lambda accelerator, devices: None if accelerator == "cpu" else devices, replace=True)


def plain(cfg: Mapping[str, Any]) -> Plain:
    """A resolved config as plain Python values.

    Raises:
        ConfigError: for a mandatory value that was not given (`???`) or an interpolation that leads nowhere.
    """
    from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

    try:
        return OmegaConf.to_container(OmegaConf.create(dict(cfg)), resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as e:
        key = e.full_key or str(e).split(": ")[-1]
        raise ConfigError(key, "???", f"must be given on the command line, as {key}=...") from None
    except InterpolationResolutionError as e:
        raise ConfigError(e.full_key or "config", "${..}", f"refers to what is not there ({_first_line(e)}); give a value") from None


def checked(cfg: Mapping[str, Any]) -> Plain:
    """A config as plain values, every mistake found that can be found before anything heavy is imported.

    Raises:
        ConfigError: see `plain`; or for a key that is unknown or missing, a setting out of range, a `_target_` not allowed.
    """
    config = plain(cfg)
    if config.get("utility") in (None, NO_UTILITY):
        config.pop("utility", None)
    known = (*GROUPS, *SETTINGS)
    for key in config:
        if key in ("experiment", "debug", "local"):
            raise ConfigError(key, config[key], f"a file in conf/{key} must begin with the line # @package _global_")
        if key not in known:
            raise ConfigError(key, config[key], f"no such key{near(key, known)}; leave it out")
    for key in known:
        if key not in config and key != "utility":
            raise ConfigError(key, None, "is missing; do not delete it")
    whole("seed", config["seed"], least=0)
    choice("stage", config["stage"], STAGES)
    choice("weights", config["weights"], ("ema", "raw"))
    if config["on_incompatible"] is not None:
        choice("on_incompatible", config["on_incompatible"], ("error", "skip"))
    for group in (group for group in GROUPS if group in config):
        if not isinstance(config[group], dict):
            raise ConfigError(group, config[group], f"must be one of the files in conf/{group}")
        list(_targets(group, config[group]))
    if not flag("diffusion.conditional", config["diffusion"].get("conditional", False)):
        flag("threat_model.knows_label", config["threat_model"].get("knows_label", True))
        number("training.label_dropout", config["training"].get("label_dropout", 0), least=0, most=1)
        for group, key in OF_CONDITIONAL_MODELS.items():
            config[group].pop(key, None)
    if config["defense"].get("_target_") == UNDEFENDED:
        flag("threat_model.shadow_defense", config["threat_model"].get("shadow_defense", True))
        config["threat_model"].pop("shadow_defense", None)
    return config


def build(group: str, cfg: Plain, kind: type = object, **extra: Any) -> Any:
    """The object that a group's config describes: `_target_` called with the other keys (but `name`) and `extra`.

    A mistake that the constructor finds is reported under `group`, and so is an object that is no `kind`.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if "_target_" not in cfg:
        raise ConfigError(f"{group}._target_", None, f"must be given, as in conf/{group}")
    target, arguments = cfg["_target_"], {k: v for k, v in cfg.items() if k != "name"}
    located = {key: _located(key, name) for key, name in _targets(group, cfg)}
    _check_arguments(group, located[f"{group}._target_"], arguments, extra)
    try:
        made = instantiate(arguments, **extra, _convert_="all")
    except ConfigError as e:
        raise e.under(group) from None
    except InstantiationException as e:
        cause = e.__cause__ or e
        if isinstance(cause, ConfigError):
            raise cause.under(group) from None
        ours = str(target).startswith("diffmia_exp.") and not isinstance(cause, TypeError | ValueError | InstantiationException)
        if ours or isinstance(cause, UserError | OSError):
            raise cause from None
        raise ConfigError(group, target, f"refuses these settings ({_first_line(cause)}); see conf/{group}") from e
    if not isinstance(made, kind):
        raise ConfigError(f"{group}._target_", target, f"must make an object of class {kind.__module__}.{kind.__qualname__}")
    return made


def takes(group: str, cfg: Plain, setting: str) -> bool:
    """Whether what a group's config describes has a setting of this name."""
    parameters = inspect.signature(_located(f"{group}._target_", cfg["_target_"])).parameters
    return setting in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def in_its_types(group: str, cfg: Plain) -> Plain:
    """A group's settings, with whole numbers as floats where its `_target_` takes a float: 10 and 10.0 are one setting, and one key."""
    floats = _floats(_located(f"{group}._target_", cfg["_target_"])) if "_target_" in cfg else ()

    def typed(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return in_its_types(f"{group}.{name}", value)
        return float(value) if type(value) is int and name in floats else value

    return {name: typed(name, value) for name, value in cfg.items()}


@functools.cache  # a grid asks for every model of every cell
def _floats(target: Any) -> frozenset[str]:
    """The parameters that take a float and no whole number; none where annotations are there for type checkers alone."""
    try:
        parameters = inspect.signature(target, eval_str=True).parameters
    except (ValueError, NameError, TypeError, AttributeError):
        return frozenset()
    kinds = {name: get_args(p.annotation) or (p.annotation,) for name, p in parameters.items()}
    return frozenset(name for name, taken in kinds.items() if float in taken and int not in taken)


def _targets(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Every `_target_` below a node, with its key; refused unless its name is allowed."""
    if isinstance(node, dict):
        if "_target_" in node:
            if not str(node["_target_"]).startswith(ALLOWED):
                raise ConfigError(f"{key}._target_", node["_target_"], f"must begin with one of {' '.join(ALLOWED)}")
            yield f"{key}._target_", node["_target_"]
        for name, child in node.items():
            yield from _targets(f"{key}.{name}", child)
    elif isinstance(node, list):
        for n, child in enumerate(node):
            yield from _targets(f"{key}[{n}]", child)


def _located(key: str, target: str) -> Any:
    """What a `_target_` names; refused unless it is also defined where targets may be, for a module's imports can be named through it."""
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as e:
        raise ConfigError(key, target, f"cannot be imported ({_first_line(e)})") from None
    if not callable(found):
        raise ConfigError(key, target, "no such class or function")
    module = getattr(found, "__module__", None)
    if not f"{module}.".startswith(ALLOWED):
        raise ConfigError(key, target, f"must be defined in one of {' '.join(ALLOWED)}, not in {module}")
    return found


def _check_arguments(group: str, target: Any, arguments: Plain, extra: Plain) -> None:
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # of some built-in classes
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in arguments:
        if not name.startswith("_") and (name not in parameters or name in extra):
            options = [p for p in parameters if p not in extra]
            raise ConfigError(f"{group}.{name}", arguments[name], f"no such setting; there are {', '.join(options)}{near(name, options)}")


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
