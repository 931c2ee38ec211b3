"""What each thing in the store depends on: a cell's specs of its models, signals, scores, utility and run folder, and their keys."""

from __future__ import annotations

from diffmia_exp import runs, selection
from diffmia_exp.config import Plain, in_its_types
from diffmia_exp.data import Images
from diffmia_exp.defenses.base import Defense
from diffmia_exp.experiment import Experiment, nameless
from diffmia_exp.store import digest, sha256
from diffmia_exp.threat_models import GrayBox


def model(e: Experiment, index: int) -> Plain:
    """Everything that the weights of model `index` depend on."""
    settings = training(e, e.role(index) == "shadow")
    return members(e.training_images(index)) | settings | {"seed": e.seed, "model_index": e.draws(index)}


def members(images: Images) -> Plain:
    """A training set, as a model's spec has it."""
    labels: Plain = {} if images.labels is None else {"labels": images.label_fingerprint}
    return {"members": images.fingerprint, "n_members": len(images)} | labels


def training(e: Experiment, shadow: bool) -> Plain:
    """The part of a model's spec that is the same whatever it is trained on."""
    spec = {
        "model": in_its_types("model", e.group("model", shadow)),
        "diffusion": in_its_types("diffusion", e.group("diffusion")),
        "training": in_its_types("training", e.group("training", shadow)),
        "precision": e.config["trainer"]["precision"],
    }
    defense = e.defended(shadow)
    if type(defense) is not Defense and defense.trains:
        spec["defense"] = in_its_types("defense", nameless(e.config["defense"]))
    if defense.min_public:
        spec["public"] = e.images.where(e.split.public).fingerprint
    return spec


def key(e: Experiment, index: int) -> str:
    """The key of model `index` in the store, or the hash of the checkpoint that takes the target's place."""
    if e.config["checkpoint"] is not None and index == e.target_index:
        return f"file-{sha256(runs.existing_file('checkpoint', e.config['checkpoint']))[:16]}"
    if index == e.untrained:
        spec = training(e, shadow=False)
        settings = {k: spec[k] for k in ("model", "diffusion", "defense") if k in spec}
        return f"untrained-{digest(settings | {'seed': e.seed, 'model_index': index})}"
    return e.stores["models"].key(model(e, index))


def attacked(e: Experiment, index: int) -> Plain:
    """Which weights of model `index` are measured."""
    described: Plain = {"model": key(e, index), "weights": e.weights, "snapshot": e.snapshot}
    if index == e.untrained:
        described |= {"weights": None, "snapshot": None}
    if e.config["checkpoint"] is not None:  # a file says nothing about its schedule and architecture
        described |= {"architecture": e.group("model"), "diffusion": e.group("diffusion")}
    return described


def served(e: Experiment, index: int) -> Plain:
    """What the answers of model `index` depend on beside its weights."""
    return {"service": in_its_types("defense", nameless(e.config["defense"]))} if e.service(index).answers else {}


def signals(e: Experiment, index: int, candidate: selection.Candidate, images: Images | None = None) -> Plain:
    """Everything that an attack's signals on model `index` depend on; `images` if not those that every model is measured on."""
    spec: Plain = {
        "attacked": attacked(e, index),
        "signal": candidate.measures,
        "images": (images or e.images.where(e.measured)).fingerprint,
        "precision": e.evaluation.precision,
    }
    if not issubclass(candidate.attack.access, GrayBox):
        spec |= served(e, index)
    if candidate.attack.trains:
        spec["surrogate"] = training(e, shadow=True) | {"seed": e.surrogate_seed(index)}
    if e.conditional:
        spec["labels"] = e.shown(images or e.images.where(e.measured)).label_fingerprint
    if candidate.attack.min_public:
        spec["public"] = e.images.where(e.split.public).fingerprint
    return spec


def scores(e: Experiment) -> Plain:
    """Everything that the scores depend on."""
    return {
        "signals": [e.stores["signals"].key(signals(e, e.target_index, c)) for c in e.candidates],
        "shadows": [attacked(e, index) for index in e.shadows],
        "attack": {k: v for k, v in e.config["attack"].items() if k not in ("name", "grid") and (k != "rehearsals" or e.shadows)},
        "settings": [c.settings for c in e.candidates],
        "audited": e.images.where(e.audited).fingerprint,
        "members": e.images.where(e.keep).fingerprint,
        "fprs": list(e.evaluation.fprs) if e.shadows else None,
    }


def utility(e: Experiment) -> Plain:
    """Everything that the target's utility depends on."""
    return {
        "utility": attacked(e, e.target_index),
        "settings": selection.by_content(nameless(e.config["utility"])),
        "members": e.images.where(e.keep).fingerprint,
        "held_out": e.images.where(e.members(e.held_out)).fingerprint,
        "public": e.images.where(e.split.public).fingerprint,
        "precision": e.evaluation.precision,
    } | served(e, e.target_index)


def comparable(e: Experiment) -> Plain:
    """What must agree where runs are averaged (`split`, `data_fingerprint`) or compared image by image (`audited_fingerprint`)."""
    split = {k: v for k, v in nameless(e.config["split"]).items() if k not in ("n_models", "target_index", "path")}
    if split.get("copies") is None:  # as runs from before there were copies
        split.pop("copies", None)
    if "path" in e.config["split"]:
        split["file"] = sha256(runs.existing_file("split.path", e.config["split"]["path"]))
    return {
        "target_index": e.target_index,
        "data_fingerprint": digest(nameless(e.config["dataset"])),
        "split": split,
        "audited_fingerprint": e.images.where(e.audited).fingerprint,
    }


def run_key(e: Experiment) -> str:
    """Everything that the run folder depends on."""
    view = {k: e.config[k] for k in ("threat_model", "evaluation", "name")}
    if e.utility is not None:
        view["utility"] = e.stores["controls"].key(utility(e))
    if type(e.defense) is not Defense and (not e.defense.trains or e.config["checkpoint"] is not None):
        view["defense"] = e.config["defense"]
    if e.split.copies is not None:
        view["copies"] = e.config["split"]["copies"]
    return digest({"scores": e.stores["scores"].key(scores(e)), "duplicates": e.duplicates, **view})
