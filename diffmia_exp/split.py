"""Who is a member of which model: `keep [n_models, n]`, one row per model, any of which can play the target."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffmia_exp.data import Ids, Images, read_npz
from diffmia_exp.errors import ConfigError, choice, whole
from diffmia_exp.noise import derive, generator, words

Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]
SHADOW_POOLS = ("same", "disjoint")


@dataclass(frozen=True)
class MemberSplit:
    """Members and non-members of every model.

    Args:
        sample_id: int64 [n], every image that any model's pool holds.
        pool: bool [n_models, n], the images a model's members are drawn from; a target is audited on its pool.
        keep: bool [n_models, n], the images a model is trained on; within its pool.
        target_index: the row that plays the target; the others are its shadows.
        copies: int64 [n], how often an image stands in the training set of every model that it is a member of; None for once each.
    """

    sample_id: Ids
    pool: Mask
    keep: Mask
    target_index: int = 0
    copies: Counts | None = None

    @property
    def public(self) -> Mask:
        """Images in no model's pool, bool [n]: known to be members of none."""
        mask: Mask = np.logical_not(self.pool.any(0))
        return mask

    @property
    def n_models(self) -> int:
        """Number of rows."""
        return len(self.keep)

    def crossing(self, images: Images) -> Mask:
        """Non-members of the target whose pixels equal a member's: bool [n]. An attack cannot be right about these."""
        keep, pool = self.keep[self.target_index], self.pool[self.target_index]
        hashes = images.hashes()
        members = {h for h, kept in zip(hashes, keep, strict=True) if kept}
        return np.array([h in members for h in hashes], dtype=bool) & pool & ~keep


def bernoulli(
    sample_id: Ids,
    seed: int,
    pool: int | None = None,
    n_models: int = 1,
    target_index: int = 0,
    shadow_pool: str = "same",
    public: int = 0,
    copies: list[int] | None = None,
) -> MemberSplit:
    """Every image of the pool is a member of a model independently with probability 1/2.

    Args:
        sample_id: int64 [N], the data set's ids.
        seed: of the draw.
        pool: images drawn from the data set, at random; None for all of them (half of them where shadows have a disjoint pool).
        n_models: target and shadows together.
        target_index: which row plays the target.
        shadow_pool: `same` (online: shadows share the audited images) or `disjoint` (auxiliary data of the same size).
        public: images beside the pools, which the adversary knows to be members of no model.
        copies: numbers of copies in the training set, of which each image is given one at random; None for one copy of each.
    """
    whole("n_models", n_models, least=1)
    whole("target_index", target_index, least=0, most=n_models - 1)
    ids, pools = _pools(sample_id, seed, "pool", pool, n_models, target_index, shadow_pool, public)
    return _checked(MemberSplit(ids, pools, _coins(seed, pools), target_index, _copies(seed, ids, copies)), "pool", pool)


def exact(
    sample_id: Ids,
    seed: int,
    n_members: int,
    n_nonmembers: int,
    n_models: int = 1,
    target_index: int = 0,
    shadow_pool: str = "same",
    public: int = 0,
    copies: list[int] | None = None,
) -> MemberSplit:
    """Exactly n_members members and n_nonmembers non-members per model. Other arguments as in `bernoulli`."""
    whole("n_members", n_members, least=1)
    whole("n_nonmembers", n_nonmembers, least=1)
    whole("n_models", n_models, least=1)
    whole("target_index", target_index, least=0, most=n_models - 1)
    size = n_members + n_nonmembers
    ids, pools = _pools(sample_id, seed, "n_members + split.n_nonmembers", size, n_models, target_index, shadow_pool, public)
    keep = np.zeros_like(pools)
    for row in range(n_models):
        keep[row, generator(seed, "split", row).permutation(np.flatnonzero(pools[row]))[:n_members]] = True
    return MemberSplit(ids, pools, keep, target_index, _copies(seed, ids, copies))


def from_file(
    sample_id: Ids,
    seed: int,
    path: str,
    n_models: int = 1,
    target_index: int = 0,
    shadow_pool: str = "same",
    public: int = 0,
    copies: list[int] | None = None,
) -> MemberSplit:
    """The target's members and held-out images from an index file; further rows for shadows are drawn as in `bernoulli`.

    Args:
        path: npz or json with `members` and `nonmembers` (or `mia_train_idxs` and `mia_eval_idxs`, as published with SecMI): ids.
    """
    whole("n_models", n_models, least=1)
    whole("target_index", target_index, least=0, most=n_models - 1)
    choice("shadow_pool", shadow_pool, SHADOW_POOLS)
    members, held_out = _read_indices(path)
    audited = np.concatenate([members, held_out])
    if len(np.unique(audited)) != len(audited):
        raise ConfigError("path", path, "lists an image twice, or as both member and non-member; list it once")
    if len(unknown := np.setdiff1d(audited, sample_id)):
        raise ConfigError("path", path, f"lists {len(unknown)} ids that the data set does not have, {unknown[0]} first; leave them out")
    audited = np.sort(audited)
    whole("public", public, least=0)
    if shadow_pool == "disjoint" and n_models > 1:
        rest = np.setdiff1d(sample_id, audited)
        if len(rest) < len(audited):
            must = f"needs {len(audited)} images beside those in {path} (or use shadow_pool=same); there are {len(rest)}"
            raise ConfigError("shadow_pool", shadow_pool, must)
        spare = np.sort(generator(seed, "pool").permutation(rest)[: len(audited)])
    else:
        spare = audited
    beside = generator(seed, "public").permutation(np.setdiff1d(sample_id, np.union1d(audited, spare)))
    if len(beside) < public:
        raise ConfigError("public", public, f"asks for more images than the {len(beside)} that are left beside the pools")
    ids = np.unique(np.concatenate([audited, spare, beside[:public]]))
    pools = np.stack([np.isin(ids, audited if row == target_index else spare) for row in range(n_models)])
    keep = _coins(seed, pools)
    keep[target_index] = np.isin(ids, members)
    return _checked(MemberSplit(ids, pools, keep, target_index, _copies(seed, ids, copies)), "path", path)


def _copies(seed: int, sample_id: Ids, copies: list[int] | None) -> Counts | None:
    """One of the numbers for each image, all with the same probability: a function of seed and sample id alone."""
    if copies is None:
        return None
    if not isinstance(copies, list) or not copies:
        raise ConfigError("copies", copies, "must be a list of numbers of copies, as [1,2,4,8], or null")
    for number in copies:
        whole("copies", number, least=1)
    return np.array(copies)[words(derive(seed, "copies"), torch.from_numpy(sample_id)).numpy() * len(copies) >> 32]


def _coins(seed: int, pools: Mask) -> Mask:
    """Each image of each pool with probability 1/2; public images, which no pool holds, take part in no draw and so change none."""
    drawn = pools.any(0)
    coins = np.zeros_like(pools)
    coins[:, drawn] = [generator(seed, "split", row).random(int(drawn.sum())) < 0.5 for row in range(len(pools))]
    return coins & pools


def _pools(
    sample_id: Ids, seed: int, key: str, size: int | None, n_models: int, target_index: int, shadow_pool: str, public: int
) -> tuple[Ids, Mask]:
    """Ids in play [n] and each model's pool [n_models, n]."""
    choice("shadow_pool", shadow_pool, SHADOW_POOLS)
    whole("public", public, least=0)
    parts = 2 if shadow_pool == "disjoint" and n_models > 1 else 1
    size = max(len(sample_id) - public, 0) // parts if size is None else whole(key, size, least=2)
    if parts * size > len(sample_id):
        beside = " and as many for the shadows' disjoint pool" if parts == 2 else ""
        raise ConfigError(
            key, size, f"asks for {size} images{beside}; the data set has {len(sample_id)}, so take at most {len(sample_id) // parts}"
        )
    if parts * size + public > len(sample_id):
        raise ConfigError("public", public, f"asks for more images than the {len(sample_id) - parts * size} that are left beside the pools")
    order = generator(seed, "pool").permutation(np.sort(sample_id))
    ids = np.sort(order[: parts * size + public])
    of_target = np.isin(ids, order[:size])
    of_shadows = np.isin(ids, order[(parts - 1) * size : parts * size])
    return ids, np.stack([of_target if row == target_index else of_shadows for row in range(n_models)])


def _checked(split: MemberSplit, key: str, given: object) -> MemberSplit:
    for row in range(split.n_models):
        members, rest = int(split.keep[row].sum()), int((split.pool[row] & ~split.keep[row]).sum())
        if min(members, rest) == 0:
            raise ConfigError(key, given, f"leaves model {row} {members} members and {rest} non-members; take more images")
    return split


def _read_indices(path: str | None) -> tuple[Ids, Ids]:
    file = Path(str(path)).expanduser()
    if file.is_file() and file.suffix == ".json":
        try:
            content = json.loads(file.read_text())
            arrays = {name: np.asarray(value) for name, value in content.items()}
        except (ValueError, AttributeError) as e:
            raise ConfigError("path", path, f"cannot be read as a json object of index lists ({e})") from None
    else:
        arrays = read_npz("path", path)
    for names in (("members", "nonmembers"), ("mia_train_idxs", "mia_eval_idxs")):
        if all(name in arrays for name in names):
            found = [arrays[name] for name in names]
            if any(a.ndim != 1 or len(a) == 0 or a.dtype.kind not in "iu" for a in found):
                raise ConfigError("path", path, f"{names[0]} and {names[1]} must be non-empty lists of whole numbers")
            return found[0].astype(np.int64), found[1].astype(np.int64)
    expected = "`members` and `nonmembers` (or `mia_train_idxs` and `mia_eval_idxs`)"
    raise ConfigError("path", path, f"must hold {expected}; it holds {', '.join(arrays) or 'nothing'}")
