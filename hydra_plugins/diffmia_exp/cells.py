"""hydra/sweeper=cells: Hydra's basic sweeper, for grids that outlive their failures.

Every cell is written down before the first one starts. A failing cell does not stop the others. `stage=train` gives one cell to
each model that the grid needs and the store lacks. `hydra.sweeper.again=FOLDER` runs the unfinished cells of another grid.
"""

import json
import logging
import multiprocessing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from omegaconf import OmegaConf

from diffmia_exp import cli, grid

log = logging.getLogger(__name__)

Overrides = list[str]


@dataclass
class CellsConf:
    """Settings of the sweeper."""

    _target_: str = "hydra_plugins.diffmia_exp.cells.Cells"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None
    again: str | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="cells", node=CellsConf, provider="diffmia_exp")


class Cells(BasicSweeper):
    """The product of all choices, cell by cell.

    Args:
        max_batch_size: cells handed to the launcher at once; None for all.
        params: overrides of an experiment's file.
        again: folder of a grid whose unfinished cells are run instead.
    """

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None, again: str | None = None) -> None:
        super().__init__(max_batch_size, params)
        self.again = again

    def sweep(self, arguments: list[str]) -> Any:
        """Run all cells. Results and failures are left with `diffmia_exp.cli`."""
        assert self.config is not None
        assert self.launcher is not None
        configure_log(self.config.hydra.job_logging, self.config.hydra.verbose)
        folder = Path(str(self.config.hydra.sweep.dir))
        cells = self._product(arguments) if self.again is None else _again(Path(self.again), arguments)
        self.validate_batch_is_legal(cells)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        if self.config.get("stage") == "train" and self.again is None:
            cells = self._one_model_a_cell(cells)
        grid.plan(folder, cells, [o for o in self.config.hydra.overrides.hydra if not o.startswith("hydra.sweep.dir=")], arguments)
        size = self.max_batch_size or max(1, len(cells))
        for start in range(0, len(cells), size):
            self.launcher.launch(cells[start : start + size], initial_job_idx=start)
        cli.gather(folder)
        return None

    def _product(self, arguments: list[str]) -> list[Overrides]:
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return self.split_arguments(parser.parse_overrides([*self._parse_config(), *arguments]), None)[0]

    def _one_model_a_cell(self, cells: list[Overrides]) -> list[Overrides]:
        """Found out in a process of its own, so that this one stays small, and safe to fork."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=self._find_models, args=(cells, sender))
        process.start()
        sender.close()
        try:
            found: list[Overrides] | None = receiver.recv()
        except EOFError:
            found = None
        process.join()
        if found is None:
            raise RuntimeError("the models of the grid could not be enumerated; see above")
        return found

    def _find_models(self, cells: list[Overrides], answer: Connection) -> None:
        from diffmia_exp import models  # torch, seconds to import

        assert self.hydra_context is not None
        assert self.config is not None
        compose = partial(self.hydra_context.config_loader.load_sweep_config, self.config)
        answer.send(models.missing(cells, compose))


def _again(sweep: Path, arguments: list[str]) -> list[Overrides]:
    """The unfinished cells of a grid, with what is given beyond the arguments it was begun with."""
    given = arguments[len(grid.planned(sweep)["task"]) :]
    changed = tuple(f"{override.split('=')[0]}=" for override in given)
    cells = [[*(o for o in cell if not o.startswith(changed)), *given] for cell in grid.unfinished(sweep)]
    log.info("%s: %d cells failed or were lost, and are run again", sweep, len(cells))
    return [json.loads(text) for text in dict.fromkeys(map(json.dumps, cells))]
