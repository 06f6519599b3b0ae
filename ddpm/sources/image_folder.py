"""The four sources of images: digits, cifar10, fashion-mnist and image-folder.

Opening a source finds out what it holds; nothing large is read until `fill` is called. Sides that a network with four
levels could not halve (28 pixels) are padded with zeros, centred, to the next multiple of 8, unless `data.size` names
the side.

An image-folder is a folder with PNG and JPEG files at any depth, with zip files that count as unpacked where they lie,
or one zip file. The path of an image decides what it is:

    [train/|test/][CLASS/]...NAME.png

Where every path starts with train/ or test/, that is the source's own split; else a seeded fraction becomes the test
split. Where every image then lies in a folder, the first folder is its class.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import paths
from ddpm.files.arrays import Images
from ddpm.files.params import Data
from ddpm.runtime.progress import Progress, Report
from ddpm.sources import decoding

Labels = NDArray[np.int64]

MULTIPLE = 8  # of the padded sides: a network with four levels halves them three times
DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer


@dataclass(frozen=True)
class Source:
    """What a source holds, before it is read.

    shape: C,H,W. counts: train and test images. labels: int64 N for each split, with classes, or None without.
    flip: whether a mirrored image is still one the source could hold.
    fill: reads the images into two uint8 arrays N,C,H,W of zeros. Raises InputError.
    """

    name: str
    shape: tuple[int, int, int]
    counts: tuple[int, int]
    labels: tuple[Labels, Labels] | None
    classes: tuple[str, ...] | None
    flip: bool
    fill: Callable[[Images, Images], None]


def open_source(data: Data, seed: int, root: Path, report: Report) -> Source:
    """The source that `data` names, with paths relative to `root`. Raises InputError."""
    return SOURCES[data.source](data, seed, root, report)


def padded_side(side: int) -> int:
    """The next multiple of 8: 8 -> 8, 28 -> 32."""
    return math.ceil(side / MULTIPLE) * MULTIPLE


def _centre(side: int, padded: int) -> tuple[Any, ...]:
    """Of the last two axes."""
    first = (padded - side) // 2
    inner = slice(first, first + side)
    return (..., inner, inner)


def held_out(names: Sequence[str], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which of the names form the test split: round(fraction * N) of them.

    They are those with the lowest hash of seed and name, so an added image moves hardly any other to the other split.
    """

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{names[index]}".encode(errors="surrogateescape")).digest()

    chosen = sorted(range(len(names)), key=rank)[: round(fraction * len(names))]
    result = np.zeros(len(names), bool)
    result[chosen] = True
    return result


# Sources with images of one known shape.


def _digits(data: Data, seed: int, root: Path, report: Report) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8, with values 0..16."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    is_test = held_out([str(index) for index in range(len(pixels))], data.test_fraction, seed)
    train, test = ((pixels[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return _in_memory(data, train, test, tuple(str(name) for name in bunch.target_names), flip=False, report=report)


def _cifar10(data: Data, seed: int, root: Path, report: Report) -> Source:
    """torchvision's CIFAR10: the folder cifar-10-batches-py in data.path, or data.path itself, or the download."""
    from torchvision.datasets import CIFAR10

    path = root / data.path
    if path.name == CIFAR10.base_folder:
        path = path.parent
    if not (path / CIFAR10.base_folder).is_dir():
        path = root / paths.downloads_dir(data.source)
        files = f"the folder {CIFAR10.base_folder} of {CIFAR10.url}"
        with _downloading(data, path, files, report):
            CIFAR10(str(path), download=True)
    try:
        splits = [CIFAR10(str(path), train=train) for train in (True, False)]
    except (RuntimeError, OSError):
        place = path / CIFAR10.base_folder
        raise InputError(f"{place}: CIFAR-10 is damaged or not complete there; unpack {CIFAR10.url} again") from None
    train, test = ((split.data.transpose(0, 3, 1, 2), np.array(split.targets, np.int64)) for split in splits)
    return _in_memory(data, train, test, tuple(splits[0].classes), flip=True, report=report)


def _fashion_mnist(data: Data, seed: int, root: Path, report: Report) -> Source:
    """Fashion-MNIST's four IDX files, in data.path or where torchvision puts them below it, or the download.

    No flips: the shoes, three of ten classes, all point to the left.
    """
    from torchvision.datasets import FashionMNIST

    folder = _idx_folder(root / data.path)
    if folder is None:
        path = root / paths.downloads_dir(data.source)
        files = f"the four *-ubyte.gz files of {FashionMNIST.mirrors[0]} (or of Debian's dataset-fashion-mnist)"
        if _idx_folder(path) is None:
            with _downloading(data, path, files, report):
                FashionMNIST(str(path), download=True)
        folder = _idx_folder(path)
        assert folder is not None
    train, test = (_read_split(folder, prefix) for prefix in ("train", "t10k"))
    return _in_memory(data, train, test, tuple(FashionMNIST.classes), flip=False, report=report)


def _in_memory(
    data: Data,
    train: tuple[Images, Labels],
    test: tuple[Images, Labels],
    classes: tuple[str, ...],
    *,
    flip: bool,
    report: Report,
) -> Source:
    channels, side = train[0].shape[1:3]
    shape = (channels, padded_side(side), padded_side(side))
    if data.size not in (None, shape[1]) or data.channels not in (None, channels):
        raise InputError(
            f"data.size and data.channels are for image-folder; {data.source} always has {shape[1]}x{shape[2]} pixels"
            f" and {decoding.counted(channels, 'channel')}: leave them null"
        )
    counts = (len(train[0]), len(test[0]))
    inner = _centre(side, shape[1])

    def fill(train_images: Images, test_images: Images) -> None:
        train_images[inner] = train[0]
        test_images[inner] = test[0]
        report(Progress(sum(counts), sum(counts), "images"))

    return Source(data.source, shape, counts, (train[1], test[1]), classes, flip, fill)


@contextmanager
def _downloading(data: Data, path: Path, files: str, report: Report) -> Iterator[None]:
    """Bounds the time without an answer, and turns what goes wrong into one line."""
    report(Progress(0, 1, "files", message=f"{data.source} is not in {data.path}: using {path}, downloading if needed"))
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none
    try:
        yield
    except (RuntimeError, OSError, HTTPException, zlib.error, EOFError) as error:
        why = " ".join(str(error).split())
        advice = f"put {files} into data.path ({data.path})"
        raise InputError(f"{data.source} could not be downloaded ({why}): {advice}") from None
    finally:
        socket.setdefaulttimeout(before)


# IDX files: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as big-endian uint32, data.


def _idx_folder(path: Path) -> Path | None:
    names = [f"{prefix}-{kind}-ubyte" for prefix in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    for folder in (path, path / "raw", path / "FashionMNIST" / "raw"):
        if all(_idx_file(folder, name).exists() for name in names):
            return folder
    return None


def _idx_file(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.exists() else folder / f"{name}.gz"


def _read_split(folder: Path, prefix: str) -> tuple[Images, Labels]:
    pixels = _read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"), 3)
    labels = _read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte"), 1)
    if len(pixels) != len(labels) or pixels.shape[1:] != (28, 28) or labels.max(initial=0) > 9:
        raise InputError(f"{folder}: the {prefix} files are not Fashion-MNIST's, or not one pair; fetch them again")
    return pixels[:, None], labels.astype(np.int64)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not readable: {error}; fetch it again") from None
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header], ">u4").astype(int)
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(shape) != dimensions or len(content) != header + shape.prod():
        raise InputError(f"{path}: not an IDX file of uint8 with {dimensions} dimensions, or cut off; fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# The image-folder.


def _image_folder(data: Data, seed: int, root: Path, report: Report) -> Source:
    if data.fit != "error" and data.size is None:
        raise InputError(f"data.fit: {data.fit} needs data.size, the side in pixels")
    found, left_out = decoding.find(root / data.path, data.path)
    files = {name: found[name] for name in sorted(found)}
    if left_out:
        report(Progress(0, len(files), "images", message=_left_out(left_out)))
    names, is_test = _split(list(files), data, seed)
    classes, labels = _classes(names, data)
    layout = _layout(files, data)
    side = layout.side if data.size else padded_side(layout.side)

    def fill(train: Images, test: Images) -> None:
        rows = np.where(is_test, is_test.cumsum(), (~is_test).cumsum()) - 1
        inner = _centre(layout.side, side)
        splits = np.asarray(train), np.asarray(test)  # views of a plain array are quicker to make
        places = [splits[held][row][inner] for row, held in zip(rows.tolist(), is_test.tolist(), strict=True)]
        decoding.read_all(files, layout, places, data.path, lambda done: report(Progress(done, len(files), "images")))

    return Source(
        name=data.source,
        shape=(layout.channels, side, side),
        counts=(int((~is_test).sum()), int(is_test.sum())),
        labels=None if labels is None else (labels[~is_test], labels[is_test]),
        classes=classes,
        flip=True,  # only who chose the images knows: training.flip decides
        fill=fill,
    )


def _left_out(names: list[str]) -> str:
    kinds = sorted({PurePosixPath(name).suffix.lower() or "no suffix" for name in names})
    more = ", ..." if len(kinds) > 5 else ""
    files = decoding.counted(len(names), "file")
    return f"left out {files}, hidden or neither PNG nor JPEG ({decoding.shown(', '.join(kinds[:5]))}{more})"


def _layout(files: Mapping[str, decoding.Read], data: Data) -> decoding.Layout:
    """What parameters leave open is as in the first image; a refusal goes by most of them. Raises InputError."""
    name, channels, (width, height) = decoding.first_shape(files, data.channels, data.path)
    if data.size is None and width != height:
        raise InputError(
            f"{data.path}: {decoding.shown(name)} is {width}x{height}, and networks here need squares;"
            " set data.size, and data.fit to crop, pad or resize"
        )
    given, convert = data.size is not None, data.channels is not None
    return decoding.Layout(channels, data.size or width, data.fit, convert, given)


def _split(names: list[str], data: Data, seed: int) -> tuple[list[str], NDArray[np.bool_]]:
    """-> the names below train/ and test/, and which are of the test split."""
    tops = {name.partition("/")[0] if "/" in name else "" for name in names}
    if tops <= {"train", "test"}:
        return [name.partition("/")[2] for name in names], np.array([name.startswith("test/") for name in names])
    if tops <= {"train", "test", "val", "valid", "validation"}:
        raise InputError(
            f"{data.path}: folders {', '.join(sorted(tops))}: a source's own split is called train and test;"
            " rename or move the others"
        )
    return names, held_out(names, data.test_fraction, seed)


def _classes(names: list[str], data: Data) -> tuple[tuple[str, ...] | None, Labels | None]:
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return None, None
    if loose:
        first = ", ".join(decoding.shown(name) for name in loose[:3])
        raise InputError(
            f"{data.path}: {len(loose):,} of {len(names):,} images lie in no class folder, the others do: {first};"
            " put every image into a class folder, or none"
        )
    folders = [name.partition("/")[0] for name in names]
    classes = tuple(sorted(set(folders)))
    index = {name: label for label, name in enumerate(classes)}
    return classes, np.array([index[name] for name in folders], np.int64)


SOURCES = {
    "digits": _digits,
    "cifar10": _cifar10,
    "fashion-mnist": _fashion_mnist,
    "image-folder": _image_folder,
}
