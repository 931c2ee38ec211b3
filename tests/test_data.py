from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import stats
from sklearn.datasets import load_digits

from diffmia_exp import data, split
from diffmia_exp.data import Ids, Images, Pixels, Source
from diffmia_exp.errors import ConfigError
from diffmia_exp.split import MemberSplit

quick = settings(max_examples=60, deadline=None, derandomize=True)
SEED = st.integers(0, 2**32 - 1)


def random_pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_takes_by_id(source: Source, expected: Pixels) -> None:
    """`take` gives image i for the i-th id, whatever the order, alone and repeated; `expected` is in the order of `sample_id`."""
    ids = source.sample_id
    assert ids.dtype == np.int64
    assert len(ids) == len(expected)
    everything = source.take(ids)
    assert everything.dtype == np.uint8
    np.testing.assert_array_equal(everything, expected)
    order = np.random.default_rng(1).permutation(len(ids))
    for chosen in (order, order[::-1], order[:1], order[: len(ids) // 2], np.repeat(order[:2], 2)):
        np.testing.assert_array_equal(source.take(ids[chosen]), expected[chosen])


# --- digits


def test_digits_are_sklearns_spread_over_the_grey_values() -> None:
    source = data.digits()
    grey = load_digits().images
    assert_takes_by_id(source, np.rint(grey * 255 / 16).astype(np.uint8)[:, None])
    assert source.sample_id.tolist() == list(range(1797))
    pixels = source.take(source.sample_id)
    assert pixels.shape == (1797, 1, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 255)
    np.testing.assert_array_equal(np.round(pixels[:, 0] * (16 / 255)), grey)  # nothing is lost


@pytest.mark.parametrize("given_", [{"image_size": 16}, {"channels": 3}, {"image_size": 8.0}])
def test_digits_have_one_shape(given_: dict) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(given_))}="):
        data.digits(**given_)


# --- image_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG and JPEG files of mixed sizes, modes and depths, written in another order than that of their names."""
    root = tmp_path_factory.mktemp("images")
    (root / "b" / "deep").mkdir(parents=True)
    Image.fromarray(random_pixels(6, 6, 3, seed=3)).save(root / "b" / "deep" / "z.png")
    Image.fromarray(random_pixels(12, 12, seed=1)).save(root / "a2.png")  # grey
    Image.fromarray(random_pixels(6, 10, 3, seed=0)).save(root / "a10.PNG")  # wide
    Image.fromarray(random_pixels(20, 8, 3, seed=2)).save(root / "b" / "c.jpg", quality=95)  # tall
    Image.fromarray(random_pixels(6, 6, 4, seed=4)).save(root / "rgba.png")
    Image.fromarray(random_pixels(7, 7, 3, seed=5)).convert("P").save(root / "palette.png")
    Image.fromarray(random_pixels(6, 6, seed=6) > 127).save(root / "bits.png")  # mode 1
    Image.fromarray(random_pixels(9, 9, seed=7)).save(root / "grey.jpeg")
    (root / "notes.txt").write_text("not an image")
    (root / "dir.png").mkdir()
    return root


FOLDER_ORDER = ["a10.PNG", "a2.png", "b/c.jpg", "b/deep/z.png", "bits.png", "grey.jpeg", "palette.png", "rgba.png"]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_image_folder_follows_the_relative_paths(folder: Path, channels: int, mode: str) -> None:
    expected = [np.asarray(ImageOps.fit(Image.open(folder / name).convert(mode), (6, 6))) for name in FOLDER_ORDER]
    pixels = np.stack([p.reshape(6, 6, channels).transpose(2, 0, 1) for p in expected])
    source = data.image_folder(str(folder), 6, channels)
    assert source.sample_id.tolist() == list(range(8))
    assert_takes_by_id(source, pixels)


def test_image_folder_keeps_the_pixels_of_images_of_the_right_size(folder: Path) -> None:
    source = data.image_folder(str(folder), 6, 3)
    np.testing.assert_array_equal(source.take(np.array([3]))[0], random_pixels(6, 6, 3, seed=3).transpose(2, 0, 1))
    black_or_white = source.take(np.array([4]))[0]
    np.testing.assert_array_equal(black_or_white[0], (random_pixels(6, 6, seed=6) > 127) * 255)


def test_image_folder_crops_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    pixels = data.image_folder(str(tmp_path), 4).take(np.array([0, 1]))
    np.testing.assert_array_equal(pixels, np.full((2, 3, 4, 4), 200))


def test_image_folder_does_not_depend_on_where_the_folder_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    near, far = data.image_folder(folder.name, 6, 3), data.image_folder(str(folder), 6, 3)
    np.testing.assert_array_equal(near.take(near.sample_id), far.take(far.sample_id))


def test_image_folder_names_the_file_it_cannot_read(tmp_path: Path) -> None:
    Image.fromarray(random_pixels(4, 4, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    source = data.image_folder(str(tmp_path), 4)
    assert source.take(np.array([0])).shape == (1, 3, 4, 4)  # a file that nobody asks for does not matter
    for i, name in ((1, "b.png"), (2, "c.png")):
        with pytest.raises(ConfigError, match=name):
            source.take(np.array([0, i]))


@pytest.mark.parametrize("path", [None, "nowhere", "file.txt"])
def test_image_folder_needs_a_folder(tmp_path: Path, path: str | None) -> None:
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ConfigError, match="no such folder"):
        data.image_folder(path and str(tmp_path / path), 4)


def test_image_folder_needs_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="no image files"):
        data.image_folder(str(tmp_path), 4)


@pytest.mark.parametrize(
    ("size", "channels", "key"), [(0, 3, "image_size"), (4.0, 3, "image_size"), (4, 2, "channels"), (4, 4, "channels")]
)
def test_shapes_are_checked_by_every_loader(folder: Path, size: int, channels: int, key: str) -> None:
    for load in (data.image_folder, data.arrays, data.hub):
        with pytest.raises(ConfigError, match=f"^{key}="):
            load(str(folder), size, channels)


# --- arrays


def to_hw(pixels: Pixels) -> Pixels:
    return pixels[:, 0]


def to_hwc(pixels: Pixels) -> Pixels:
    return pixels.transpose(0, 2, 3, 1)


def to_chw(pixels: Pixels) -> Pixels:
    return pixels


@pytest.mark.parametrize(("layout", "channels"), [(to_hw, 1), (to_hwc, 1), (to_hwc, 3), (to_chw, 1), (to_chw, 3)])
@pytest.mark.parametrize("size", [4, 5, 8])
@pytest.mark.parametrize("sample_id", [None, [900, 3, -7, 2**40, 0, 1, 12]])
def test_arrays_in_every_layout(
    tmp_path: Path, layout: Callable[[Pixels], Pixels], channels: int, size: int, sample_id: list[int] | None
) -> None:
    pixels = random_pixels(7, channels, size, size)
    ids = {} if sample_id is None else {"sample_id": np.array(sample_id)}
    np.savez(tmp_path / "a.npz", images=layout(pixels), **ids)
    source = data.arrays(str(tmp_path / "a.npz"), size, channels)
    assert source.sample_id.tolist() == (sample_id or list(range(7)))
    assert_takes_by_id(source, pixels)


def test_arrays_accept_narrow_and_unsigned_ids(tmp_path: Path) -> None:
    pixels = random_pixels(3, 1, 4, 4)
    for dtype in (np.uint8, np.int16, np.uint32):
        np.savez(tmp_path / "a.npz", images=pixels, sample_id=np.array([9, 200, 7]).astype(dtype))
        source = data.arrays(str(tmp_path / "a.npz"), 4, 1)
        assert source.sample_id.tolist() == np.array([9, 200, 7]).astype(dtype).tolist()
        assert_takes_by_id(source, pixels)


BAD_ARRAYS = {
    "no images": ({"pixels": random_pixels(3, 4, 4)}, "must hold an array `images`; it holds pixels"),
    "floats": ({"images": np.zeros((3, 4, 4))}, "must be uint8, not float64"),
    "other size": ({"images": random_pixels(3, 5, 5)}, "1x5x5"),
    "other channels": ({"images": random_pixels(3, 3, 4, 4)}, "3x4x4"),
    "flat": ({"images": random_pixels(3, 16)}, "16"),
    "five axes": ({"images": random_pixels(3, 1, 1, 4, 4)}, "1x1x4x4"),
    "twice the same id": ({"images": random_pixels(3, 4, 4), "sample_id": np.array([1, 2, 1])}, "distinct integer"),
    "too few ids": ({"images": random_pixels(3, 4, 4), "sample_id": np.array([1, 2])}, "distinct integer"),
    "float ids": ({"images": random_pixels(3, 4, 4), "sample_id": np.array([1.0, 2, 3])}, "distinct integer"),
    "pickled": ({"images": np.array([{}, {}, {}], dtype=object)}, "plain arrays"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_refuse_what_they_cannot_use(tmp_path: Path, name: str) -> None:
    content, message = BAD_ARRAYS[name]
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ConfigError, match=message):
        data.arrays(str(tmp_path / "a.npz"), 4, 1)


def test_arrays_refuse_files_that_are_no_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no npz")
    with pytest.raises(ConfigError, match="cannot be read as an npz"):
        data.arrays(str(tmp_path / "a.npz"), 4, 1)
    for missing in (None, str(tmp_path / "b.npz"), str(tmp_path)):
        with pytest.raises(ConfigError, match="no such file"):
            data.arrays(missing, 4, 1)


# --- hub: a local folder in the Hugging Face layout

README = """---
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/train-*
  - split: test
    path: plain_text/test-*
---
"""


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two training files of 5 and 4 images, 3 test images; `img` RGB 6 x 6, `grey` 4 x 4 and `mixed` of several sizes."""
    import datasets

    root = tmp_path_factory.mktemp("hub")
    (root / "set" / "plain_text").mkdir(parents=True)
    (root / "set" / "README.md").write_text(README)
    for name, n, seed in (("train-00000-of-00002", 5, 0), ("train-00001-of-00002", 4, 1), ("test-00000-of-00001", 3, 2)):
        columns = {
            "img": [Image.fromarray(p) for p in random_pixels(n, 6, 6, 3, seed=seed)],
            "grey": [Image.fromarray(p) for p in random_pixels(n, 4, 4, seed=seed)],
            "mixed": [Image.fromarray(random_pixels(6 + k, 9, 3, seed=seed)) for k in range(n)],
            "label": list(range(n)),
        }
        image = datasets.Image()
        features = datasets.Features(img=image, grey=image, mixed=image, label=datasets.Value("int64"))
        datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "set" / "plain_text" / f"{name}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield root / "set"


def hwc_to_chw(*parts: Pixels) -> Pixels:
    return np.concatenate(parts).transpose(0, 3, 1, 2)


def test_hub_reads_the_splits_of_a_local_folder_in_order(hub_folder: Path) -> None:
    train = data.hub(str(hub_folder), 6, 3, image_column="img")
    assert train.sample_id.tolist() == list(range(9))
    assert_takes_by_id(train, hwc_to_chw(random_pixels(5, 6, 6, 3, seed=0), random_pixels(4, 6, 6, 3, seed=1)))
    test = data.hub(str(hub_folder), 6, 3, split="test", image_column="img")
    assert_takes_by_id(test, hwc_to_chw(random_pixels(3, 6, 6, 3, seed=2)))


def test_hub_converts_between_grey_and_colour(hub_folder: Path) -> None:
    grey = random_pixels(3, 4, 4, seed=2)
    assert_takes_by_id(data.hub(str(hub_folder), 4, 1, "test", "grey"), grey[:, None])
    assert_takes_by_id(data.hub(str(hub_folder), 4, 3, "test", "grey"), np.repeat(grey[:, None], 3, 1))
    colour = [np.asarray(Image.fromarray(p).convert("L")) for p in random_pixels(3, 6, 6, 3, seed=2)]
    assert_takes_by_id(data.hub(str(hub_folder), 6, 1, "test", "img"), np.stack(colour)[:, None])


def test_hub_resizes_only_on_request(hub_folder: Path) -> None:
    raw = [Image.fromarray(random_pixels(6 + k, 9, 3, seed=2)) for k in range(3)]
    expected = np.stack([np.asarray(ImageOps.fit(image, (5, 5))) for image in raw])
    resized = data.hub(str(hub_folder), 5, 3, "test", "mixed", resize=True)
    assert_takes_by_id(resized, hwc_to_chw(expected))
    strict = data.hub(str(hub_folder), 6, 3, "test", "mixed")
    with pytest.raises(ConfigError, match=r"image_size=6: image 1 is 9x7; .*resize=true"):
        strict.take(np.array([1]))


def test_hub_keeps_images_of_the_right_size_when_it_may_resize(hub_folder: Path) -> None:
    strict, free = (data.hub(str(hub_folder), 6, 3, image_column="img", resize=r) for r in (False, True))
    np.testing.assert_array_equal(strict.take(strict.sample_id), free.take(free.sample_id))


def test_hub_explains_what_it_cannot_use(hub_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_column=image: must be a column of .*: img, grey, mixed, label"):
        data.hub(str(hub_folder), 6, 3)
    with pytest.raises(ConfigError, match="image_column=label: must hold images"):
        data.hub(str(hub_folder), 6, 3, image_column="label").take(np.array([0]))
    with pytest.raises(ConfigError, match="split 'validation' cannot be loaded"):
        data.hub(str(hub_folder), 6, 3, split="validation", image_column="img")
    with pytest.raises(ConfigError, match="no such folder"):
        data.hub(str(hub_folder / "nowhere"), 6, 3)
    with pytest.raises(ConfigError, match=r"^resize="):
        data.hub(str(hub_folder), 6, 3, resize="yes")  # type: ignore[arg-type]


# --- labels


def assert_labels(source: Source, expected: list[int], n_classes: int) -> None:
    """Label i for the i-th id, whatever the order, alone and repeated; `expected` is in the order of `sample_id`."""
    assert source.labels is not None
    order = np.random.default_rng(1).permutation(len(expected))
    for chosen in (np.arange(len(expected)), order, order[:1], np.repeat(order[:2], 2)):
        labels, n = source.labels(source.sample_id[chosen])
        assert (labels.dtype, n) == (np.int64, n_classes)
        assert labels.tolist() == np.array(expected)[chosen].tolist()


def test_digits_are_labelled_with_their_number() -> None:
    assert_labels(data.digits(), load_digits().target.tolist(), 10)


def test_arrays_give_each_id_its_label(tmp_path: Path) -> None:
    ids, labels = np.array([900, 3, -7, 12]), np.array([2, 0, 5, 2], np.uint8)
    np.savez(tmp_path / "a.npz", images=random_pixels(4, 4, 4), sample_id=ids, labels=labels)
    assert_labels(data.arrays(str(tmp_path / "a.npz"), 4, 1), [2, 0, 5, 2], 6)
    np.savez(tmp_path / "b.npz", images=random_pixels(4, 4, 4))
    assert data.arrays(str(tmp_path / "b.npz"), 4, 1).labels is None


BAD_LABELS = {
    "floats": [0.0, 1.0, 2.0],
    "negative": [0, -1, 2],
    "ids": [0, 1, 10**9],
    "truth": [True, False, True],
    "two axes": [[0], [1], [2]],
    "too few": [0, 1],
    "words": ["a", "b", "c"],
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_arrays_refuse_labels_they_cannot_use_once_they_are_asked_for(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "a.npz", images=random_pixels(3, 4, 4), labels=np.array(BAD_LABELS[name]))
    source = data.arrays(str(tmp_path / "a.npz"), 4, 1)
    assert len(source.take(source.sample_id)) == 3
    assert source.labels is not None
    with pytest.raises(ConfigError, match="whole number"):
        source.labels(source.sample_id)


def test_image_folder_takes_the_subfolders_for_classes(tmp_path: Path) -> None:
    for name in ("cat/b.png", "ant/z/a.png", "cat/a.png", "bee/c.png", "ant/q.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(4, 4, 3)).save(tmp_path / name)
    source = data.image_folder(str(tmp_path), 4)
    assert_labels(source, [0, 0, 1, 2, 2], 3)
    Image.fromarray(random_pixels(4, 4, 3)).save(tmp_path / "loose.png")
    source = data.image_folder(str(tmp_path), 4)
    assert len(source.take(source.sample_id)) == 6
    assert source.labels is not None
    with pytest.raises(ConfigError, match=r"gives 1 images no class, loose.png first"):
        source.labels(source.sample_id)


def test_hub_reads_a_column_of_classes(hub_folder: Path) -> None:
    assert data.hub(str(hub_folder), 6, 3, image_column="img").labels is None
    source = data.hub(str(hub_folder), 6, 3, image_column="img", label_column="label")
    assert_labels(source, [0, 1, 2, 3, 4, 0, 1, 2, 3], 5)
    with pytest.raises(ConfigError, match=r"label_column=fine_label: must be a column of .*: img, grey, mixed, label"):
        data.hub(str(hub_folder), 6, 3, image_column="img", label_column="fine_label")
    images = data.hub(str(hub_folder), 6, 3, image_column="img", label_column="grey")
    assert images.labels is not None
    with pytest.raises(ConfigError, match=r"^label_column=grey: .*whole number"):
        images.labels(images.sample_id)


def test_hub_knows_of_classes_that_no_image_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cat", "dog"]))
    for name, labels in (("whole", [2, 0]), ("lacking", [2, -1])):
        columns = {"image": [Image.fromarray(random_pixels(4, 4))] * 2, "label": labels}
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / name / "train.parquet")
    assert_labels(data.hub(str(tmp_path / "whole"), 4, 1, label_column="label"), [2, 0], 4)
    lacking = data.hub(str(tmp_path / "lacking"), 4, 1, label_column="label")
    assert lacking.labels is not None
    with pytest.raises(ConfigError, match="from 0 to 3"):  # -1 stands for no label in that format
        lacking.labels(lacking.sample_id)


# --- Images and their fingerprint


@quick
@given(
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 4), st.integers(1, 4)),
    seed=SEED,
    where=st.integers(0, 10**6),
    delta=st.integers(1, 255),
)
def test_fingerprint_changes_with_any_pixel_and_any_id(shape: tuple[int, ...], seed: int, where: int, delta: int) -> None:
    pixels, ids = random_pixels(*shape, seed=seed), np.arange(shape[0])
    before = Images(pixels, ids).fingerprint
    assert before == Images(pixels.copy(), ids.copy()).fingerprint
    assert len(before) == 16
    assert int(before, 16) >= 0
    other = pixels.copy()
    other.reshape(-1)[where % pixels.size] ^= np.uint8(delta)
    assert Images(other, ids).fingerprint != before
    shifted = ids.copy()
    shifted[where % len(ids)] += delta
    assert Images(pixels, shifted).fingerprint != before


def test_fingerprint_sees_shape_and_order() -> None:
    pixels, ids = random_pixels(4, 1, 4, 6), np.arange(4)
    same_bytes = [pixels, pixels.reshape(4, 1, 6, 4), pixels.reshape(4, 2, 2, 6), pixels.reshape(4, 3, 2, 4)]
    assert len({Images(p, ids).fingerprint for p in same_bytes}) == 4
    order = np.array([1, 0, 2, 3])
    assert len({Images(p, i).fingerprint for p in (pixels, pixels[order]) for i in (ids, ids[order])}) == 4


def test_fingerprint_does_not_see_memory_layout() -> None:
    pixels, ids = random_pixels(4, 3, 5, 5), np.arange(8)
    strided = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not strided.flags.c_contiguous
    assert Images(strided, ids[::2]).fingerprint == Images(pixels, ids[::2].copy()).fingerprint
    assert Images(strided, ids[:4]).hashes() == Images(pixels, ids[:4]).hashes()


def test_labels_stay_with_their_images_and_out_of_the_fingerprint() -> None:
    labels = np.array([2, 0, 1, 1])
    plain = Images(random_pixels(4, 1, 2, 2), np.arange(4))
    images = Images(plain.pixels, plain.sample_id, labels)
    assert images.fingerprint == plain.fingerprint
    assert (plain.label_fingerprint, plain.where(slice(1, 3)).labels) == (None, None)
    for at in (np.array([True, False, True, True]), slice(1, 3)):
        chosen = images.where(at)
        assert chosen.labels is not None
        assert chosen.labels.tolist() == [labels[i] for i in chosen.sample_id]
        np.testing.assert_array_equal(chosen.pixels, plain.pixels[chosen.sample_id])
    others = [Images(plain.pixels, plain.sample_id, other).label_fingerprint for other in (labels, labels[::-1], labels + 1)]
    assert len(set(others)) == 3
    assert Images(plain.pixels, plain.sample_id, labels.astype(np.int32)).label_fingerprint == others[0]


def test_where_keeps_pixels_and_ids_together() -> None:
    images = Images(random_pixels(6, 1, 2, 2), np.array([5, 3, 9, 1, 0, 7]))
    mask = np.array([0, 1, 1, 0, 0, 1], bool)
    some = images.where(mask)
    assert (len(images), len(some)) == (6, 3)
    assert some.sample_id.tolist() == [3, 9, 7]
    np.testing.assert_array_equal(some.pixels, images.pixels[[1, 2, 5]])


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_hashes_are_equal_exactly_for_equal_pixels(kinds: list[int]) -> None:
    distinct = random_pixels(4, 1, 3, 3)
    distinct[1] = distinct[0]
    distinct[1, 0, 2, 2] ^= 1  # one bit apart
    hashes = Images(distinct[kinds], np.arange(len(kinds))).hashes()
    for i, one in enumerate(kinds):
        for j, two in enumerate(kinds):
            assert (hashes[i] == hashes[j]) == (one == two)


# --- MemberSplit


@st.composite
def pools_of_ids(draw: st.DrawFn, least: int = 40) -> Ids:
    n = draw(st.integers(least, 160))
    start, step = draw(st.integers(-1000, 2**40)), draw(st.integers(1, 9))
    return np.random.default_rng(draw(SEED)).permutation(start + step * np.arange(n))


def assert_equal_splits(one: MemberSplit, two: MemberSplit) -> None:
    np.testing.assert_array_equal(one.sample_id, two.sample_id)
    np.testing.assert_array_equal(one.pool, two.pool)
    np.testing.assert_array_equal(one.keep, two.keep)
    assert one.target_index == two.target_index


def assert_sound(member_split: MemberSplit, ids: Ids, n_models: int, target_index: int, shadow_pool: str) -> None:
    """What every split promises, however it was made."""
    sample_id, pool, keep = member_split.sample_id, member_split.pool, member_split.keep
    assert sample_id.dtype == np.int64
    assert (np.diff(sample_id) > 0).all()
    assert set(sample_id.tolist()) <= set(ids.tolist())
    assert pool.shape == keep.shape == (n_models, len(sample_id))
    assert member_split.n_models == n_models
    assert member_split.target_index == target_index
    assert not (keep & ~pool).any()
    assert pool.any(0).all()  # no image without a pool
    assert len({int(row.sum()) for row in pool}) == 1
    shadows = np.delete(pool, target_index, 0)
    if shadow_pool == "disjoint" and n_models > 1:
        assert not (shadows & pool[target_index]).any()
        assert (shadows == ~pool[target_index]).all()
    else:
        assert pool.all()
    assert keep.any(1).all()
    assert (pool & ~keep).any(1).all()


COMMON = {
    "seed": SEED,
    "shape": st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    "shadow_pool": st.sampled_from(split.SHADOW_POOLS),
}


@quick
@given(ids=pools_of_ids(), size=st.none() | st.integers(18, 20), **COMMON)
def test_bernoulli_is_sound(ids: Ids, size: int | None, seed: int, shape: tuple[int, int], shadow_pool: str) -> None:
    n_models, target = shape
    made = split.bernoulli(ids, seed, size, n_models, target, shadow_pool)
    assert_sound(made, ids, n_models, target, shadow_pool)
    parts = 2 if shadow_pool == "disjoint" and n_models > 1 else 1
    assert made.pool[target].sum() == (size or len(ids) // parts)
    assert_equal_splits(made, split.bernoulli(np.sort(ids), seed, size, n_models, target, shadow_pool))


@quick
@given(ids=pools_of_ids(), m=st.integers(1, 10), n=st.integers(1, 10), **COMMON)
def test_exact_sizes_are_exact(ids: Ids, m: int, n: int, seed: int, shape: tuple[int, int], shadow_pool: str) -> None:
    n_models, target = shape
    made = split.exact(ids, seed, m, n, n_models, target, shadow_pool)
    assert_sound(made, ids, n_models, target, shadow_pool)
    assert made.keep.sum(1).tolist() == [m] * n_models
    assert (made.pool & ~made.keep).sum(1).tolist() == [n] * n_models
    assert_equal_splits(made, split.exact(np.sort(ids), seed, m, n, n_models, target, shadow_pool))


@quick
@given(ids=pools_of_ids(), seed=SEED, n_models=st.integers(2, 5))
def test_any_row_can_play_the_target(ids: Ids, seed: int, n_models: int) -> None:
    """M trainings give M targets: with one pool for all, the rows do not depend on which of them is the target, nor on how many follow."""
    for make in (lambda n, t: split.bernoulli(ids, seed, 40, n, t), lambda n, t: split.exact(ids, seed, 15, 25, n, t)):
        first = make(n_models, 0)
        for target in range(1, n_models):
            np.testing.assert_array_equal(make(n_models, target).keep, first.keep)
        np.testing.assert_array_equal(make(n_models + 1, 0).keep[:n_models], first.keep)


@quick
@given(ids=pools_of_ids(), seed=SEED)
def test_seeds_and_rows_differ(ids: Ids, seed: int) -> None:
    one, two = (split.bernoulli(ids, s, None, 2) for s in (seed, seed + 1))
    rows = [*one.keep, *two.keep]
    assert len({row.tobytes() for row in rows}) == 4
    some, others = (split.bernoulli(ids, s, len(ids) // 2) for s in (seed, seed + 1))
    assert set(some.sample_id.tolist()) != set(others.sample_id.tolist())


@quick
@given(n=st.integers(200, 3000), seed=SEED)
def test_bernoulli_includes_half_of_the_pool(n: int, seed: int) -> None:
    members = split.bernoulli(np.arange(n), seed).keep.sum()
    low, high = stats.binom.ppf([1e-8, 1 - 1e-8], n, 0.5)
    assert low <= members <= high


@pytest.mark.parametrize("shadow_pool", split.SHADOW_POOLS)
def test_each_image_is_a_member_half_of_the_time_independently(shadow_pool: str) -> None:
    made = split.bernoulli(np.arange(120), 7, 60, 400, 3, shadow_pool)
    shadows = np.delete(made.keep, 3, 0)[:, np.delete(made.pool, 3, 0)[0]]  # [399, 60]
    n_rows = len(shadows)
    p = stats.binomtest
    assert p(int(shadows.sum()), shadows.size).pvalue > 1e-3
    # Counts per image follow the binomial: their dispersion is that of independent rows.
    for counts, trials in ((shadows.sum(0), n_rows), (shadows.sum(1), shadows.shape[1])):
        dispersion = ((counts - trials / 2) ** 2).sum() / (trials / 4)
        low, high = stats.chi2.ppf([5e-4, 1 - 5e-4], len(counts))
        assert low < dispersion < high
    # No two rows agree more or less often than coins.
    agree = (shadows[:, None] == shadows[None]).sum(2)[np.triu_indices(n_rows, 1)]
    low, high = stats.binom.ppf([1e-3 / len(agree), 1 - 1e-3 / len(agree)], shadows.shape[1], 0.5)
    assert low <= agree.min()
    assert agree.max() <= high


def test_exact_chooses_every_image_equally_often() -> None:
    keep = split.exact(np.arange(30), 3, 10, 20, 900).keep
    low, high = stats.binom.ppf([1e-3 / 60, 1 - 1e-3 / 60], 900, 1 / 3)
    assert low <= keep.sum(0).min()
    assert keep.sum(0).max() <= high


def test_copies_are_drawn_for_each_id_whatever_else_is_drawn() -> None:
    ids = np.concatenate([np.arange(-200, 6000), [2**40 + 7]])
    whole = split.bernoulli(ids, seed=3, copies=[1, 2, 8])
    assert whole.copies is not None
    drawn = dict(zip(whole.sample_id.tolist(), whole.copies.tolist(), strict=True))
    for other in (
        split.bernoulli(ids[::-1], seed=3, pool=50, n_models=3, target_index=1, copies=[1, 2, 8]),
        split.exact(ids, seed=3, n_members=9, n_nonmembers=7, public=5, copies=[1, 2, 8]),
    ):
        assert other.copies is not None
        assert [drawn[i] for i in other.sample_id.tolist()] == other.copies.tolist()
    assert stats.chisquare(np.bincount(whole.copies)[[1, 2, 8]]).pvalue > 1e-3
    member = whole.keep[0]
    assert abs(np.mean(whole.copies[member]) - np.mean(whole.copies[~member])) < 0.3, "copies must not tell of membership"
    elsewhere = split.bernoulli(ids, seed=4, copies=[1, 2, 8])
    assert elsewhere.copies is not None
    assert (elsewhere.copies != whole.copies).mean() > 0.5
    assert_equal_splits(split.bernoulli(ids, seed=3), whole)


def test_pools_are_drawn_at_random_from_the_whole_data_set() -> None:
    drawn = np.stack([np.isin(np.arange(50), split.bernoulli(np.arange(50), seed, 20).sample_id) for seed in range(500)])
    low, high = stats.binom.ppf([1e-3 / 100, 1 - 1e-3 / 100], 500, 0.4)
    assert low <= drawn.sum(0).min()
    assert drawn.sum(0).max() <= high


BAD_SPLITS = {
    "too large a pool": (lambda ids: split.bernoulli(ids, 0, 101), "pool=101: asks for 101 images; the data set has 100"),
    "no room beside it": (lambda ids: split.bernoulli(ids, 0, 51, 2, 0, "disjoint"), "pool=51: .*disjoint pool; the data set has 100"),
    "pool of one": (lambda ids: split.bernoulli(ids, 0, 1), "^pool=1: "),
    "pool no number": (lambda ids: split.bernoulli(ids, 0, "all"), "^pool=all: "),
    "no model": (lambda ids: split.bernoulli(ids, 0, 50, 0), "^n_models=0: "),
    "target beyond": (lambda ids: split.bernoulli(ids, 0, 50, 3, 3), "^target_index=3: "),
    "negative target": (lambda ids: split.exact(ids, 0, 5, 5, 3, -1), "^target_index=-1: "),
    "pool kind": (lambda ids: split.exact(ids, 0, 5, 5, 3, 0, "disjont"), "shadow_pool=disjont: .*did you mean disjoint"),
    "no members": (lambda ids: split.exact(ids, 0, 0, 5), "^n_members=0: "),
    "no non-members": (lambda ids: split.exact(ids, 0, 5, 0), "^n_nonmembers=0: "),
    "too many": (lambda ids: split.exact(ids, 0, 60, 41), "asks for 101 images"),
    "too many for both": (lambda ids: split.exact(ids, 0, 30, 21, 2, 0, "disjoint"), "asks for 51 images"),
    "one class only": (lambda ids: split.bernoulli(ids, 0, 2, 40), r"pool=2: leaves model \d+ \d members and \d non-members"),
}


@pytest.mark.parametrize("name", BAD_SPLITS)
def test_splits_that_cannot_be_made_are_refused(name: str) -> None:
    make, message = BAD_SPLITS[name]
    with pytest.raises(ConfigError, match=message):
        make(np.arange(100))


# --- from_file


@pytest.fixture(scope="module")
def index_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("indices")


KEYS = [("members", "nonmembers"), ("mia_train_idxs", "mia_eval_idxs")]


def write_indices(path: Path, **lists: object) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps({k: np.asarray(v).tolist() for k, v in lists.items()}))
    else:
        np.savez(path, **{k: np.asarray(v) for k, v in lists.items()})
    return str(path)


@pytest.mark.parametrize("suffix", ["npz", "json"])
@pytest.mark.parametrize("keys", KEYS, ids=["ours", "secmi"])
@settings(quick, max_examples=20)
@given(ids=pools_of_ids(60), m=st.integers(1, 15), n=st.integers(10, 15), **COMMON)
def test_from_file_gives_the_target_the_listed_members(
    index_folder: Path, suffix: str, keys: tuple[str, str], ids: Ids, m: int, n: int, seed: int, shape: tuple[int, int], shadow_pool: str
) -> None:
    n_models, target = shape
    members, held_out = ids[:m], ids[m : m + n]
    path = write_indices(index_folder / f"{keys[0]}.{suffix}", **{keys[0]: members, keys[1]: held_out})
    made = split.from_file(ids, seed, path, n_models, target, shadow_pool)
    assert_sound(made, ids, n_models, target, shadow_pool)
    assert set(made.sample_id[made.keep[target]].tolist()) == set(members.tolist())
    assert set(made.sample_id[made.pool[target] & ~made.keep[target]].tolist()) == set(held_out.tolist())
    assert_equal_splits(made, split.from_file(np.sort(ids), seed, path, n_models, target, shadow_pool))


def test_from_file_draws_shadows_as_coins(index_folder: Path) -> None:
    path = write_indices(index_folder / "even.npz", members=np.arange(0, 200, 2), nonmembers=np.arange(1, 200, 2))
    made = split.from_file(np.arange(400), 5, path, 60, 10)
    shadows = np.delete(made.keep, 10, 0)
    low, high = stats.binom.ppf([1e-3 / 400, 1 - 1e-3 / 400], 59, 0.5)
    assert low <= shadows.sum(0).min()
    assert shadows.sum(0).max() <= high
    assert len({row.tobytes() for row in made.keep}) == 60


def test_from_file_orders_of_the_lists_do_not_matter(index_folder: Path) -> None:
    one = write_indices(index_folder / "one.json", members=[3, 1, 2], nonmembers=[9, 7])
    two = write_indices(index_folder / "two.npz", mia_train_idxs=[2, 3, 1], mia_eval_idxs=[7, 9], labels=[0.5])
    assert_equal_splits(split.from_file(np.arange(10), 0, one), split.from_file(np.arange(10), 0, two))


BAD_INDICES = {
    "overlap.npz": ({"members": [1, 2], "nonmembers": [2, 3]}, "lists an image twice, or as both"),
    "twice.json": ({"members": [1, 1], "nonmembers": [2, 3]}, "lists an image twice"),
    "unknown.json": ({"members": [1, 50], "nonmembers": [60]}, "lists 2 ids that the data set does not have, 50 first"),
    "half.npz": ({"members": [1, 2], "mia_eval_idxs": [3]}, "it holds members, mia_eval_idxs"),
    "empty.json": ({"members": [], "nonmembers": [3]}, "non-empty lists of whole numbers"),
    "floats.json": ({"members": [1.5], "nonmembers": [3]}, "non-empty lists of whole numbers"),
    "flags.npz": ({"members": [True, False], "nonmembers": [3]}, "non-empty lists of whole numbers"),
    "matrix.npz": ({"members": [[1, 2]], "nonmembers": [3]}, "non-empty lists of whole numbers"),
    "nothing.json": ({}, "it holds nothing"),
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_from_file_refuses_lists_it_cannot_use(tmp_path: Path, name: str) -> None:
    content, message = BAD_INDICES[name]
    with pytest.raises(ConfigError, match=message):
        split.from_file(np.arange(20), 0, write_indices(tmp_path / name, **content))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"members": [[1], [2, 3]], "nonmembers": [4]}'])
def test_from_file_refuses_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be read as a json object of index lists"):
        split.from_file(np.arange(20), 0, str(tmp_path / "a.json"))


def test_from_file_needs_a_file_and_room_for_a_disjoint_pool(tmp_path: Path) -> None:
    for missing in (None, str(tmp_path / "a.npz"), str(tmp_path / "a.json")):
        with pytest.raises(ConfigError, match=r"^path=.*no such file"):
            split.from_file(np.arange(20), 0, missing)  # type: ignore[arg-type]
    path = write_indices(tmp_path / "a.npz", members=np.arange(6), nonmembers=np.arange(6, 12))
    with pytest.raises(ConfigError, match=r"^shadow_pool=disjoint: needs 12 images beside those in .*; there are 8$"):
        split.from_file(np.arange(20), 0, path, 2, 0, "disjoint")


# --- crossing


@quick
@given(ids=pools_of_ids(), planted=st.integers(0, 6), **COMMON)
def test_crossing_finds_exactly_the_planted_duplicates(ids: Ids, planted: int, seed: int, shape: tuple[int, int], shadow_pool: str) -> None:
    n_models, target = shape
    made = split.bernoulli(ids, seed, 20, n_models, target, shadow_pool)
    pixels = random_pixels(len(made.sample_id), 1, 3, 3, seed=seed)  # 72 random bits: no accidental duplicates
    members = np.flatnonzero(made.keep[target])
    others = np.flatnonzero(made.pool[target] & ~made.keep[target])
    twins = others[:planted]
    pixels[twins] = pixels[members[0]]
    # None of these cross: two non-members alike, two members alike, one bit of difference, images outside the target's pool.
    pixels[others[planted : planted + 2]] = 1
    pixels[members[1:3]] = 2
    if len(others) > planted + 2:
        pixels[others[planted + 2]] = pixels[members[0]]
        pixels[others[planted + 2], 0, 0, 0] ^= 1
    pixels[~made.pool[target]] = pixels[members[0]]
    crossing = made.crossing(Images(pixels, made.sample_id))
    assert crossing.dtype == bool
    assert np.flatnonzero(crossing).tolist() == twins.tolist()


def test_crossing_needs_the_images_of_the_split() -> None:
    made = split.exact(np.arange(10), 0, 5, 5)
    with pytest.raises(ValueError):
        made.crossing(Images(random_pixels(9, 1, 2, 2), np.arange(9)))
