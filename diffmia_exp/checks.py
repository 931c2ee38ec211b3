"""What a cell's config must fulfil before anything is trained; each check names the key, what was given and what would do."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import numpy as np

from diffmia_exp import ranks, runs
from diffmia_exp.defenses.base import Defense
from diffmia_exp.errors import ConfigError, UserError, whole
from diffmia_exp.threat_models import GrayBox, enough, level_of

if TYPE_CHECKING:
    from diffmia_exp.experiment import Experiment

log = logging.getLogger(__name__)


class NotApplicable(UserError):
    """An attack that the threat model does not allow."""


def weights(e: Experiment) -> None:
    """Refuse weights that are not there to attack: a checkpoint, a snapshot, one model of many."""
    if e.config["checkpoint"] is not None:
        runs.existing_file("checkpoint", e.config["checkpoint"])
        if e.snapshot is not None:
            raise ConfigError("snapshot", e.snapshot, "must be null where a checkpoint is attacked")
        if e.stage == "train":
            raise ConfigError("stage", e.stage, "must be all or attack where a checkpoint is attacked")
        if "held_out" in e.evaluation.controls:
            must = "needs the training of the attacked model, which a checkpoint does not tell; leave it out"
            raise ConfigError("evaluation.controls", "held_out", must)
    if e.snapshot is not None and e.snapshot not in e.recipe.snapshots:
        raise ConfigError("snapshot", e.snapshot, f"must be one of training.snapshots={e.recipe.snapshots}")
    if e.config["model_index"] is not None and e.stage != "train":
        raise ConfigError("model_index", e.config["model_index"], "must be null unless stage=train; split.target_index is attacked")


def part(e: Experiment) -> tuple[int, int] | None:
    """`part` as two numbers: which, of how many."""
    if (part := e.config["part"]) is None:
        return None
    if not (match := re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", str(part))) or int(match[1]) > int(match[2]):
        raise ConfigError("part", part, "must be k/n with k from 1 to n, as 2/4")
    if e.stage not in ("all", "attack"):
        raise ConfigError("part", part, f"must be null with stage={e.stage}; images are measured with stage=attack")
    return int(match[1]), int(match[2])


def devices(e: Experiment) -> None:
    """Refuse devices that cannot be launched from here, that the batch does not divide over, or that the defence cannot train on."""
    try:
        e.trainer.check_launch(ranks.count())
    except ConfigError as error:
        raise error.under("trainer") from None
    if (world := e.trainer.world) is not None and e.recipe.batch_size % world:
        must = f"must be a multiple of {world}, the number of devices (trainer.devices times trainer.num_nodes)"
        raise ConfigError("training.batch_size", e.recipe.batch_size, must)
    if e.trainer.strategy == "fsdp" and type(e.defense).lit is not Defense.lit:
        must = f"cannot be had with defense={e.config['defense']['name']}, which trains in its own way; use trainer=ddp or gpu"
        raise ConfigError("trainer.strategy", "fsdp", must)


def defense(e: Experiment) -> None:
    """Refuse a defence that lacks public images, and say where the attack goes round it."""
    name = e.config["defense"].get("name", "?")
    if e.conditional and not e.defense.heeds_labels:
        raise ConfigError("diffusion.conditional", True, f"must be false with defense={name}, which trains without labels")
    if e.split.copies is not None and e.defense.accounts:
        raise ConfigError(
            "split.copies", e.config["split"]["copies"], f"must be null with defense={name}, which accounts for one copy each"
        )
    if (public := int(e.split.public.sum())) < e.defense.min_public:
        raise ConfigError("split.public", public, f"must be at least {e.defense.min_public}, the public images that defense={name} needs")
    if not e.defense.trains and issubclass(e.attack.access, GrayBox):
        why = "defense=%s stands between the service and its users; attack=%s asks the model itself, and is not touched by it"
        log.warning(why, name, e.config["attack"]["name"])


def service(e: Experiment) -> None:
    """Refuse attack settings that ask for more variations of an image than the service gives."""
    if (most := e.defense.variations) is None:
        return
    for candidate in e.candidates:
        try:
            candidate.attack.check_variations(most)
        except ConfigError as error:
            raise error.under("attack") from None


def query_budget(e: Experiment, images: int | None = None) -> None:
    """The attack's cost against the budget; what is spent once is known once the number of images is."""
    T, budget = len(e.alphas_cumprod), e.threat_model.query_budget
    try:
        nfe = max(c.attack.nfe(T) + (c.attack.nfe_once(T) / images if images else 0) for c in e.candidates)
    except ConfigError as error:
        raise error.under("attack") from None
    if budget is not None and nfe > budget:
        name = e.config["attack"]["name"]
        must = f"must be at least {int(np.ceil(nfe))}, the model evaluations per image that attack={name} costs"
        raise ConfigError("threat_model.query_budget", budget, must)


def classes(e: Experiment) -> None:
    """Refuse a conditional model of images without labels, or with too few embeddings for their classes."""
    if e.conditional and e.n_classes is None:
        must = f"needs class labels, which dataset={e.config['dataset']['name']} does not give; give them (docs/data.md), or use false"
        raise ConfigError("diffusion.conditional", True, must)
    for key, model in (("model", e.config["model"]), ("threat_model.shadow_model", e.threat_model.shadow_model or {})):
        embeds = model.get("num_class_embeds")
        if e.n_classes is not None and embeds is not None and (not isinstance(embeds, int) or embeds <= e.n_classes):
            must = f"must be at least {e.n_classes + 1}, one for each of {e.n_classes} classes and one for no label; or leave it out"
            raise ConfigError(f"{key}.num_class_embeds", embeds, must)


def access(e: Experiment) -> None:
    """Refuse an attack that asks for more than the threat model grants.

    Raises:
        NotApplicable: naming the threat models that would do.
    """
    if not e.threat_model.grants(e.attack.access):
        raise NotApplicable(
            f"threat_model={e.config['threat_model']['name']}: attack={e.config['attack']['name']} needs "
            f"{level_of(e.attack.access)} access; use threat_model={enough(e.attack.access)}"
        )


def shadows_needed(e: Experiment) -> int:
    """The fewest shadow models that the attack, and the choice of its settings, need."""
    return e.attack.min_shadows + (e.config["attack"]["select"] == "shadow")


def shadows(e: Experiment) -> None:
    """Refuse a split with too few shadows or public images for the attack, or with shadows that it cannot use."""
    name, split, attack = e.config["attack"]["name"], e.config["split"], e.attack
    needed = shadows_needed(e)
    if (there := e.split.n_models - 1) < needed:
        why = "" if needed == attack.min_shadows else " with attack.select=shadow"
        must = f"must be at least {needed + 1}: attack={name}{why} needs {needed} shadows beside the target; there are {there}"
        raise ConfigError("split.n_models", split["n_models"], must)
    if (public := int(e.split.public.sum())) < attack.min_public:
        raise ConfigError("split.public", public, f"must be at least {attack.min_public}, the public images that attack={name} needs")
    keep = e.split.keep[e.shadows][:, e.audited]
    if attack.needs_inside and not (keep.any(0) & ~keep.all(0)).any():
        must = f"leaves no audited image that some shadows are trained on and some are not; attack={name} needs them, so use same"
        raise ConfigError("split.shadow_pool", split["shadow_pool"], must)


def utility(e: Experiment) -> None:
    """Refuse a utility that cannot be measured: more steps than the schedule has, too few real images, images that do not fit."""
    if (u := e.utility) is None:
        return
    T = len(e.alphas_cumprod)
    whole("utility.steps", u.steps, most=T)
    whole("utility.timesteps", u.timesteps, most=T)
    if u.heldout == "public" and not e.split.public.any():
        raise ConfigError("split.public", 0, "must be at least 1: utility.heldout=public needs public images")
    if (there := int(e.unseen.sum())) < u.least:
        must = f"needs {u.least} real images that the target is not trained on; there are {there}, held out or public: take more"
        raise ConfigError("utility.k", u.k, must)
    try:
        u.features.check(e.images.pixels.shape[1:])
    except ConfigError as error:
        raise error.under("utility") from None
