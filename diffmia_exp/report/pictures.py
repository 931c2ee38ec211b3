"""Pictures that runs keep: the most and least exposed images, and generated images beside the training images they copy."""

from __future__ import annotations

import zipfile

import numpy as np
from numpy.typing import NDArray

from diffmia_exp.report.collect import Collection
from diffmia_exp.report.groups import Group
from diffmia_exp.report.reading import Run

Pixels = NDArray[np.uint8]


def exposed(group: Group, found: Collection) -> dict[int, Pixels]:
    """Pixels [C, H, W] by sample id, from the runs' exposed.npz; what cannot be read is noted."""
    kept: dict[int, Pixels] = {}
    for run in group.runs:
        if arrays := _arrays(run, "exposed.npz", ("sample_id", "images"), found):
            kept |= {int(i): pixels for i, pixels in zip(arrays["sample_id"], arrays["images"], strict=True)}
    return kept


def near_copies(run: Run, found: Collection) -> list[tuple[Pixels, Pixels, int, float]]:
    """Generated image, training image, its id and the ratio, smallest ratio first, from a run's near_copies.npz."""
    arrays = _arrays(run, "near_copies.npz", ("generated", "training", "sample_id", "ratio"), found)
    if not arrays:
        return []
    pairs = zip(arrays["generated"], arrays["training"], arrays["sample_id"].tolist(), arrays["ratio"].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: pair[3])


def _arrays(run: Run, name: str, keys: tuple[str, ...], found: Collection) -> dict[str, NDArray[np.generic]]:
    """Arrays of equal length, those of pixels uint8 [k, C, H, W]; none where the file is missing or damaged."""
    path = run.folder / name
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in keys}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        found.note("damaged", path, f"cannot be read ({(str(e).splitlines() or [''])[0][:200]}); the run's other results are shown")
        return {}
    pixels = [arrays[key] for key in keys if key in ("images", "generated", "training")]
    kinds = {"sample_id": "iu", "ratio": "f"}
    wrong = any(arrays[key].dtype.kind not in kinds[key] for key in keys if key in kinds) or any(
        p.dtype != np.uint8 or p.ndim != 4 or p.shape[1] not in (1, 3) for p in pixels
    )
    if wrong or len({len(array) for array in arrays.values()}) != 1:
        found.note("damaged", path, "holds arrays of other shapes than expected; the run's other results are shown")
        return {}
    return arrays
