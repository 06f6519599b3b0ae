"""Reads and writes the prepared dataset."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import arrays, atomic, paths, records
from ddpm.files.arrays import Images


@dataclass(frozen=True)
class DatasetRecord:
    """The content of dataset.json, which describes a prepared dataset.

    Args:
        name: the name of the source.
        sha256: the hash of the arrays, which is the version of the dataset.
        shape: C, H, W.
        counts: number of images in "train" and "test".
        mean, std: mean and standard deviation per channel, on the scale 0 ... 1.
        flip: whether mirrored images are still valid.
        files: sha256 of each array's file, by name.
        classes: the names of the classes; None without labels.
        class_counts: number of training images of each class.
        content: all entries of the file.
    """

    name: str
    sha256: str
    shape: list[int]
    counts: dict[str, int]
    mean: list[float]
    std: list[float]
    flip: bool
    files: dict[str, str]
    classes: list[str] | None = None
    class_counts: list[int] | None = None
    content: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape: expected C, H, W, found {self.shape}")
        if not self.counts.keys() <= {"train", "test"} or any(
            count < 0 for count in (*self.counts.values(), *(self.class_counts or ()))
        ):
            raise ValueError(
                f"counts, class_counts: expected numbers of images, found {self.counts}, {self.class_counts}"
            )
        if not all(0 <= value <= 1 for value in (*self.mean, *self.std)):
            raise ValueError(f"mean, std: not in 0 ... 1: {self.mean}, {self.std}")


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    Args:
        train, test: uint8 N,C,H,W, memory-mapped.
        train_labels, test_labels: int64 N, or None.
        record: the content of dataset.json.
    """

    train: Images
    test: Images
    train_labels: NDArray[np.int64] | None
    test_labels: NDArray[np.int64] | None
    record: DatasetRecord


@dataclass
class NewDataset:
    """A dataset that is being written.

    Args:
        train, test: uint8 N,C,H,W, on disk. The arrays hold zeros until they are filled.
        train_labels, test_labels: int64 N, or None.
        description: the entries of dataset.json, except `files`.
        picture: uint8 C,H,W, for preview.png.
        unusable: path and reason of each file that was left out, for unusable.csv.
    """

    train: Images
    test: Images
    train_labels: NDArray[np.int64] | None
    test_labels: NDArray[np.int64] | None
    description: Mapping[str, Any] = field(default_factory=dict)
    picture: Images | None = None
    unusable: Sequence[tuple[str, str]] = ()


def read_dataset(root: Path = Path()) -> Dataset:
    """Reads and verifies the dataset that `prepare` wrote. Raises InputError."""
    folder = root / paths.dataset_dir()
    record = read_dataset_record(root)

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
            _check_split(record, split, *pair)
        _check_arrays(root, record)
    except ValueError as error:
        raise InputError(f"{folder}: not a prepared dataset: {error}; run `ddpm prepare` again") from None
    return Dataset(*images, *labels, record)


def spread(images: NDArray[Any], count: int) -> NDArray[Any]:
    """Returns `count` images or labels, evenly spread over a split, or all if the split has fewer.

    The first images of a split may all be of one class, because folders are read class by class.
    """
    count = min(count, len(images))
    return np.ascontiguousarray(images[np.arange(count) * len(images) // max(count, 1)])


def read_dataset_record(root: Path = Path()) -> DatasetRecord:
    """Reads dataset.json. Raises InputError."""
    path = root / paths.dataset_dir() / "dataset.json"
    return records.read_typed(path, DatasetRecord)


def _check_arrays(root: Path, record: DatasetRecord) -> None:
    """Raises ValueError if the hash of an array's file is not the one in dataset.json."""
    folder, memory = root / paths.dataset_dir(), root / paths.CACHE / "verified.json"
    for path in sorted(folder.glob("*.npy")):
        # protects: tests/files/test_bad_input.py::test_a_prepared_dataset[another image]
        if records._remembered_sha256(path, memory) != record.files.get(path.name):
            raise ValueError(f"{path.name}: its bytes are not those that dataset.json describes")


def _check_split(record: DatasetRecord, split: str, images: Any, labels: Any) -> None:
    """Raises ValueError if a split does not match dataset.json in shape, labels or classes."""
    if images is None:
        raise ValueError(f"{split}.npy is missing")
    expected = (record.counts.get(split), *record.shape)
    if images.shape != expected:
        raise ValueError(f"{split}.npy has shape {images.shape}, dataset.json says {expected}")
    if (labels is None) != (record.classes is None):
        raise ValueError(
            f"{split}-labels.npy is {'missing' if labels is None else 'there, but dataset.json has no classes'}"
        )
    if labels is None or record.classes is None:
        return
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{split}-labels.npy has shape {labels.shape}, for {len(images)} images")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(record.classes):
        raise ValueError(f"{split}-labels.npy has labels outside the {len(record.classes)} classes")


@contextmanager
def writing_dataset(
    root: Path,
    shape: tuple[int, int, int],
    counts: tuple[int, int],
    labels: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
) -> Iterator[NewDataset]:
    """Yields an empty dataset, whose arrays, description and picture the `with` block fills in. Then writes the dataset.

    The new dataset replaces the old dataset if the `with` block succeeds. Otherwise the old dataset stays.

    Args:
        root: the top of the checkout.
        shape: C, H, W.
        counts: number of train and test images.
        labels: int64 N for train and test, or None.

    Raises:
        InputError: the disk is full.
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
        new = NewDataset(train, test, *(labels or (None, None)))
        yield new
        for array in (train, test):
            array.flush()  # type: ignore[attr-defined]
        records.write_record(folder / "dataset.json", new.description, sorted(folder.glob("*.npy")))
        if new.picture is not None:
            arrays.write_png(folder / "preview.png", new.picture)
        if new.unusable:
            rows = [{"path": path, "reason": reason} for path, reason in new.unusable]
            records.write_csv(folder / "unusable.csv", rows)


def _new_array(path: Path, shape: tuple[int, ...]) -> Images:
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):
            # Reserves the disk space now: on a full disk, a later write to the mapped file would kill the process.
            with path.open("rb+") as file:
                # protects: tests/stages/test_faults.py::test_room_is_taken_before_it_is_written_to
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise InputError(
            f"{path.name}: no room for {math.prod(shape):,} bytes: {error.strerror}; free some space and run this again"
        ) from None
    return array
