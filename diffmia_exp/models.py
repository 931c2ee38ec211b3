"""The models that a grid needs: each once, whichever cells ask for it and in whatever role."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffmia_exp import checks, specs
from diffmia_exp.config import checked
from diffmia_exp.errors import UserError
from diffmia_exp.experiment import Experiment

log = logging.getLogger(__name__)


def missing(cells: Sequence[Sequence[str]], compose: Callable[[list[str]], Mapping[str, Any]]) -> list[list[str]]:
    """The trainings that a grid lacks.

    Args:
        cells: the overrides of each cell.
        compose: from overrides to config.

    Returns:
        the overrides of a cell for each model that the store lacks, which trains that one. A cell that cannot be checked stays as it
        is, to fail for itself; one that names its model, or that the threat model rules out, stays too.
    """
    wanted: list[list[str]] = []
    stored: dict[str, bool] = {}
    for overrides in cells:
        config = {k: v for k, v in compose(list(overrides)).items() if k != "hydra"}
        try:
            plain = checked(config)
            # What trains the models may not be there where they are enumerated; nothing in a key depends on it but the precision.
            plain["trainer"] |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
            plain["evaluation"]["device"] = "auto"
            experiment = Experiment(plain)
            checks.access(experiment)
            if plain["model_index"] is not None:
                wanted.append(list(overrides))
                continue
            experiment.load()
        except UserError:
            wanted.append(list(overrides))
            continue
        for index in experiment.models:
            spec = specs.model(experiment, index)
            if (key := experiment.stores["models"].key(spec)) in stored:
                continue
            stored[key] = experiment.stores["models"].get(spec) is not None
            if not stored[key]:
                wanted.append([*overrides, f"model_index={'held_out' if index == experiment.held_out else index}"])
    log.info("the grid needs %d models, of which %d are in the store", len(stored), sum(stored.values()))
    return wanted
