"""What every defence promises, for every conf/defense/*.yaml: it composes, trains and is attacked, and is stored apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from diffmia_exp import defenses, specs
from diffmia_exp.config import checked
from diffmia_exp.defenses.base import Defense
from diffmia_exp.experiment import Experiment
from diffmia_exp.pipeline import run
from diffmia_exp.scores import ScoreTable
from diffmia_exp.workshop import Workshop
from tests.composing import CONF, composed, names

NEEDS = {"randaugment": "kornia"}
QUICK = ["debug=quick", "attack=pia", "training.steps=3", "split.pool=24", "split.public=8", "model.block_out_channels=[8,8]"]


def experiment(name: str, out: Path) -> Experiment:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    e = Experiment(checked(composed(*QUICK, f"defense={name}", f"output_dir={out}")))
    e.load()
    return e


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("out")


def test_every_config_is_called_as_its_file_and_every_defence_has_one() -> None:
    targets = set()
    for name in names("defense"):
        config = yaml.safe_load((CONF / "defense" / f"{name}.yaml").read_text())
        assert config["name"] == name
        targets.add(config["_target_"].split(".")[-2])
    files = {file.stem for file in Path(defenses.__file__).parent.glob("*.py") if f"({Defense.__name__}):" in file.read_text()}
    assert files <= targets


@pytest.mark.parametrize("name", names("defense"))
def test_it_trains_and_is_attacked_and_keeps_its_own_place(name: str, out: Path) -> None:
    e, bare = experiment(name, out), experiment("none", out)
    table = ScoreTable.load(Workshop(e).scores() / "scores.parquet")
    assert len(table.score) == 24
    assert (specs.key(e, 0) == specs.key(bare, 0)) == (not e.defense.trains or name == "none")
    assert (specs.run_key(e) == specs.run_key(bare)) == (name == "none")
    told = json.loads((e.stores["models"].root / specs.key(e, 0) / "training.json").read_text())
    assert told["epochs"] == pytest.approx(told["steps"] * 8 / told["n_members"])


def test_metrics_name_the_defence_and_group_members_by_their_copies(out: Path) -> None:
    from sklearn.metrics import roc_auc_score

    config = composed(*QUICK, "split.pool=64", "split.copies=[1,2,4]", "defense=cutout", f"output_dir={out}", "evaluation=bare")
    result = run(config)
    assert result.folder is not None
    assert result["defense"] == "cutout"
    e = Experiment(checked(config))
    e.load()
    copies = dict(zip(e.images.sample_id.tolist(), e.split.copies.tolist(), strict=True))  # type: ignore[union-attr]
    table = ScoreTable.load(result.folder / "scores.parquet")
    assert sum(group["n_members"] for group in result["auc_by_copies"].values()) == table.is_member.sum()
    for number, group in result["auc_by_copies"].items():
        of = [not member or copies[i] == int(number) for i, member in zip(table.sample_id.tolist(), table.is_member, strict=True)]
        assert group["auc"] == pytest.approx(roc_auc_score(table.is_member[of], table.score[of]))
        assert group["auc_ci"][0] <= group["auc"] <= group["auc_ci"][1]
