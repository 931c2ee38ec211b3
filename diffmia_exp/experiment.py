"""One cell of a grid: its config checked, its keys in the store, and the steps that make its entries."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffmia_exp import runs
from diffmia_exp.attacks.base import Attack
from diffmia_exp.config import Plain, build
from diffmia_exp.data import Images, Pixels, Source
from diffmia_exp.diffusion import PREDICTIONS, Diffusion
from diffmia_exp.errors import ConfigError, UserError, choice
from diffmia_exp.evaluation import Evaluation, score_images
from diffmia_exp.noise import initialised
from diffmia_exp.scores import ScoreTable
from diffmia_exp.split import MemberSplit
from diffmia_exp.store import Store, digest, sha256
from diffmia_exp.threat_models import ThreatModel, enough, level_of
from diffmia_exp.tracking import Wandb

log = logging.getLogger(__name__)

PREVIEW = {"n": 64, "steps": 50, "seed": 0}


class NotApplicable(UserError):
    """An attack that the threat model does not allow."""


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
        self.models, self.scores, self.samples = (Store(self.output_dir, kind) for kind in ("models", "scores", "samples"))
        self.tracking: Wandb = build("tracking", config["tracking"] | ({"group": sweep} if not config["tracking"].get("group") else {}))
        self.evaluation: Evaluation = build("evaluation", config["evaluation"])
        self.threat_model: ThreatModel = build("threat_model", config["threat_model"])
        self.attack: Attack = build("attack", config["attack"], Attack)
        self.prediction = config["diffusion"].get("prediction", "epsilon")
        choice("diffusion.prediction", self.prediction, PREDICTIONS)
        self.alphas_cumprod = build("diffusion.schedule", config["diffusion"]["schedule"])
        self.recipe = build("training", config["training"])
        self.trainer = build("trainer", config["trainer"])
        self._check_weights()
        self._check_devices()
        self._check_query_budget()

    def _check_weights(self) -> None:
        self.snapshot: int | None = self.config["snapshot"]
        if self.config["checkpoint"] is not None:
            runs.existing_file("checkpoint", self.config["checkpoint"])
            if self.snapshot is not None:
                raise ConfigError("snapshot", self.snapshot, "must be null where a checkpoint is attacked")
            if self.stage == "train":
                raise ConfigError("stage", self.stage, "must be all or attack where a checkpoint is attacked")
        if self.snapshot is not None and self.snapshot not in self.recipe.snapshots:
            raise ConfigError("snapshot", self.snapshot, f"must be one of training.snapshots={self.recipe.snapshots}")

    def _check_devices(self) -> None:
        if self.trainer.devices != "auto" and self.recipe.batch_size % (world := self.trainer.devices * self.trainer.num_nodes):
            must = f"must be a multiple of {world}, the number of devices (trainer.devices times trainer.num_nodes)"
            raise ConfigError("training.batch_size", self.recipe.batch_size, must)

    def _check_query_budget(self) -> None:
        try:
            nfe = self.attack.nfe(len(self.alphas_cumprod))
        except ConfigError as e:
            raise e.under("attack") from None
        budget = self.threat_model.query_budget
        if budget is not None and nfe > budget:
            must = f"must be at least {nfe}, the model evaluations per image that attack={self.config['attack']['name']} costs"
            raise ConfigError("threat_model.query_budget", budget, must)

    def check_access(self) -> None:
        """Refuse an attack that asks for more than the threat model grants.

        Raises:
            NotApplicable: naming the threat models that would do.
        """
        if not self.threat_model.grants(self.attack.access):
            raise NotApplicable(
                f"threat_model={self.config['threat_model']['name']}: attack={self.config['attack']['name']} needs "
                f"{level_of(self.attack.access)} access; use threat_model={enough(self.attack.access)}"
            )

    def load(self) -> None:
        """Read the data and draw the split."""
        self.split, self.images = _load(json.dumps([self.config["dataset"], self.config["split"], self.seed]))
        crossing = self.split.crossing(self.images)
        self.duplicates = int(crossing.sum())
        self.audited = self.split.pool[self.target_index] & ~(crossing & self.evaluation.drop_duplicates)
        if not (self.audited & ~self.keep).any():
            raise ConfigError("evaluation.drop_duplicates", True, "leaves no non-member; every one has a copy among the members")
        counts = self.keep.sum(), (self.audited & ~self.keep).sum()
        log.info("%s: %d members, %d non-members", self.config["dataset"]["name"], *counts)
        if self.duplicates:
            done = "left out of the audit" if self.evaluation.drop_duplicates else "kept; evaluation.drop_duplicates=true leaves them out"
            log.warning("%d non-members are exact copies of members (%s)", self.duplicates, done)

    @property
    def target_index(self) -> int:
        """The row of the split that plays the target."""
        return self.split.target_index

    @property
    def keep(self) -> NDArray[np.bool_]:
        """The target's members, bool [n]."""
        mask: NDArray[np.bool_] = self.split.keep[self.target_index]
        return mask

    def model_spec(self, index: int) -> Plain:
        """Everything that the weights of model `index` depend on."""
        c = self.config
        return {
            "members": self.images.where(self.split.keep[index]).fingerprint,
            "n_members": int(self.split.keep[index].sum()),
            "model": _nameless(c["model"]),
            "diffusion": _nameless(c["diffusion"]),
            "training": _nameless(c["training"]),
            "precision": c["trainer"]["precision"],
            "seed": self.seed,
            "model_index": index,
        }

    @property
    def train_key(self) -> str:
        """The target's key in the store, or the hash of the checkpoint that takes its place."""
        if self.config["checkpoint"] is not None:
            return f"file-{sha256(runs.existing_file('checkpoint', self.config['checkpoint']))[:16]}"
        return self.models.key(self.model_spec(self.target_index))

    def attacked(self) -> Plain:
        """Which weights are attacked."""
        described: Plain = {"model": self.train_key, "weights": self.weights, "snapshot": self.snapshot}
        if self.config["checkpoint"] is not None:  # a file says nothing about its schedule and architecture
            described |= {"architecture": _nameless(self.config["model"]), "diffusion": _nameless(self.config["diffusion"])}
        return described

    def scores_spec(self) -> Plain:
        """Everything that the scores depend on."""
        return {
            "attacked": self.attacked(),
            "attack": _nameless(self.config["attack"]),
            "audited": self.images.where(self.audited).fingerprint,
            "members": self.images.where(self.keep).fingerprint,
            "precision": self.evaluation.precision,
        }

    def run_key(self) -> str:
        """Everything that the run folder depends on."""
        view = {k: self.config[k] for k in ("threat_model", "evaluation", "name")}
        return digest({"scores": self.scores.key(self.scores_spec()), "duplicates": self.duplicates, **view})

    def net(self, index: int) -> torch.nn.Module:
        """A freshly initialised network."""
        net = initialised(lambda: build("model", self.config["model"]), self.seed, index)
        shape = self.images.pixels.shape[1:]
        try:
            with torch.inference_mode():
                out = Diffusion(net.eval(), self.alphas_cumprod)(torch.zeros(1, *shape), 0)
        except Exception as e:  # whatever a network says to images that do not fit it
            message = f"cannot take images of shape {'x'.join(map(str, shape))} ({str(e).splitlines()[0]})"
            raise ConfigError("model", self.config["model"].get("name", "?"), message) from e
        if out.shape[1:] != shape:
            raise ConfigError("model", self.config["model"].get("name", "?"), f"returns {tuple(out.shape[1:])} for images of {shape}")
        return net.train()

    def diffusion(self, net: torch.nn.Module) -> Diffusion:
        """The network with its schedule."""
        c, h, w = self.images.pixels.shape[1:]
        return Diffusion(net, self.alphas_cumprod, self.prediction, (c, h, w))

    def train(self, index: int) -> Path:
        """The store entry of model `index`, trained if need be."""
        spec = self.model_spec(index)
        if (found := self.models.get(spec)) is not None:
            log.info("model %d: found in %s", index, found)
            return found
        net = self.net(index)
        key = self.models.key(spec)
        label = f"training model {index} ({index + 1} of {self.split.n_models})"

        def make(folder: Path) -> None:
            from diffmia_exp import lit  # seconds to import

            name = f"train-{self.config['dataset']['name']}-s{self.seed}-m{index}"
            pixels = self.images.pixels[self.split.keep[index]]
            with self.tracking.training(self.output_dir, key, name, spec, folder, ("spec.yaml", "training.json")) as logger:
                lit.train(folder, self.diffusion(net), pixels, self.recipe, self.trainer, self.seed, index, label, logger)

        return self.models.get_or_make(spec, make)

    @cached_property
    def target(self) -> tuple[Diffusion, Plain]:
        """The attacked model, in eval mode on the scoring device, and what is known of its training."""
        from safetensors.torch import load_file

        if self.config["checkpoint"] is not None:
            path, facts = runs.existing_file("checkpoint", self.config["checkpoint"]), {}
        else:
            entry = self.train(self.target_index)
            prefix = "" if self.snapshot is None else f"step{self.snapshot:07d}-"
            path = entry / f"{prefix}{self.weights}.safetensors"
            facts = json.loads((entry / "training.json").read_text())
        net = self.net(self.target_index)
        try:
            weights = load_file(path)
        except Exception as e:
            raise ConfigError("checkpoint", path, f"cannot be read as a safetensors file ({e}); give one") from None
        try:
            net.load_state_dict(weights)
        except RuntimeError as e:
            name, reason = self.config["model"].get("name", "?"), " ".join(str(e).split())[:160]
            raise ConfigError("checkpoint", path, f"does not fit model={name} ({reason}..); choose the model it was trained as") from None
        dtype = getattr(torch, self.evaluation.precision)
        net = net.eval() if dtype == torch.float32 else net.eval().to(dtype)
        return self.diffusion(net).to(self.evaluation.torch_device), facts

    def score(self) -> Path:
        """The store entry of the target's scores, computed if need be."""

        def make(folder: Path) -> None:
            diffusion, facts = self.target
            images = self.images.where(self.audited)
            score, cost = score_images(self.attack, self.threat_model, diffusion, images, self.evaluation, self.config["attack"]["name"])
            ScoreTable(images.sample_id, self.keep[self.audited], score).save(folder / "scores.parquet")
            (folder / "cost.json").write_text(json.dumps(cost | {"training": facts}))
            log.info("%s: %g model evaluations per image, %.1f s", self.config["attack"]["name"], cost["nfe_per_image"], cost["seconds"])

        return self.scores.get_or_make(self.scores_spec(), make)

    def preview(self) -> Pixels:
        """A few generated images, drawn once per target."""
        spec = {"attacked": self.attacked(), **PREVIEW}

        def make(folder: Path) -> None:
            drawn = self.target[0].sample(**PREVIEW)
            np.savez(folder / "samples.npz", images=((drawn + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())

        with np.load(self.samples.get_or_make(spec, make) / "samples.npz", allow_pickle=False) as f:
            pixels: Pixels = f["images"]
        return pixels


@lru_cache(maxsize=2)  # the cells of a grid share their data
def _load(key: str) -> tuple[MemberSplit, Images]:
    dataset, split_config, seed = json.loads(key)
    source: Source = build("dataset", dataset)
    split: MemberSplit = build("split", split_config, sample_id=source.sample_id, seed=seed)
    try:
        return split, Images(source.take(split.sample_id), split.sample_id)
    except ConfigError as e:
        raise e.under("dataset") from None


def _nameless(cfg: Mapping[str, Any]) -> Plain:
    """A group's config without its name, which changes nothing."""
    return {k: v for k, v in cfg.items() if k != "name"}
