"""Reads and writes the prepared dataset."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ddpm.errors import InputError
from ddpm.files import arrays, atomic, paths, pictures, records
from ddpm.files.arrays import Images
from ddpm.files.records import Record


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    train, test: uint8 N,C,H,W, memory-mapped. train_labels, test_labels: int64 N, or None.
    about: dataset.json: name, sha256 (of the arrays: the dataset's version), shape [C,H,W], counts {train, test},
    classes (list of names, or null), class_counts (training images of each, or null), mean and std per channel in 0..1,
    flip (whether mirrored images are still valid).
    """

    train: Images
    test: Images
    train_labels: NDArray[np.int64] | None
    test_labels: NDArray[np.int64] | None
    about: dict[str, Any]


def read_dataset(root: Path = Path()) -> Dataset:
    """The dataset that `prepare` wrote. Raises InputError."""
    folder = root / paths.dataset_dir()
    about = read_dataset_record(root)

    def array(name: str, kind: type) -> Any:
        path = folder / f"{name}.npy"
        if not path.exists():
            return None
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # noqa: BLE001 - numpy raises half a dozen types on a damaged file
            raise ValueError(f"{path.name}: {arrays._unreadable(error)}") from None
        if not isinstance(found, np.ndarray) or found.dtype != kind:
            raise ValueError(f"{path.name} holds no array of {kind.__name__}")
        return found

    try:
        images = array("train", np.uint8), array("test", np.uint8)
        labels = array("train-labels", np.int64), array("test-labels", np.int64)
        for split, *pair in zip(("train", "test"), images, labels, strict=True):
            _check_split(about, split, *pair)
        _check_arrays(root, about)
    except ValueError as error:
        raise InputError(f"{folder}: not a prepared dataset: {error}; run `ddpm prepare` again") from None
    return Dataset(*images, *labels, about)


def read_dataset_record(root: Path = Path()) -> dict[str, Any]:
    """Reads dataset.json. Raises InputError."""
    return records.read_record(root / paths.dataset_dir() / "dataset.json", _About)


def _check_arrays(root: Path, about: Mapping[str, Any]) -> None:
    """Raises ValueError where an array is not the one that dataset.json describes."""
    folder, memory = root / paths.dataset_dir(), root / paths.CACHE / "verified.json"
    for path in sorted(folder.glob("*.npy")):
        if records._remembered_sha256(path, memory) != about["files"].get(path.name):
            raise ValueError(f"{path.name}: its bytes are not those that dataset.json describes")


class _About(Record):
    """dataset.json."""

    name: str
    sha256: str
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    counts: dict[Literal["train", "test"], Annotated[int, Field(ge=0)]]
    classes: list[str] | None
    class_counts: list[Annotated[int, Field(ge=0)]] | None = None
    mean: list[Annotated[float, Field(ge=0, le=1)]]
    std: list[Annotated[float, Field(ge=0, le=1)]]
    flip: bool
    files: dict[str, str]


def _check_split(about: dict[str, Any], split: str, images: Any, labels: Any) -> None:
    """Raises ValueError where a split is not what dataset.json says of it."""
    if images is None:
        raise ValueError(f"{split}.npy is missing")
    expected = (about["counts"].get(split), *about["shape"])
    if images.shape != expected:
        raise ValueError(f"{split}.npy has shape {images.shape}, dataset.json says {expected}")
    if (labels is None) != (about["classes"] is None):
        raise ValueError(
            f"{split}-labels.npy is {'missing' if labels is None else 'there, and dataset.json has no classes'}"
        )
    if labels is None:
        return
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{split}-labels.npy has shape {labels.shape}, for {len(images)} images")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(about["classes"]):
        raise ValueError(f"{split}-labels.npy has labels that are none of the {len(about['classes'])} classes")


@contextmanager
def writing_dataset(
    root: Path,
    shape: tuple[int, int, int],
    counts: tuple[int, int],
    labels: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    preview: Callable[[Dataset], Images],
) -> Iterator[Dataset]:
    """A new dataset of `counts` train and test images C,H,W: its arrays are zeros on disk, its `about` is empty.

    The block fills both. When it ends well the dataset, with `preview` of it as a picture, takes the place of the old
    one; when it doesn't, the old one stays. Raises InputError when there is no room on the disk.
    """
    with atomic.replacing_dir(root / paths.dataset_dir()) as folder:
        train, test = (
            _new_array(folder / f"{split}.npy", (count, *shape))
            for split, count in zip(("train", "test"), counts, strict=True)
        )
        if labels is not None:
            for split, values in zip(("train", "test"), labels, strict=True):
                with (folder / f"{split}-labels.npy").open("wb") as file:
                    arrays._write_array(file, values)
        train_labels, test_labels = labels or (None, None)
        dataset = Dataset(train, test, train_labels, test_labels, about={})
        yield dataset
        for array in (train, test):
            array.flush()  # type: ignore[attr-defined]
        dataset.about.update(records.write_record(folder / "dataset.json", dataset.about, sorted(folder.glob("*.npy"))))
        pictures.write_png(folder / "preview.png", preview(dataset))


def _new_array(path: Path, shape: tuple[int, ...]) -> Images:
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("rb+") as file:  # or a full disk would kill the process while it writes to the mapping
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise InputError(f"{path.name}: no room for {math.prod(shape):,} bytes: {error.strerror}") from None
    return array
