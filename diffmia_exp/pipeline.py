"""The whole method: split -> target from the store -> access -> scores -> metrics -> run folder -> tracking."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from typing import Any

from diffmia_exp import checks, ranks, runs, specs
from diffmia_exp.config import checked
from diffmia_exp.errors import ConfigError
from diffmia_exp.experiment import Experiment
from diffmia_exp.workshop import Workshop

log = logging.getLogger(__name__)


def run(cfg: Mapping[str, Any], sweep: str | None = None) -> runs.Result:
    """Do what a config says, or find it done. Returns what `metrics.json` holds."""
    config = checked(cfg)
    skip = (config["on_incompatible"] or ("skip" if sweep else "error")) == "skip"
    experiment = Experiment(config, sweep)
    with runs.logged() as text:
        try:
            checks.access(experiment)
        except checks.NotApplicable as e:
            if not skip:
                raise
            return runs.not_applicable(experiment.output_dir, experiment.name, config, str(e), text)
        experiment.load()
        workshop = Workshop(experiment)
        if ranks.rank():
            workshop.follow()
            return runs.Result({"status": "took part", "name": experiment.name})
        with workshop.ranks.leading():
            result = _work(experiment, workshop, text)
    if (folder := result.folder) is None:
        return result
    if experiment.tracking.effective_mode != "disabled" and not (folder / "wandb.json").exists():
        result.tracked = experiment.tracking.attack(experiment.output_dir, folder, config)
        (folder / "wandb.json").write_text(json.dumps({"folder": result.tracked} | experiment.tracking.place))
    return result


def _work(experiment: Experiment, workshop: Workshop, text: io.StringIO) -> runs.Result:
    facts = runs.identity(experiment.config) | {"name": experiment.name}
    if experiment.stage == "train":
        workshop.train_all()
        return runs.Result(facts | {"status": "trained", "train_key": specs.key(experiment, experiment.target_index)})
    folder = runs.folder(experiment.output_dir, experiment.name, specs.run_key(experiment))
    result = None if experiment.stage == "report" else runs.finished(folder, specs.run_key(experiment))
    if result is None:
        _must_be_stored(experiment)
        if experiment.part is not None:
            workshop.measure_part(*experiment.part)
            return runs.Result(facts | {"status": "measured"})
        with runs.exclusively(folder):
            # By another process meanwhile.
            result = None if experiment.stage == "report" else runs.finished(folder, specs.run_key(experiment))
            if result is None:
                from diffmia_exp import results  # seconds to import, and a cached run needs none of it

                with runs.writing(folder, text) as unfinished:
                    result = results.write(unfinished, folder.name, workshop)
                    runs.alarm(text, result["unsound"])
    result.folder = folder
    return result


def _must_be_stored(experiment: Experiment) -> None:
    """A stage that builds on another one never does that one's work unasked."""
    if experiment.stage == "attack":
        missing = [index for index in experiment.models if experiment.stores["models"].get(specs.model(experiment, index)) is None]
        if missing:
            which = f"model {missing[0]}" if len(missing) == 1 else f"models {', '.join(map(str, missing))}"
            raise ConfigError("stage", "attack", f"needs {which} to be trained; run the same with stage=train first")
    if experiment.stage == "report" and experiment.stores["scores"].get(specs.scores(experiment)) is None:
        raise ConfigError("stage", "report", "needs the scores of this cell; run the same with stage=all first")
