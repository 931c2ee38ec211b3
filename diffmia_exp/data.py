"""Images and their stable ids, from wherever they come.

A `Source` knows its images by `sample_id` (the index in the source, never a position after a shuffle) and decodes only those it
is asked for. `conf/dataset/*.yaml` name the functions below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffmia_exp.errors import ConfigError, flag, whole

Pixels = NDArray[np.uint8]
Ids = NDArray[np.int64]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
MODES = {1: "L", 3: "RGB"}
MOST_CLASSES = 100_000  # more are no classes, but ids


@dataclass(frozen=True)
class Source:
    """A data set: the ids of its images, and a way to decode some of them.

    Args:
        sample_id: int64 [N], unique.
        take: maps ids [n] to uint8 images [n, C, H, W].
        labels: maps ids [n] to their classes int64 [n], and says how many classes the whole data set has; None where there are no
            labels. Only conditional models ask for them.
    """

    sample_id: Ids
    take: Callable[[Ids], Pixels]
    labels: Callable[[Ids], tuple[Ids, int]] | None = None


@dataclass(frozen=True)
class Images:
    """Decoded images with their ids.

    Args:
        pixels: uint8 [n, C, H, W].
        sample_id: int64 [n].
        labels: int64 [n], their classes; None where these are unknown, or nobody asks.
    """

    pixels: Pixels
    sample_id: Ids
    labels: Ids | None = None

    def __len__(self) -> int:
        return len(self.sample_id)

    def where(self, at: NDArray[np.bool_] | slice) -> Images:
        """The images selected by a boolean mask [n], or by a slice."""
        return Images(self.pixels[at], self.sample_id[at], None if self.labels is None else self.labels[at])

    def repeated(self, times: NDArray[np.int64]) -> Images:
        """Each image as often as `times` [n] says."""
        labels = None if self.labels is None else np.repeat(self.labels, times)
        return Images(np.repeat(self.pixels, times, 0), np.repeat(self.sample_id, times), labels)

    @property
    def fingerprint(self) -> str:
        """Hash of shape, ids and every pixel, whatever the labels; 16 hex digits."""
        h = hashlib.sha256(repr(self.pixels.shape).encode())
        h.update(np.ascontiguousarray(self.sample_id).tobytes())
        h.update(np.ascontiguousarray(self.pixels).tobytes())
        return h.hexdigest()[:16]

    @property
    def label_fingerprint(self) -> str | None:
        """Hash of the labels in their order, 16 hex digits; None without labels."""
        return None if self.labels is None else hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()[:16]

    def hashes(self) -> list[bytes]:
        """One hash per image, equal exactly for equal pixels."""
        return [hashlib.sha256(image.tobytes()).digest() for image in self.pixels]


def digits(image_size: int = 8, channels: int = 1) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, grey values 0..16 spread over 0..255. Embedded: no download."""
    whole("image_size", image_size, least=8, most=8)
    whole("channels", channels, least=1, most=1)
    from sklearn.datasets import load_digits  # a second to import

    content = load_digits()
    pixels = np.round(content.images * (255 / 16)).astype(np.uint8)[:, None]
    return Source(np.arange(len(pixels)), lambda ids: pixels[ids], lambda ids: (content.target[ids].astype(np.int64), 10))


def hub(
    path: str,
    image_size: int,
    channels: int,
    split: str = "train",
    image_column: str = "image",
    resize: bool = False,
    label_column: str | None = None,
) -> Source:
    """A data set in the Hugging Face layout: a hub name, or a local folder of the same shape.

    Args:
        path: hub name (`uoft-cs/cifar10`) or folder.
        image_size: height and width.
        channels: 1 (grey) or 3 (RGB).
        split: of the data set.
        image_column: the column that holds the images.
        resize: resize and centre-crop images of another size; otherwise they are an error.
        label_column: the column that holds the classes, whole numbers; None for images without labels.
    """
    _check_shape(image_size, channels)
    flag("resize", resize)
    looks_local = str(path).startswith((".", "/", "~")) or Path(str(path)).exists()
    folder = Path(str(path)).expanduser()
    if looks_local and not folder.is_dir():
        raise ConfigError("path", path, "no such folder; give a folder in the Hugging Face layout or a hub name")
    import datasets  # a second to import

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(str(folder) if looks_local else str(path), split=split)
    except Exception as e:  # the library raises a dozen unrelated types
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError("path", path, f"split {split!r} cannot be loaded ({reason}); give a readable local copy") from e
    for key, column in {"image_column": image_column, "label_column": label_column or image_column}.items():
        if column not in table.column_names:
            raise ConfigError(key, column, f"must be a column of {path}: {', '.join(table.column_names)}")

    def one(i: int) -> Any:
        try:
            return table[i][image_column]
        except Exception as e:
            raise ConfigError("path", path, f"image {i} cannot be decoded ({e}); mend or remove it") from None

    def take(ids: Ids) -> Pixels:
        try:
            decoded = table[ids.tolist()][image_column]
        except Exception:  # decoders raise all kinds of errors at damaged files
            decoded = [one(i) for i in ids.tolist()]
        if not all(isinstance(image, Image.Image) for image in decoded):
            raise ConfigError("image_column", image_column, "must hold images")
        return _stack([(f"image {i}", image) for i, image in zip(ids.tolist(), decoded, strict=True)], image_size, channels, resize)

    def labels(ids: Ids) -> tuple[Ids, int]:
        known = getattr(table.features[label_column], "num_classes", None)
        classes, n_classes = _classes("label_column", label_column, table.select_columns(label_column)[:][label_column], known)
        return classes[ids], n_classes

    return Source(np.arange(len(table)), take, labels if label_column else None)


def image_folder(path: str, image_size: int, channels: int = 3) -> Source:
    """Every image file below a folder, in the order of their relative paths, resized and centre-cropped to a square.

    The class of an image is the folder's subfolder that holds it, at whatever depth, counted in the order of their names.

    Args:
        path: the folder.
        image_size: height and width after resizing.
        channels: 1 (grey) or 3 (RGB).
    """
    _check_shape(image_size, channels)
    folder = Path(str(path)).expanduser()
    if path is None or not folder.is_dir():
        raise ConfigError("path", path, "no such folder; give one that holds images")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise ConfigError("path", path, f"holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def take(ids: Ids) -> Pixels:
        def opened(i: int) -> tuple[str, Image.Image]:
            try:
                with Image.open(files[i]) as image:
                    return str(files[i]), ImageOps.exif_transpose(image)
            except Exception as e:  # decoders raise all kinds of errors at damaged files
                reason = str(e).replace(f" {str(files[i])!r}", "")
                raise ConfigError("path", files[i], f"cannot be read as an image ({reason}); mend or remove the file") from None

        return np.concatenate([_stack([opened(i)], image_size, channels, resize=True) for i in ids.tolist()])

    def labels(ids: Ids) -> tuple[Ids, int]:
        within = [f.relative_to(folder) for f in files]
        if loose := [f for f in within if len(f.parts) == 1]:
            raise ConfigError("path", path, f"gives {len(loose)} images no class, {loose[0]} first; put each class into a subfolder")
        _, classes = np.unique([f.parts[0] for f in within], return_inverse=True)
        return classes.astype(np.int64)[ids], int(classes.max()) + 1

    return Source(np.arange(len(files)), take, labels)


def arrays(path: str, image_size: int, channels: int) -> Source:
    """An npz file with uint8 `images` [N, H, W], [N, H, W, C] or [N, C, H, W]; optionally with integers [N], `sample_id` and `labels`.

    Ids are unique, labels are classes from 0 on.
    """
    _check_shape(image_size, channels)
    content = read_npz("path", path)
    if "images" not in content:
        raise ConfigError("path", path, f"must hold an array `images`; it holds {', '.join(content) or 'nothing'}")
    images = content["images"]
    if images.dtype != np.uint8:
        raise ConfigError("path", path, f"`images` must be uint8, not {images.dtype}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in MODES and images.shape[3] in MODES:
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1:] != (channels, image_size, image_size):
        found = "x".join(map(str, images.shape[1:]))
        raise ConfigError("image_size", image_size, f"must agree with {path}, which holds {found} images (channels={channels})")
    sample_id = content.get("sample_id", np.arange(len(images)))
    if sample_id.shape != (len(images),) or sample_id.dtype.kind not in "iu" or len(np.unique(sample_id)) != len(images):
        raise ConfigError("path", path, "`sample_id` must be one distinct integer per image")
    position = {int(i): n for n, i in enumerate(sample_id)}

    def at(ids: Ids) -> list[int]:
        return [position[int(i)] for i in ids]

    def labels(ids: Ids) -> tuple[Ids, int]:
        classes, n_classes = _classes("path", path, content["labels"])
        if len(classes) != len(images):
            raise ConfigError("path", path, f"`labels` must be one whole number per image, {len(images)} of them, not {len(classes)}")
        return classes[at(ids)], n_classes

    return Source(sample_id.astype(np.int64), lambda ids: images[at(ids)], labels if "labels" in content else None)


def read_npz(key: str, path: str | None) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file, without pickles."""
    file = Path(str(path)).expanduser()
    if path is None or not file.is_file():
        raise ConfigError(key, path, "no such file; give an npz file")
    try:
        with np.load(file, allow_pickle=False) as f:
            return {name: f[name] for name in f.files}
    except Exception as e:  # zip, format and pickle errors alike: the file is not what it should be
        raise ConfigError(key, path, f"cannot be read as an npz file of plain arrays ({e})") from None


def _classes(key: str, given: str | None, found: Any, n_classes: int | None = None) -> tuple[Ids, int]:
    """A data set's labels as int64 [N], and the number of classes: what is known, or one more than the highest label."""
    try:
        classes = np.asarray(found)
    except ValueError:  # rows of different lengths
        classes = np.asarray(found, dtype=object)
    most = MOST_CLASSES if n_classes is None else n_classes
    if classes.ndim != 1 or classes.dtype.kind not in "iu" or not ((classes >= 0) & (classes < most)).all():
        raise ConfigError(key, given, f"must give each image a label that is a whole number from 0 to {most - 1}")
    return classes.astype(np.int64), int(classes.max()) + 1 if n_classes is None else n_classes


def _check_shape(image_size: int, channels: int) -> None:
    whole("image_size", image_size, least=1)
    if channels not in MODES:
        raise ConfigError("channels", channels, "must be 1 (grey) or 3 (RGB)")


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL would clip it to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ConfigError("path", name, f"has pixels of an unknown range (mode {image.mode}); convert it to 8 or 16 bits")
    return image


def _stack(named: list[tuple[str, Image.Image]], image_size: int, channels: int, resize: bool) -> Pixels:
    size = (image_size, image_size)
    out = np.empty((len(named), channels, image_size, image_size), np.uint8)
    for n, (name, image) in enumerate(named):
        if image.size != size and not resize:
            found = f"{image.size[0]}x{image.size[1]}"
            raise ConfigError("image_size", image_size, f"{name} is {found}; give its size or set dataset.resize=true")
        image = _eight_bit(image, name).convert(MODES[channels])
        pixels = np.asarray(ImageOps.fit(image, size) if image.size != size else image)
        out[n] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return out
