"""Configs as the command line composes them, without a command line."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).parents[1] / "conf"


def composed(*overrides: str) -> dict[str, Any]:
    """The resolved config of `python run.py <overrides>`."""
    return copy.deepcopy(_composed(overrides))


@cache  # Hydra takes a fifth of a second
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", list(overrides)), resolve=True)  # type: ignore[return-value]


def names(group: str) -> list[str]:
    """The options of a config group; of attacks, without other names of the same (`gsa`)."""
    return sorted(f.stem for f in (CONF / group).glob("*.yaml") if group != "attack" or "\n_target_:" in f.read_text())
