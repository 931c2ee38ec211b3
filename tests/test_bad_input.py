"""Users' mistakes on the real command line: one line that names the key and the remedy, and nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from diffmia_exp.config import GROUPS
from tests import command

ROOT = Path(__file__).parents[1]
ARRAYS = "dataset=arrays dataset.path={files}/images.npz dataset.image_size=8 dataset.channels=1"
FROM_FILE = f"{ARRAYS} split=from_file"

# What is wrong: the arguments, and for every cell that fails its key and a part of the remedy. {files} is the folder of `files`.
Mistakes = dict[str, tuple[str, list[tuple[str, str]]]]

BEFORE_ANYTHING_HEAVY: Mistakes = {
    "unknown option": ("--epochs=3", [("--epochs=3", "settings are given as key=value")]),
    "misspelt option": ("--multrun seed=1,2", [("--multrun", "did you mean --multirun")]),
    "unknown key": ("attack.tt=3", [("attack.tt", "did you mean attack.t")]),
    "unknown key at the top": ("sed=3", [("sed", "did you mean seed?")]),
    "key without its group": ("steps=10", [("steps", "did you mean training.steps or attack.steps or utility.steps?")]),
    "key of another choice": (
        "attack.stride=5",
        [("attack.stride", "or attack=secmi or attack=secmi_nns or attack=trajectory to have it")],
    ),
    "file in the wrong package": ("+experiment.seed=1", [("experiment=", "must begin with the line # @package _global_")]),
    "appended key": ("+foo=1", [("foo=1", "no such key")]),
    "unknown attack": ("attack=secmii", [("attack=secmii", "did you mean secmi or secmi_nns?")]),
    "unknown defence": ("defense=cutuot", [("defense=cutuot", "did you mean cutout?")]),
    "unknown defence in a grid": ("-m defense=none,dropuot", [("defense=dropuot", "did you mean dropout?")]),
    "unknown data set": ("dataset=cifar", [("dataset=cifar", "did you mean cifar10?")]),
    "unknown experiment": ("experiment=grid", [("experiment=grid", "gray_box_grid")]),
    "unknown name in a grid": ("-m attack=pia,sim", [("attack=sim", "did you mean sima?")]),
    "launcher that is not installed": ("hydra/launcher=ray", [("hydra/launcher=ray", "there are basic")]),
    "SLURM without a number of devices": ("cluster=slurm trainer=ddp", [("ConfigError", "trainer.devices=auto: must be a number")]),
    "no name": ("attack=null", [("Config group override", "by its name, as attack=pia")]),
    "unreadable value": ("attack.t=[1", [("attack.t=[1", "write key=value")]),
    "several values without -m": ("attack=pia,secmi", [("attack=pia,secmi", "add -m")]),
    "deleted setting": ("~seed name=x", [("seed", "do not delete it")]),
    "reference to nothing": ("name={nope}", [("name", "give a value")]),
    "negative seed": ("seed=-1", [("seed=-1", "must be a whole number of at least 0")]),
    "no seed": ("seed=null", [("seed=null", "must be a whole number of at least 0")]),
    "unknown stage": ("stage=trian", [("stage=trian", "must be one of all, train, attack, report; did you mean train?")]),
    "unknown weights": ("weights=best", [("weights=best", "must be one of ema, raw")]),
    "mandatory value missing": ("dataset=arrays", [("dataset.path=???", "must be given on the command line")]),
    "target outside the project": ("attack._target_=os.system", [("attack._target_=os.system", "must begin with one of diffmia_exp.")]),
    "conditional or not": ("diffusion.conditional=perhaps", [("diffusion.conditional=perhaps", "must be true or false")]),
    "label known or not": ("threat_model.knows_label=1", [("threat_model.knows_label=1", "must be true or false")]),
    "share of labels": ("training.label_dropout=1.5", [("training.label_dropout=1.5", "must be a number of at least 0")]),
    "grid below a file": ("-m seed=1,2 output_dir={files}/file.txt/out", [("output_dir", "give another folder")]),
}

BEFORE_TRAINING: Mistakes = {
    "t outside the schedule": ("attack.t=1000", [("attack.t=1000", "must be a whole number of at most 999")]),
    "stride not dividing t": ("attack=secmi attack.stride=7", [("attack.stride=7", "must divide t=100")]),
    "slice of nothing": ("attack=trajectory attack.start=100", [("attack.start=100", "leaves nothing of 100 timesteps")]),
    "setting the attack has not": ("+attack.foo=1", [("attack.foo=1", "there are t, p")]),
    "targets": (
        "-m attack._target_=diffmia_exp.attacks.pia.Pia,diffmia_exp.cli.os.system,diffmia_exp.runs.Result",
        [
            ("attack._target_=diffmia_exp.attacks.pia.Pia", "no such class or function"),
            ("attack._target_=diffmia_exp.cli.os.system", "must be defined in one of diffmia_exp."),
            ("attack._target_=diffmia_exp.runs.Result", "must make an object of class diffmia_exp.attacks.base.Attack"),
        ],
    ),
    "budget below the cost": ("threat_model.query_budget=1", [("threat_model.query_budget=1", "must be at least 2")]),
    "too little access": ("threat_model=samples_only", [("threat_model=samples_only", "use threat_model=gray_box or white_box")]),
    "learning rate": ("-m training.lr=-1,0,fast", [(f"training.lr={lr}", "must be a number above 0") for lr in ("-1", "0", "fast")]),
    "FSDP and a defence that trains in its own way": (
        "-m trainer=fsdp trainer.devices=1 defense=dual_md,early_stopping",
        [
            ("trainer.strategy=fsdp", "cannot be had with defense=dual_md, which trains in its own way; use trainer=ddp or gpu"),
            ("trainer.strategy=fsdp", "cannot be had with defense=early_stopping"),
        ],
    ),
    "batch size": (
        "-m training.batch_size=-4,0,7 trainer.devices=2",
        [
            ("training.batch_size=-4", "of at least 1"),
            ("training.batch_size=0", "of at least 1"),
            ("training.batch_size=7", "must be a multiple of 2, the number of devices"),
        ],
    ),
    "strategy": (
        "-m trainer.devices=2 trainer.strategy=ddpp,ddp,fsdp",
        [
            ("trainer.strategy=ddpp", "must be one of auto, ddp, ddp_spawn, fsdp; did you mean ddp"),
            ("trainer.strategy=ddp", "the whole grid, once more for each device; use auto, or cluster=slurm"),
            ("trainer.strategy=fsdp", "the whole grid, once more for each device; use auto, or cluster=slurm"),
        ],
    ),
    "nodes without SLURM": ("trainer.num_nodes=2", [("trainer.num_nodes=2", "needs a SLURM task for every device; add cluster=slurm")]),
    "part of the images": (
        "-m part=0/4,5/4,half stage=attack",
        [("part=0/4", "k from 1 to n"), ("part=5/4", "k from 1 to n"), ("part=half", "must be k/n")],
    ),
    "no GPU": ("trainer.accelerator=gpu", [("trainer.accelerator=gpu", "use trainer=cpu")]),
    "snapshot not kept": ("snapshot=3", [("snapshot=3", "must be one of training.snapshots")]),
    "name that leaves the folder": ("name=../../x", [("name=../../x", "must be letters, digits")]),
    "folder below a file": ("output_dir={files}/file.txt/out", [("output_dir={files}/file.txt/out", "give another folder")]),
    "missing folder": ("dataset=fashion_mnist dataset.path={files}/no", [("dataset.path={files}/no", "give a folder")]),
    "image folders": (
        "-m dataset=image_folder dataset.image_size=8 split.pool=null dataset.path={files}/no,{files}/empty,{files}/corrupt",
        [
            ("dataset.path={files}/no", "give one that holds images"),
            ("dataset.path={files}/empty", "holds no image files"),
            ("dataset.path={files}/corrupt/03.png", "mend or remove the file"),
        ],
    ),
    "mixed sizes": (
        "dataset=fashion_mnist dataset.path={files}/mixed dataset.resize=false dataset.image_size=8 split.pool=null",
        [("dataset.image_size=8", "image 5 is 9x7; give its size or set dataset.resize=true")],
    ),
    "arrays": (
        f"-m {ARRAYS} dataset.image_size=16 dataset.path={{files}}/no.npz,{{files}}/pickled.npz,{{files}}/images.npz",
        [
            ("dataset.path={files}/no.npz", "give an npz file"),
            ("dataset.path={files}/pickled.npz", "cannot be read as an npz file of plain arrays"),
            ("dataset.image_size=16", "which holds 1x8x8 images"),
        ],
    ),
    "too few images": (f"{ARRAYS} split.pool=17", [("split.pool=17", "the data set has 16, so take at most 16")]),
    "sizes of the split": (
        f"-m {ARRAYS} split=exact split.n_nonmembers=4 split.n_members=0,13",
        [("split.n_members=0", "of at least 1"), ("split.n_members + split.n_nonmembers=17", "take at most 16")],
    ),
    "classes": (
        "-m dataset=arrays dataset.image_size=8 dataset.channels=1 split.pool=16 diffusion.conditional=true "
        "dataset.path={files}/images.npz,{files}/floats.npz,{files}/short.npz",
        [
            ("diffusion.conditional=True", "needs class labels, which dataset=arrays does not give; give them"),
            ("dataset.path={files}/floats.npz", "must give each image a label that is a whole number from 0"),
            ("dataset.path={files}/short.npz", "`labels` must be one whole number per image, 16 of them, not 15"),
        ],
    ),
    "settings of classes": (
        "-m diffusion.conditional=true threat_model.knows_label=true,perhaps +model.num_class_embeds=10",
        [
            ("model.num_class_embeds=10", "must be at least 11, one for each of 10 classes and one for no label"),
            ("threat_model.knows_label=perhaps", "must be true or false"),
        ],
    ),
    "index files": (
        f"-m {FROM_FILE} split.path={{files}}/no.npz,{{files}}/images.npz,{{files}}/unknown.json,{{files}}/twice.json",
        [
            ("split.path={files}/no.npz", "no such file; give an npz file"),
            ("split.path={files}/images.npz", "must hold `members` and `nonmembers`"),
            ("split.path={files}/unknown.json", "lists 1 ids that the data set does not have, 5000 first; leave them out"),
            ("split.path={files}/twice.json", "list it once"),
        ],
    ),
    "checkpoints and networks": (
        f"-m {ARRAYS} split.pool=16 checkpoint={{files}}/no.safetensors,{{files}}/file.txt,{{files}}/other.safetensors"
        " model.norm_num_groups=8,7",
        [
            ("checkpoint={files}/no.safetensors", "no such file; give the path of one that exists"),
            ("checkpoint={files}/no.safetensors", "no such file; give the path of one that exists"),
            ("checkpoint={files}/file.txt", "cannot be read as a safetensors file"),
            ("model=diffusers.UNet2DModel", "refuses these settings"),
            ("checkpoint={files}/other.safetensors", "does not fit model=tiny"),
            ("model=diffusers.UNet2DModel", "refuses these settings"),
        ],
    ),
    "shadows": (
        f"-m {ARRAYS} split.pool=8 split.shadow_pool=disjoint split.n_models=1,2,4 attack=lira",
        [
            ("split.n_models=1", "must be at least 3: attack=lira needs 2 shadows beside the target; there are 0"),
            ("split.n_models=2", "there are 1"),
            ("split.shadow_pool=disjoint", "attack=lira needs them, so use same"),
        ],
    ),
    "shadows to choose settings on": (
        f"{ARRAYS} split.pool=16 split.n_models=1 attack.select=shadow",
        [("split.n_models=1", "attack=pia with attack.select=shadow needs 1 shadows beside the target")],
    ),
    "public images": (
        f"-m {ARRAYS} split.pool=8 attack=quantile split.public=0,9",
        [
            ("split.public=0", "must be at least 128, the public images that attack=quantile needs"),
            ("split.public=9", "asks for more images than the 8 that are left beside the pools"),
        ],
    ),
    "a square that is no share of an image": (
        "-m defense=cutout defense.side=-1,1.5",
        [("defense.side=-1", "must be a number above 0"), ("defense.side=1.5", "of at most 1")],
    ),
    "a defence that cannot go with a network": (
        "defense=dropout model._target_=torch.nn.Conv2d",
        [("model._target_=torch.nn.Conv2d", "has no setting `dropout`, which defense=dropout needs")],
    ),
    "a defence that trains without labels": (
        "-m defense=dp_sgd,dual_md,distill_md diffusion.conditional=true",
        [("diffusion.conditional=True", f"must be false with defense={name}") for name in ("dp_sgd", "dual_md", "distill_md")],
    ),
    "copies under an accountant": ("defense=dp_sgd split.copies=[1,2]", [("split.copies=[1, 2]", "must be null with defense=dp_sgd")]),
    "a defence without its images": (
        "-m defense=early_stopping defense.patience=0,1",
        [
            ("defense.patience=0", "must be a whole number of at least 1"),
            ("split.public=0", "must be at least 1, the public images that defense=early_stopping needs"),
        ],
    ),
    "a service that limits its answers": (
        "-m defense=query_limit attack=rediffuse threat_model=variation_api defense.variations=-1,3",
        [
            ("defense.variations=-1", "must be a whole number of at least 1"),
            ("attack.n_variations=10", "must be at most 3, the variations of an image that the service gives"),
        ],
    ),
    "copies": (
        "-m split.copies=[],[0],[1,many],3",
        [
            ("split.copies=[]", "must be a list of numbers of copies, as [1,2,4,8], or null"),
            ("split.copies=0", "must be a whole number of at least 1"),
            ("split.copies=many", "must be a whole number of at least 1"),
            ("split.copies=3", "must be a list of numbers of copies"),
        ],
    ),
    "plug-ins": (
        "-m attack=lira attack/plugin=fremia,complexity",
        [
            ("attack.plugin.host=LiRA", "has no error map that could be filtered"),
            ("attack.plugin.host=LiRA", "wrap an attack on a single model"),
        ],
    ),
    "plug-in without an error map": (
        "attack=trajectory attack/plugin=fremia",
        [("attack.plugin.host=Trajectory", "has no error map that could be filtered; wrap loss")],
    ),
    "host that is judged itself": ("attack=lira attack@attack.host=gsa1", [("attack.host=GSA1", "must be an attack on a single model")]),
    "utility": (
        f"-m {ARRAYS} split=exact split.n_members=5 split.n_nonmembers=3 utility=pixels utility.n_samples=3,4 utility.steps=50,1001",
        [
            ("utility.n_samples=3", "must be at least 4, more than the k=3 neighbours"),
            ("utility.n_samples=3", "must be at least 4"),
            ("utility.k=3", "needs 4 real images that the target is not trained on; there are 3"),
            ("utility.steps=1001", "must be a whole number of at most 1000"),
        ],
    ),
    "utility of a loss on nothing": (
        "-m utility=pixels utility.heldout=public,members utility.timesteps=1001,5",
        [
            ("utility.timesteps=1001", "of at most 1000"),
            ("split.public=0", "must be at least 1: utility.heldout=public needs public images"),
            ("utility.heldout=members", "must be one of nonmembers, public"),
            ("utility.heldout=members", "must be one of nonmembers, public"),
        ],
    ),
    "utility in features that there are not": (
        "-m utility=pixels utility.features._target_=diffmia_exp.features.Inception,torch.nn.Identity",
        [
            ("utility.features._target_=diffmia_exp.features.Inception", "no such class or function"),
            ("utility.features=Identity()", "must be {_target_: diffmia_exp.features.Pixels}"),
        ],
    ),
    "utility in features that the images do not have": (
        "-m utility=pixels utility.features._target_=diffmia_exp.features.Network "
        "+utility.features.net={{_target_:torch.nn.Linear,in_features:9,out_features:2}} "
        "+utility.features.weights={files}/no.safetensors,null",
        [("utility.features.weights={files}/no.safetensors", "no such file"), ("utility.features.net=Linear", "1x8x8")],
    ),
    "size of an ImageNet network's images": (
        "utility=imagenet utility.features.size=8",
        [("utility.features.size=8", "must be a whole number from 32 to 1024")],
    ),
    "feature extractors": (
        "-m attack=knn threat_model=samples_only attack.features._target_=diffmia_exp.features.Network "
        "+attack.features.net={{_target_:torch.nn.Linear,in_features:9,out_features:2}} "
        "+attack.features.weights={files}/no.safetensors,{files}/file.txt,null",
        [
            ("attack.features.weights={files}/no.safetensors", "no such file"),
            ("attack.features.weights={files}/file.txt", "safetensors"),
            ("attack.features.net=Linear", "1x8x8"),
        ],
    ),
    "budget below the samples": (
        f"{ARRAYS} split.pool=16 attack=knn threat_model=samples_only threat_model.query_budget=100",
        [("threat_model.query_budget=100", "must be at least 6400")],
    ),
    "choices on shadows": (
        "-m attack.select=best,shadow attack.rehearsals=0",
        [("attack.select=best", "must be one of published, shadow"), ("attack.rehearsals=0", "of at least 1")],
    ),
    "a grid of settings": (
        "attack.select=shadow attack.grid.t=[50,5000] split.n_models=2",
        [("attack.t=5000", "must be a whole number of at most 999")],
    ),
    "what the adversary gets wrong": (
        "-m threat_model.shadow_training=3,{{steps:0}}",
        [("threat_model.shadow_training=3", "must be settings"), ("threat_model.shadow_training.steps=0", "of at least 1")],
    ),
    "model index": (
        "-m model_index=1 stage=all,train",
        [
            ("model_index=1", "must be null unless stage=train"),
            ("model_index=1", "must be a whole number, here 0"),
        ],
    ),
    "stage before its time": (
        f"-m {ARRAYS} split.pool=16 stage=attack,report",
        [("stage=attack", "run the same with stage=train first"), ("stage=report", "run the same with stage=all first")],
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders that something is wrong with."""
    root = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    (root / "empty").mkdir()
    for folder in ("corrupt", "mixed"):
        (root / folder).mkdir()
        for n, image in enumerate(pixels):
            Image.fromarray(image).save(root / folder / f"{n:02d}.png")
    whole = (root / "corrupt" / "03.png").read_bytes()
    (root / "corrupt" / "03.png").write_bytes(whole[:60])
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(root / "mixed" / "05.png")
    np.savez(root / "images.npz", images=pixels)
    np.savez(root / "floats.npz", images=pixels, labels=np.linspace(0, 1, 16))
    np.savez(root / "short.npz", images=pixels, labels=np.arange(15))
    np.savez(root / "pickled.npz", images=np.array([{}] * 16, dtype=object))
    (root / "file.txt").write_text("nothing of use")
    (root / "unknown.json").write_text(json.dumps({"members": [1, 2], "nonmembers": [3, 5000]}))
    (root / "twice.json").write_text(json.dumps({"members": [1, 2], "nonmembers": [2, 3]}))
    save_file({"weight": np.zeros(3, np.float32)}, root / "other.safetensors")
    return root


def run(*arguments: str, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    return command.run("debug=quick", *arguments, largest_file=largest_file)


def refused(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The errors that are reported: one line each, at the end."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error:")]
    assert [f"error: {e}" for e in errors] == lines[-len(errors) :]
    return errors


def assert_nothing_half_written(out: Path) -> None:
    assert [p for p in out.rglob("*") if p.name.endswith((".partial", ".claim", ".tmp", ".ckpt"))] == []
    entries = [entry for kind in ("models", "scores", "samples") for entry in out.glob(f"{kind}/*")]
    assert [entry for entry in entries if not (entry / "DONE").exists()] == []


def test_a_full_disk_mistakes_in_a_grid_and_damaged_entries(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = [*ARRAYS.format(files=files).split(), "split.pool=16"]

    (error,) = refused(run(*data, f"output_dir={out}", "attack.t=50", largest_file=1_000_000))  # too small for the weights
    assert error == f"output_dir={out}: the disk is full; free some space and run the same command again, it resumes"
    assert_nothing_half_written(out)
    assert not list(out.glob("runs/*"))
    (error,) = refused(run("-m", f"output_dir={out}", "seed=0,1", largest_file=0))
    assert error == "output_dir: the disk is full; free some space and run the same command again, it resumes"
    shutil.rmtree(out / "sweeps")

    told = refused(run(*data, "attack.t=50,abc,60,1000", "-m", f"output_dir={out}", "name=t${attack.t}"))
    mistakes = ["attack.t=abc: must be a whole number of at least 1", "attack.t=1000: must be a whole number of at most 999"]
    assert [error.split(": ", 1)[1] for error in told] == mistakes
    assert sorted(path.parent.name.split("-")[0] for path in out.glob("runs/*/metrics.json")) == ["t50", "t60"]
    assert [json.loads((*out.glob(f"sweeps/*/{n}/status.json"),)[0].read_text())["status"] for n in range(4)] == ["done", "failed"] * 2
    assert_nothing_half_written(out)

    (key,) = (path.name for path in out.glob("models/*"))
    truncated, altered, incomplete = (tmp_path / name / "models" / key for name in ("truncated", "altered", "incomplete"))
    for entry in (truncated, altered, incomplete):
        shutil.copytree(out / "models" / key, entry)
    weights = (altered / "ema.safetensors").read_bytes()
    (truncated / "ema.safetensors").write_bytes(weights[:-1])
    (altered / "ema.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    (incomplete / "DONE").unlink()

    folders = f"output_dir={tmp_path}/truncated,{tmp_path}/altered,{tmp_path}/incomplete"
    done = run(*data, "-m", folders, f"hydra.sweep.dir={tmp_path}/sweep", "attack=sima", "evaluation=bare")
    assert done.returncode == 0, done.stderr
    weights_differ = "ema.safetensors is missing, truncated or altered (its checksum differs)"
    reasons = {truncated: weights_differ, altered: weights_differ, incomplete: "the entry is incomplete (DONE is missing or damaged)"}
    for entry, reason in reasons.items():
        assert f"{entry}: {reason}; it was set aside as {key}.damaged-1 and is made again" in done.stderr
        assert (entry / "ema.safetensors").read_bytes() == weights
        assert entry.with_name(f"{key}.damaged-1").is_dir()


@pytest.mark.parametrize("name", BEFORE_ANYTHING_HEAVY | BEFORE_TRAINING)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(name: str, files: Path, tmp_path: Path) -> None:
    arguments, expected = (BEFORE_ANYTHING_HEAVY | BEFORE_TRAINING)[name]
    done = run(f"output_dir={tmp_path}/out", *arguments.format(files=files, nope="${nope}").split())
    errors = refused(done)
    assert len(errors) == len(expected)
    for error, (key, remedy) in zip(errors, expected, strict=True):
        told = error.split(": ", 1)[1] if error.startswith("debug=quick ") else error  # in a grid, the cell comes first
        assert told.startswith(key.format(files=files))
        assert remedy in told
    assert done.stdout == ""
    if name in BEFORE_ANYTHING_HEAVY:
        assert len(done.stderr.splitlines()) == 1
    assert_nothing_half_written(tmp_path / "out")
    assert not list(tmp_path.glob("out/runs/*"))
    assert not list(tmp_path.glob("out/*/*/DONE"))


def test_help_tells_what_every_group_is_and_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra", "local"}
    assert groups == {*GROUPS, "experiment", "debug"}
    for group in groups:
        assert re.search(rf"^  {group} +\w.+ .+$", done.stdout, re.MULTILINE), group
        for choice in (ROOT / "conf" / group).glob("*.yaml"):
            assert re.search(rf"^{group}: (.+, )?{choice.stem}(,|$)", done.stdout, re.MULTILINE), choice
    assert len(re.findall(r"^  python run\.py", done.stdout, re.MULTILINE)) == 5
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "diffmia_exp.cli" in imported
    assert not imported & {"torch", "numpy", "pytorch_lightning", "diffusers", "wandb", "diffmia_exp.pipeline"}


def test_overrides_may_stand_on_both_sides_of_an_option() -> None:
    done = subprocess.run([sys.executable, "run.py", "seed=3", "--cfg", "job", "attack.t=7"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seed: 3\n" in done.stdout
    assert "  t: 7\n" in done.stdout
