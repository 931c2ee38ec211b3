"""The shipped experiments on public data: each cell is granted, fed and built, on folders of noise in the data's layout."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from diffmia_exp.config import checked
from diffmia_exp.experiment import Experiment
from diffmia_exp.pipeline import run
from tests.composing import CONF, composed, names

EXPERIMENTS = [name for name in names("experiment") if name.startswith(("cifar10", "fashion"))]


def on_noise(name: str, root: Path) -> list[str]:
    """The overrides of an experiment on 160 images of noise, named and shaped as its data set's."""
    column, shape = ("img", (32, 32, 3)) if name.startswith("cifar10") else ("image", (28, 28))
    noise = np.random.default_rng(0).integers(0, 256, (160, *shape), dtype=np.uint8)
    table = {column: [Image.fromarray(image) for image in noise]}
    (root / "data").mkdir()
    file = root / "data" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(table, features=datasets.Features({column: datasets.Image()})).to_parquet(file)
    small = ["split.n_members=8", "split.n_nonmembers=8"] if name == "cifar10" else ["split.pool=24", "split.public=128"]
    return [f"experiment={name}", f"dataset.path={root}", f"output_dir={root}/out", "trainer=cpu", "tracking=none", *small]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_attack_of_an_experiment_is_granted_and_fed(name: str, tmp_path: Path) -> None:
    overrides = on_noise(name, tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
    swept = dict(config.hydra.sweeper.params or {})
    granted = set()
    for attack in swept.get("attack", "pia").split(","):
        for threat_model in swept.get("threat_model", "gray_box").split(","):
            cell = Experiment(checked(composed(*overrides, f"attack={attack}", f"threat_model={threat_model}")))
            if cell.threat_model.grants(cell.attack.access):
                cell.load()
                granted.add(attack)
    assert granted == set(swept.get("attack", "pia").split(","))


def test_the_standard_recipe_takes_a_step(tmp_path: Path) -> None:
    """The 35.7M parameters of experiment=cifar10, on a CPU."""
    run(composed(*on_noise("cifar10", tmp_path), "stage=train", "attack=loss", "training.steps=1", "training.batch_size=2"))
    (entry,) = (tmp_path / "out" / "models").iterdir()
    assert (entry / "ema.safetensors").stat().st_size > 4 * 35.7e6
