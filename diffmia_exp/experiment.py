"""One cell of a grid: its config, checked before anything is trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffmia_exp import checks, runs, selection
from diffmia_exp.attacks.base import Attack
from diffmia_exp.config import Plain, build
from diffmia_exp.data import Ids, Images, Source
from diffmia_exp.defenses.base import Defense
from diffmia_exp.diffusion import PREDICTIONS, Diffusion
from diffmia_exp.errors import ConfigError, choice, whole
from diffmia_exp.evaluation import Evaluation
from diffmia_exp.noise import derive, initialised
from diffmia_exp.recipe import Recipe, TrainerOptions
from diffmia_exp.split import MemberSplit
from diffmia_exp.store import Store
from diffmia_exp.threat_models import ThreatModel
from diffmia_exp.tracking import Wandb
from diffmia_exp.utility import Utility

log = logging.getLogger(__name__)


class Experiment:
    """One cell of a grid: everything that its config says, checked before anything is trained.

    Args:
        config: as `config.checked` gives it.
        sweep: name of the sweep it belongs to, if any.
    """

    def __init__(self, config: Plain, sweep: str | None = None) -> None:
        self.config = config
        self.seed: int = config["seed"]
        self.stage: str = config["stage"]
        self.weights: str = config["weights"]
        self.name = runs.checked_name(config["name"])
        self.output_dir = runs.writable("output_dir", config["output_dir"])
        self.stores = {kind: Store(self.output_dir, kind) for kind in ("models", "samples", "signals", "scores", "controls")}
        self.tracking: Wandb = build("tracking", config["tracking"] | ({"group": sweep} if not config["tracking"].get("group") else {}))
        self.evaluation: Evaluation = build("evaluation", config["evaluation"])
        self.utility: Utility | None = build("utility", config["utility"], Utility) if "utility" in config else None
        self.threat_model: ThreatModel = build("threat_model", config["threat_model"])
        self.candidates = selection.candidates(config["attack"])
        self.least_models = config["split"].get("n_models", 1) is None
        if self.least_models:
            config["split"] = config["split"] | {"n_models": 1 + max(checks.shadows_needed(self), config["split"].get("target_index", 0))}
        self.prediction = config["diffusion"].get("prediction", "epsilon")
        choice("diffusion.prediction", self.prediction, PREDICTIONS)
        self.alphas_cumprod = build("diffusion.schedule", config["diffusion"]["schedule"])
        self.conditional: bool = config["diffusion"].get("conditional", False)
        self.n_classes: int | None = None
        self.defense: Defense = build("defense", config["defense"], Defense)
        self.recipe: Recipe = build("training", self.group("training"))
        self.shadow_recipe = self._shadow_recipe()
        trainer: TrainerOptions = build("trainer", config["trainer"])
        self.trainer = trainer.alone() if self.stage in ("attack", "report") else trainer  # which train no model of the split
        self.snapshot: int | None = config["snapshot"]
        self.part = checks.part(self)
        self.group("model")  # which the defence may refuse
        checks.weights(self)
        checks.devices(self)
        checks.query_budget(self)
        checks.service(self)

    @property
    def attack(self) -> Attack:
        """The attack, with the first of the settings that it may get."""
        return self.candidates[0].attack

    def _shadow_recipe(self) -> Recipe:
        try:
            return build("training", self.group("training", shadow=True))
        except ConfigError as e:
            raise ConfigError(e.key.replace("training", "threat_model.shadow_training", 1), e.given, e.must) from None

    def load(self) -> None:
        """Read the data, draw the split, and check that they suffice for the attack."""
        key = json.dumps([self.config["dataset"], self.config["split"], self.seed, self.conditional])
        self.split, self.images, self.n_classes = _load(key)
        checks.classes(self)
        crossing = self.split.crossing(self.images)
        self.duplicates = int(crossing.sum())
        self.audited = self.split.pool[self.target_index] & ~(crossing & self.evaluation.drop_duplicates)
        if not (self.audited & ~self.keep).any():
            raise ConfigError("evaluation.drop_duplicates", True, "leaves no non-member; every one has a copy among the members")
        if self.config["model_index"] == "held_out":
            pass
        elif self.config["model_index"] is not None:
            whole("model_index", self.config["model_index"], least=0, most=self.split.n_models - 1)
        elif self.stage != "train" or self.shadows:
            checks.shadows(self)
        checks.defense(self)
        checks.query_budget(self, int(self.measured.sum()))
        try:
            self.attack.check(self.images.pixels.shape[1:])
        except ConfigError as e:
            raise e.under("attack") from None
        checks.utility(self)
        if self.stage in ("all", "train"):
            self._check_defense()
        if self.shadows and self.group("model") != self.group("model", shadow=True):
            self.net(self.shadows[0])
        if self.least_models and self.shadows:
            name, n = self.config["attack"]["name"], len(self.shadows)
            log.info("split.n_models: null, so attack=%s has %d shadows, the least it works with; more make it stronger", name, n)
        counts = self.keep.sum(), (self.audited & ~self.keep).sum()
        log.info("%s: %d members, %d non-members", self.config["dataset"]["name"], *counts)
        if self.duplicates:
            done = "left out of the audit" if self.evaluation.drop_duplicates else "kept; evaluation.drop_duplicates=true leaves them out"
            log.warning("%d non-members are exact copies of members (%s)", self.duplicates, done)

    def _check_defense(self) -> None:
        for shadow, recipe in ((False, self.recipe), (True, self.shadow_recipe)):
            if sizes := [int(self.members(row).sum()) for row in self.models if (self.role(row) == "shadow") is shadow]:
                self.defended(shadow).check(recipe, self.trainer, min(sizes))

    @property
    def target_index(self) -> int:
        """The row of the split that plays the target."""
        return self.split.target_index

    @property
    def keep(self) -> NDArray[np.bool_]:
        """The target's members, bool [n]."""
        mask: NDArray[np.bool_] = self.split.keep[self.target_index]
        return mask

    @property
    def shadows(self) -> list[int]:
        """The rows of the split whose models the attack needs beside the target."""
        others = [row for row in range(self.split.n_models) if row != self.target_index]
        if self.attack.min_shadows:
            return others
        return others[: self.config["attack"]["rehearsals"]] if self.config["attack"]["select"] == "shadow" else []

    @property
    def models(self) -> list[int]:
        """The rows whose models are trained for this cell: target, shadows, and the control's on the held-out half."""
        target = [] if self.config["checkpoint"] is not None else [self.target_index]
        return [*target, *self.shadows, *([self.held_out] if "held_out" in self.evaluation.controls else [])]

    @property
    def untrained(self) -> int:
        """A row past the split's and the surrogates': the target's network as it is initialised, the same for every target of a grid."""
        return self.split.n_models + 1

    @property
    def held_out(self) -> int:
        """A row past those: the target's network trained as the target is, on the other images of its pool."""
        return self.split.n_models + 2

    @property
    def unseen(self) -> NDArray[np.bool_]:
        """The images that generated ones are compared with, bool [n]: the rest of the target's pool, and the public images."""
        return self.members(self.held_out) | self.split.public

    def role(self, index: int) -> str:
        """What model `index` is in this cell."""
        return {self.target_index: "target", self.untrained: "untrained", self.held_out: "held-out"}.get(index, "shadow")

    def members(self, index: int) -> NDArray[np.bool_]:
        """The images that model `index` is trained on, bool [n]."""
        if index == self.held_out:
            return self.split.pool[self.target_index] & ~self.keep
        mask: NDArray[np.bool_] = self.split.keep[index]
        return mask

    def draws(self, index: int) -> int:
        """The row whose initial weights, batches and noises model `index` gets: its own, but the target's for the held-out half."""
        return self.target_index if index == self.held_out else index

    @property
    def measured(self) -> NDArray[np.bool_]:
        """The images that the models are measured on, bool [n]: every pool in play, and the public images where they are needed."""
        mask: NDArray[np.bool_] = np.logical_or.reduce(self.split.pool[[self.target_index, *self.shadows]])
        return mask | self.split.public if self.attack.min_public else mask

    def group(self, name: str, shadow: bool = False) -> Plain:
        """The config of `model`, `diffusion` or `training` as the defence has it; of a shadow with what the adversary gets wrong about it.

        A conditional model knows how many classes there are.
        """
        classes: dict[str, Plain] = {}
        if self.n_classes is not None:
            classes = {"model": {"num_class_embeds": self.n_classes + 1}, "diffusion": {"n_classes": self.n_classes}}
        wrong = (getattr(self.threat_model, f"shadow_{name}", None) or {}) if shadow else {}
        settings = classes.get(name, {}) | nameless(self.config[name]) | wrong
        defense = self.defended(shadow)
        return {"model": defense.model, "training": defense.training}.get(name, dict)(settings)

    def defended(self, shadow: bool) -> Defense:
        """The defence of the target, or of a shadow: the same, if the adversary adapts to it."""
        return Defense() if shadow and not self.threat_model.shadow_defense else self.defense

    def training_images(self, index: int) -> Images:
        """The images that model `index` sees in training: its members with their copies, but for those that the defence leaves out."""
        mask = self.members(index)
        members = self.images.where(mask)
        if self.split.copies is not None:
            members = members.repeated(self.split.copies[mask])
        return members.where(self.defended(self.role(index) == "shadow").kept(members))

    def service(self, index: int) -> Defense:
        """The defence that stands between model `index` and its users."""
        return self.defended(self.role(index) == "shadow")

    def shown(self, images: Images) -> Images:
        """The images as the adversary knows them: without labels where it does not know these."""
        return images if self.threat_model.knows_label else replace(images, labels=None)

    def generated_labels(self, n: int) -> Ids | None:
        """The classes int64 [n] that generated images are drawn from, see `Diffusion.sample`; None for an unconditional model."""
        return None if self.n_classes is None else np.arange(n) % self.n_classes

    def surrogate_seed(self, index: int) -> int:
        """Seed of a surrogate of model `index`: the adversary does not know how that one was initialised."""
        return derive(self.seed, "surrogate", index)

    def net(self, index: int, seed: int | None = None) -> torch.nn.Module:
        """A freshly initialised network for model `index`."""
        config = self.group("model", self.role(index) == "shadow")
        name = self.config["model"].get("name", "?")
        defense = self.defended(self.role(index) == "shadow")
        net = initialised(lambda: defense.network(lambda: build("model", config)), self.seed if seed is None else seed, self.draws(index))
        shape = self.images.pixels.shape[1:]
        try:
            with torch.inference_mode():
                out = self.diffusion(net.eval())(torch.zeros(1, *shape), 0)
        except Exception as e:  # whatever a network says to images that do not fit it
            message = f"cannot take images of shape {'x'.join(map(str, shape))} ({str(e).splitlines()[0]})"
            raise ConfigError("model", name, message) from e
        if out.shape[1:] != shape:
            raise ConfigError("model", name, f"returns {tuple(out.shape[1:])} for images of {shape}")
        return net.train()

    def diffusion(self, net: torch.nn.Module) -> Diffusion:
        """The network with its schedule."""
        c, h, w = self.images.pixels.shape[1:]
        return Diffusion(net, self.alphas_cumprod, self.prediction, (c, h, w), self.n_classes)


@lru_cache(maxsize=2)  # the cells of a grid share their data
def _load(key: str) -> tuple[MemberSplit, Images, int | None]:
    dataset, split_config, seed, conditional = json.loads(key)
    source: Source = build("dataset", dataset)
    split: MemberSplit = build("split", split_config, sample_id=source.sample_id, seed=seed)
    try:
        labels, n_classes = source.labels(split.sample_id) if conditional and source.labels is not None else (None, None)
        return split, Images(source.take(split.sample_id), split.sample_id, labels), n_classes
    except ConfigError as e:
        raise e.under("dataset") from None


def nameless(cfg: Mapping[str, Any]) -> Plain:
    """A group's config without its name, which changes nothing."""
    return {k: v for k, v in cfg.items() if k != "name"}
