"""Shadow models through the whole pipeline: trained once, measured once, in any role."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from diffmia_exp import specs, split
from diffmia_exp.config import checked
from diffmia_exp.experiment import Experiment
from tests.composing import composed, names
from tests.test_pipeline import quick

MODELS = ["split.n_models=4", "split.pool=48", "split.public=40"]


def entries(out: Path, kind: str) -> set[str]:
    return {path.name for path in out.glob(f"{kind}/*") if (path / "DONE").exists()}


@pytest.fixture(scope="module")
def lira(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lira")
    for index in (2, 0):  # as two machines would
        quick(out, *MODELS, "attack=lira", "stage=train", f"model_index={index}")
    assert len(entries(out, "models")) == 2
    result = quick(out, *MODELS, "attack=lira")
    assert result["shadow_trainings"] == 3
    assert result["label"] == "lira(multi_loss)"
    return out


@pytest.mark.parametrize(
    ("settings", "n_models"),
    [
        (["attack=pia"], 1),
        (["attack=gsa", "threat_model=white_box"], 2),
        (["attack=lira"], 3),
        (["attack=pia", "attack.select=shadow"], 2),
        (["attack=pia", "split.target_index=4"], 5),
        (["attack=lira", "split.n_models=6"], 6),
    ],
)
def test_without_a_number_there_are_as_few_shadows_as_the_attack_needs(settings: list[str], n_models: int, tmp_path: Path) -> None:
    experiment = Experiment(checked(composed("debug=quick", "split.pool=32", f"output_dir={tmp_path}", *settings)))
    experiment.load()
    assert experiment.split.n_models == experiment.config["split"]["n_models"] == n_models


def test_models_and_signals_serve_in_every_role(lira: Path) -> None:
    models, signals = entries(lira, "models"), entries(lira, "signals")
    assert (len(models), len(signals)) == (4, 4)
    for overrides in (["attack=lira", "split.target_index=3"], ["attack=lira", "attack.online=false"], ["attack=reference"]):
        result = quick(lira, *MODELS, *overrides)
        assert result["nfe_per_image"] == 6
        assert result["selection"]["rehearsals"] == 3
    assert entries(lira, "models") == models
    assert entries(lira, "signals") == signals
    multi = quick(lira, *MODELS, "attack=multi_loss", "split.target_index=1")
    assert multi["shadow_trainings"] == 0
    assert entries(lira, "signals") == signals, "a plain host has the signals that lira took from it"
    again = quick(lira, *MODELS, "attack=lira")
    assert again.cached


def test_what_the_adversary_gets_wrong_makes_other_shadows_of_the_same_target(lira: Path) -> None:
    before = entries(lira, "models")
    right = quick(lira, *MODELS, "attack=reference")
    wrong = quick(lira, *MODELS, "attack=reference", "threat_model.shadow_training={steps: 3}")
    assert wrong["train_key"] == right["train_key"]
    made = entries(lira, "models") - before
    assert len(made) == 3
    assert {yaml.safe_load((lira / "models" / key / "spec.yaml").read_text())["training"]["steps"] for key in made} == {3}
    net = Experiment(checked(composed("threat_model.shadow_model={block_out_channels: [16, 32]}", f"output_dir={lira}", *MODELS)))
    net.load()
    assert specs.model(net, 0)["model"]["block_out_channels"] == [32, 64]
    assert specs.model(net, 1)["model"]["block_out_channels"] == [16, 32]


def test_settings_and_thresholds_come_from_shadows_and_are_reported(lira: Path) -> None:
    result = quick(lira, *MODELS, "attack=pia", "attack.select=shadow", "attack.rehearsals=2", "attack.grid={t: [100, 200], p: [2]}")
    chosen = result["selection"]
    assert chosen["select"] == "shadow"
    assert chosen["rehearsals"] == 2
    assert chosen["settings"] in [tried["settings"] for tried in chosen["tried"]]
    assert chosen["shadow_auc"] == max(tried["shadow_auc"] for tried in chosen["tried"])
    assert len(chosen["tried"]) == 2
    assert set(result["transfer"]) == {"0.1"}  # some 50 non-members of the rehearsals resolve no lower rate
    at = result["transfer"]["0.1"]
    assert 0 <= at["fpr_ci"][0] <= at["fpr"] <= at["fpr_ci"][1] <= 1


def test_generated_images_are_drawn_once_and_shared(tmp_path: Path) -> None:
    few = ["threat_model=samples_only", "attack.n_samples=32", "attack.steps=4", "split.pool=48", "split.public=64"]
    for attack in ("knn", "monte_carlo", "discriminator"):
        result = quick(tmp_path, *few, f"attack={attack}")
        assert result["nfe_per_image"] == pytest.approx(128 / (48 + (64 if attack == "discriminator" else 0)))
    stored = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("samples/*/spec.yaml")]
    assert sorted(spec["n"] for spec in stored) == [32, 64]  # those, and the run folder's preview
    surrogate = quick(tmp_path, *few, "attack=surrogate", "attack.host.stride=250")
    assert surrogate["status"] == "done"
    assert surrogate["shadow_trainings"] == 1
    assert len(entries(tmp_path, "models")) == 2
    trained = {key: yaml.safe_load((tmp_path / "models" / key / "spec.yaml").read_text()) for key in entries(tmp_path, "models")}
    own = next(spec for key, spec in trained.items() if key != surrogate["train_key"])
    assert own["n_members"] == 32
    assert own["seed"] != trained[surrogate["train_key"]]["seed"], "the adversary does not know the target's initialisation"
    assert len(list(tmp_path.glob("samples/*"))) == 2


@pytest.mark.parametrize("make", [split.bernoulli, split.exact])
def test_public_images_are_in_no_pool_and_change_no_draw(make: object) -> None:
    sizes = {"pool": 60} if make is split.bernoulli else {"n_members": 30, "n_nonmembers": 30}
    ids = np.arange(200) * 3
    for shadow_pool in ("same", "disjoint"):
        without = make(ids, 5, n_models=4, shadow_pool=shadow_pool, **sizes)  # type: ignore[operator]
        with_public = make(ids, 5, n_models=4, shadow_pool=shadow_pool, public=50, **sizes)  # type: ignore[operator]
        assert with_public.public.sum() == 50
        assert not with_public.pool[:, with_public.public].any()
        assert not with_public.keep[:, with_public.public].any()
        rest = ~with_public.public
        assert np.array_equal(with_public.sample_id[rest], without.sample_id)
        assert np.array_equal(with_public.keep[:, rest], without.keep)


@pytest.mark.parametrize("name", [name for name in names("experiment") if name.startswith("headline")])
def test_every_part_of_the_headline_uses_the_same_models(name: str, tmp_path: Path) -> None:
    experiment = Experiment(checked(composed(f"experiment={name}", f"output_dir={tmp_path}")))
    experiment.load()
    assert experiment.split.n_models == 17
    assert specs.key(experiment, 0) == "32ab285070feeb10"
    assert 200 < experiment.keep.sum() < 312


@pytest.mark.parametrize(
    ("whole", "fraction"),
    [
        (["training.grad_clip=1"], ["training.grad_clip=1.0"]),
        (["model.dropout=0", "training.weight_decay=0"], ["model.dropout=0.0", "training.weight_decay=0.0"]),
        (["defense=dp_sgd", "defense.epsilon=10"], ["defense=dp_sgd", "defense.epsilon=10.0"]),
        (["diffusion.schedule.beta_end=0.02"], ["diffusion.schedule.beta_end=2e-2"]),
    ],
)
def test_a_number_has_one_key_however_it_is_typed(whole: list[str], fraction: list[str], tmp_path: Path) -> None:
    def keys(overrides: list[str]) -> list[str]:
        e = Experiment(checked(composed("split.n_models=2", "training.batch_size=32", f"output_dir={tmp_path}", *overrides)))
        e.load()
        return [specs.key(e, index) for index in (0, 1, e.untrained)]

    assert keys(whole) == keys(fraction)
    assert keys(whole) != keys(["training.grad_clip=2"])
