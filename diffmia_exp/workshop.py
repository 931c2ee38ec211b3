"""Where a cell's models, samples, signals and scores are made, each through the store: once, and found ever after."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from diffmia_exp import memorisation, runs, selection, specs, utility
from diffmia_exp.config import Plain
from diffmia_exp.data import Images, Pixels
from diffmia_exp.diffusion import Diffusion
from diffmia_exp.errors import ConfigError
from diffmia_exp.evaluation import measure, parts
from diffmia_exp.experiment import Experiment
from diffmia_exp.ranks import Ranks
from diffmia_exp.recipe import Recipe
from diffmia_exp.scores import ScoreTable
from diffmia_exp.selection import Candidate
from diffmia_exp.signals import Signals
from diffmia_exp.threat_models import generated

if TYPE_CHECKING:
    from diffmia_exp.lit import LitDiffusion

log = logging.getLogger(__name__)

PREVIEW = {"n": 64, "steps": 20, "seed": 0}


class Workshop:
    """Makes what an experiment needs. At most one model is in memory at a time."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.ranks = Ranks()
        self._loaded: tuple[int, Diffusion, Plain] | None = None

    def train(self, index: int, position: str = "") -> Path:
        """The store entry of model `index`, trained if need be; `position` says which of how many it is."""
        e = self.experiment
        spec, role = specs.model(e, index), e.role(index)
        if (found := e.stores["models"].get(spec)) is not None:
            return found
        net, members, recipe, row = self._training(index)
        label = f"training {role} model {index}{position}"
        name = f"m{row}" if row == index else f"m{row}-held-out"
        return self._trained(spec, net, members, recipe, e.seed, row, name, label, role == "shadow", index)

    def _training(self, index: int) -> tuple[torch.nn.Module, Images, Recipe, int]:
        """What the training of model `index` begins with: network, members, recipe, and the row whose draws it gets."""
        e = self.experiment
        recipe = e.shadow_recipe if e.role(index) == "shadow" else e.recipe
        return e.net(index), e.training_images(index), recipe, e.draws(index)

    def _trained(
        self,
        spec: Plain,
        net: torch.nn.Module,
        members: Images,
        recipe: Recipe,
        seed: int,
        row: int,
        name: str,
        label: str,
        shadow: bool,
        index: int | None = None,
    ) -> Path:
        """The store entry of a model; all ranks of the job train that of `index`, one device alone a model of the adversary's own."""
        e = self.experiment
        key = e.stores["models"].key(spec)

        def make(folder: Path) -> None:
            from diffmia_exp import checkpoints, lit  # seconds to import

            resume = checkpoints.resumable(folder)
            if index is not None:
                self.ranks.call(index, resume)
            options = e.trainer if index is not None else e.trainer.alone()
            called = f"train-{e.config['dataset']['name']}-s{e.seed}-{name}"
            with e.tracking.training(e.output_dir, key, called, spec, folder) as logger:
                made = self._module(members, shadow)
                lit.train(folder, e.diffusion(net), members.pixels, recipe, options, seed, row, label, logger, resume, made)

        return e.stores["models"].get_or_make(spec, make)

    def follow(self) -> None:
        """What the tasks of a SLURM job but the first do: take part in the trainings that the first one begins."""
        from diffmia_exp import lit

        e = self.experiment
        for index, resume in self.ranks.orders():
            net, members, recipe, row = self._training(index)
            folder, label = e.stores["models"].root / f"{specs.key(e, index)}.partial", f"training model {index}"
            made = self._module(members, e.role(index) == "shadow")
            lit.train(folder, e.diffusion(net), members.pixels, recipe, e.trainer, e.seed, row, label, None, resume, made)

    def _module(self, members: Images, shadow: bool) -> Callable[..., LitDiffusion]:
        """What makes the Lightning module of a training, with the defence and the labels."""
        e = self.experiment
        defense = e.defended(shadow)
        return partial(defense.lit(e.images.where(e.split.public)), defense=defense, labels=members.labels)

    def train_all(self) -> None:
        """Target and shadows, or the one model that was asked for."""
        e = self.experiment
        one = e.held_out if e.config["model_index"] == "held_out" else e.config["model_index"]
        wanted = [one] if one is not None else e.models
        for n, index in enumerate(wanted):
            log.info("model %d (%d of %d) is in %s", index, n + 1, len(wanted), self.train(index, f" ({n + 1} of {len(wanted)})"))

    def model(self, index: int) -> tuple[Diffusion, Plain]:
        """Model `index` with the attacked weights, in eval mode on the scoring device, and what is known of its training."""
        if self._loaded is not None and self._loaded[0] == index:
            return self._loaded[1:]
        self._loaded = None  # before the next one takes its place
        e = self.experiment
        if index == e.untrained:
            diffusion = self._ready(e.net(index), shadow=False)
            self._loaded = index, diffusion, {}
            return diffusion, {}
        if e.config["checkpoint"] is not None and index == e.target_index:
            path, facts = runs.existing_file("checkpoint", e.config["checkpoint"]), {}
        else:
            entry = self.train(index)
            prefix = "" if e.snapshot is None else f"step{e.snapshot:07d}-"
            path = entry / f"{prefix}{e.weights}.safetensors"
            facts = json.loads((entry / "training.json").read_text())
            if not path.exists():
                stopped = facts["defense"]["stopped_at"]
                raise ConfigError("snapshot", e.snapshot, f"must be at most {stopped}, where the training of model {index} was stopped")
        diffusion = self._read(path, e.net(index), e.role(index) == "shadow")
        self._loaded = index, diffusion, facts
        return diffusion, facts

    def _read(self, path: Path, net: torch.nn.Module, shadow: bool) -> Diffusion:
        from safetensors.torch import load_file

        e = self.experiment
        try:
            weights = load_file(path)
        except Exception as error:
            raise ConfigError("checkpoint", path, f"cannot be read as a safetensors file ({error}); give one") from None
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            name, reason = e.config["model"].get("name", "?"), " ".join(str(error).split())[:160]
            raise ConfigError("checkpoint", path, f"does not fit model={name} ({reason}..); choose the model it was trained as") from None
        return self._ready(net, shadow)

    def _ready(self, net: torch.nn.Module, shadow: bool) -> Diffusion:
        e = self.experiment
        net = e.defended(shadow).served(net)
        dtype = getattr(torch, e.evaluation.precision)
        net = net.eval() if dtype == torch.float32 else net.eval().to(dtype)
        return e.diffusion(net).to(e.evaluation.torch_device)

    def samples(self, index: int, n: int, steps: int, seed: int) -> Pixels:
        """n generated images of model `index` as its service gives them, uint8 [n, C, H, W], drawn once."""
        e = self.experiment
        spec = {"attacked": specs.attacked(e, index), "n": n, "steps": steps, "seed": seed} | specs.served(e, index)

        def make(folder: Path) -> None:
            drawn = generated(self.model(index)[0], n, steps, seed, e.service(index))
            np.savez(folder / "samples.npz", images=((drawn + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())

        with np.load(e.stores["samples"].get_or_make(spec, make) / "samples.npz", allow_pickle=False) as f:
            pixels: Pixels = f["images"]
        return pixels

    def preview(self) -> Pixels:
        """A few generated images of the target."""
        return self.samples(self.experiment.target_index, **PREVIEW)

    def _sampler(self, index: int) -> Callable[[int, int, int], torch.Tensor]:
        def sample(n: int, steps: int, seed: int) -> torch.Tensor:
            drawn = torch.from_numpy(self.samples(index, n, steps, seed)).to(self.experiment.evaluation.torch_device)
            return drawn.float() / 127.5 - 1

        return sample

    def measured(self, index: int, candidate: Candidate, position: str = "", images: Images | None = None) -> Path:
        """The store entry of a candidate's signals on model `index`, of `images` if given."""
        e = self.experiment

        def make(folder: Path) -> None:
            diffusion = self.model(index)[0]
            everything = e.images.where(e.measured)
            shown = e.shown(everything if images is None else images)
            most = max(len(everything), len(shown))
            access = e.threat_model.grant(diffusion, candidate.attack.access, most, self._sampler(index), e.service(index))
            label = f"measuring {e.config['attack']['name']}{position}"
            out, cost = measure(candidate.attack, access, Home(self, index), shown, e.evaluation, diffusion.device, label, folder)
            np.save(folder / "signals.npy", out, allow_pickle=False)
            (folder / "cost.json").write_text(json.dumps(cost))

        return e.stores["signals"].get_or_make(specs.signals(e, index, candidate, images), make)

    def measure_part(self, k: int, of: int) -> None:
        """Measure the k-th (from 1) of so many parts of the images on every model; whoever finds all parts there puts them together."""
        e = self.experiment
        everything = e.images.where(e.measured)
        slices = [at for at in parts(len(everything), e.evaluation.batch_size, of) if at.stop > at.start]
        shown = [everything.where(at) for at in slices]
        rows = [e.target_index, *e.shadows]
        for n, index in enumerate(rows):
            for candidate in e.candidates:
                for images in shown[k - 1 : k]:
                    self.measured(index, candidate, f", part {k} of {of}{_of(n, rows)}", images)
                found = [e.stores["signals"].get(specs.signals(e, index, candidate, images)) for images in shown]
                if all(found):
                    self._put_together(index, candidate, [entry for entry in found if entry], [len(images) for images in shown])

    def _put_together(self, index: int, candidate: Candidate, entries: list[Path], images: list[int]) -> None:
        def make(folder: Path) -> None:
            np.save(folder / "signals.npy", np.concatenate([np.load(p / "signals.npy", allow_pickle=False) for p in entries]))
            costs = [json.loads((p / "cost.json").read_text()) for p in entries]
            spent = sum(cost["nfe_per_image"] * n for cost, n in zip(costs, images, strict=True))
            spent -= (len(entries) - 1) * candidate.attack.nfe_once(len(self.experiment.alphas_cumprod))  # what is spent once
            cost = {"nfe_per_image": spent / sum(images), "seconds": round(sum(c["seconds"] for c in costs), 3)}
            (folder / "cost.json").write_text(json.dumps(cost))

        self.experiment.stores["signals"].get_or_make(specs.signals(self.experiment, index, candidate), make)

    def signals(self, candidate: Candidate) -> Signals:
        """A candidate's signals on the target and on all shadows that its attack needs."""
        e = self.experiment
        rows = [e.target_index, *e.shadows]
        read = [np.load(self.measured(row, candidate, _of(n, rows)) / "signals.npy", allow_pickle=False) for n, row in enumerate(rows)]
        at, shadows = e.measured, read[1:] or [np.empty((0, *read[0].shape))]
        keep, pool = e.split.keep[e.shadows][:, at], e.split.pool[e.shadows][:, at]
        return Signals(e.images.sample_id[at], read[0], np.concatenate(shadows).reshape(-1, *read[0].shape), keep, pool, e.split.public[at])

    def judged(self, candidate: Candidate, index: int) -> NDArray[np.float64]:
        """Scores of the audited images with model `index` in the target's place, judged by the target's shadows."""
        e = self.experiment
        position = f" on the {e.role(index)} model"
        signals = replace(
            self.signals(candidate), target=np.load(self.measured(index, candidate, position) / "signals.npy", allow_pickle=False)
        )
        return candidate.attack.judge(signals)[e.audited[e.measured]]

    def judged_generated(self, candidate: Candidate) -> NDArray[np.float64]:
        """Scores of the target's own generated images, judged among the measured ones, as members of no model's pool.

        Their ids are below all others, so that no image shares their noise.
        """
        e, pixels, real = self.experiment, self.preview(), self.signals(candidate)
        ids = min(int(e.images.sample_id.min()), 0) - 1 - np.arange(len(pixels))
        generated = Images(pixels, ids, e.generated_labels(len(pixels)))
        compared = e.shadows if candidate.attack.compares and candidate.attack.min_shadows else []
        rows = [e.target_index, *compared]
        entries = [self.measured(row, candidate, f" on generated images{_of(n, rows)}", generated) for n, row in enumerate(rows)]
        target, *measured = (np.load(entry / "signals.npy", allow_pickle=False) for entry in entries)
        shadows = np.full((len(e.shadows), *target.shape), np.nan)  # which nobody looks at, unless they are compared
        if measured:
            shadows[:] = measured
        none = np.zeros((len(e.shadows), len(pixels)), bool)
        signals = Signals(
            np.concatenate([real.sample_id, generated.sample_id]),
            np.concatenate([real.target, target]),
            np.concatenate([real.shadows, shadows], axis=1),
            np.concatenate([real.keep, none], axis=1),
            np.concatenate([real.pool, none], axis=1),
            np.concatenate([real.public, np.zeros(len(pixels), bool)]),
        )
        return candidate.attack.judge(signals)[-len(pixels) :]

    def memorisation(self) -> Path:
        """The store entry that compares the target's generated images with its training images, and with the held-out ones."""
        e = self.experiment
        members, held_out = e.images.where(e.members(e.target_index)), e.images.where(e.members(e.held_out))
        spec = {
            "memorisation": specs.attacked(e, e.target_index),
            "preview": PREVIEW,
            "members": members.fingerprint,
            "held_out": held_out.fingerprint,
        } | specs.served(e, e.target_index)

        def make(folder: Path) -> None:
            facts, pairs = memorisation.compare(self.preview(), members, held_out)
            (folder / "memorisation.json").write_text(json.dumps(facts, allow_nan=False))
            np.savez(folder / "near_copies.npz", allow_pickle=False, **pairs)

        return e.stores["controls"].get_or_make(spec, make)

    def utility(self) -> Plain:
        """What is said of the target's utility (`utility.measure`), measured once."""
        e = self.experiment
        assert e.utility is not None
        how = e.utility

        def make(folder: Path) -> None:
            generated = self.samples(e.target_index, how.n_samples, how.steps, how.seed)
            held_out = e.members(e.held_out) if how.heldout == "nonmembers" else e.split.public
            reference, members, others = (e.images.where(mask) for mask in (e.unseen, e.keep, held_out))
            diffusion = self.model(e.target_index)[0]
            facts = utility.measure(how, diffusion, generated, reference, members, others, e.evaluation, folder)
            (folder / "utility.json").write_text(json.dumps(facts, allow_nan=False))

        facts: Plain = json.loads((e.stores["controls"].get_or_make(specs.utility(e), make) / "utility.json").read_text())
        return facts

    def scores(self) -> Path:
        """The store entry of the target's scores, and how settings and thresholds were chosen."""
        e = self.experiment

        def make(folder: Path) -> None:
            rehearsals = e.config["attack"]["rehearsals"]
            chosen, rehearsal, tried = e.candidates[0], None, None
            rows = [e.target_index, *e.shadows]
            for n, index in enumerate(rows):  # model by model: the one in memory is measured with all candidates
                for candidate in e.candidates:
                    self.measured(index, candidate, _of(n, rows))
            if len(e.candidates) > 1:
                chosen, rehearsal, tried = selection.choose(e.candidates, self.signals, rehearsals)
            signals = self.signals(chosen)
            if rehearsal is None and len(e.shadows) > chosen.attack.min_shadows:
                rehearsal = selection.rehearse(chosen.attack, signals, rehearsals)
            score = chosen.attack.judge(signals)[e.audited[e.measured]]
            ScoreTable(e.images.sample_id[e.audited], e.keep[e.audited], score).save(folder / "scores.parquet")
            facts: Plain = {"select": e.config["attack"]["select"], "settings": chosen.settings, "tried": tried}
            if rehearsal is not None:
                facts |= {"shadow_auc": rehearsal.auc, "rehearsals": min(rehearsals, len(e.shadows))}
                facts["thresholds"] = selection.thresholds(rehearsal, e.evaluation.fprs)
            cost = json.loads((self.measured(e.target_index, chosen) / "cost.json").read_text())
            cost["shadow_trainings"] = len(e.shadows) + (len(rows) if chosen.attack.trains else 0)  # a surrogate of each measured model
            training = {} if e.config["checkpoint"] is not None else json.loads((self.train(e.target_index) / "training.json").read_text())
            (folder / "facts.json").write_text(json.dumps({"cost": cost, "training": training, "selection": facts}))
            log.info("%s: %g model evaluations per image, %.1f s", e.config["attack"]["name"], cost["nfe_per_image"], cost["seconds"])

        return e.stores["scores"].get_or_make(specs.scores(e), make)


class Home:
    """What an attack has beside its access (`attacks.base.Lab`) while it measures model `index`."""

    def __init__(self, workshop: Workshop, index: int) -> None:
        self._workshop, self._index = workshop, index

    @property
    def public(self) -> Images:
        """Images that are in no model's pool."""
        e = self._workshop.experiment
        return e.images.where(e.split.public)

    def train(self, pixels: Pixels) -> Diffusion:
        """A model of the adversary's own, trained by the recipe it believes in."""
        e = self._workshop.experiment
        seed = e.surrogate_seed(self._index)
        images = Images(pixels, np.arange(len(pixels)), e.generated_labels(len(pixels)))
        images = images.where(e.defended(shadow=True).kept(images))
        spec = specs.members(images) | specs.training(e, shadow=True) | {"seed": seed}
        net = e.net(e.split.n_models, seed)  # a row of its own, a shadow's network
        label = f"training a surrogate of model {self._index}"
        entry = self._workshop._trained(spec, net, images, e.shadow_recipe, seed, 0, f"surrogate{self._index}", label, shadow=True)
        return self._workshop._read(entry / f"{e.weights}.safetensors", net, shadow=True)


def _of(n: int, rows: list[int]) -> str:
    return f" (model {n + 1} of {len(rows)})" if len(rows) > 1 else ""
