"""Reads and writes sample sets, and keeps the finished batches of a sampling."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import atomic, records
from ddpm.files.arrays import Images, _array_digest, _unreadable, _write_array
from ddpm.files.dataset import Dataset, _new_array

# Sample sets.


def write_samples(
    path: Path,
    images: Images,
    evaluations: int,
    model: str,
    labels: NDArray[np.int64] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a sample set to one compressed file. The same arguments give the same bytes.

    Args:
        path: samples/POINT.npz.
        images: uint8 N,C,H,W.
        evaluations: network evaluations per image.
        model: sha256 of the network's weights.
        labels: int64 N, the class of each image, or None.
        settings: the parameters that the images were drawn with.
    """
    arrays: dict[str, NDArray[Any]] = {"images": images, "evaluations": np.asarray(evaluations, np.int64)}
    if labels is not None:
        arrays["labels"] = labels
    about: dict[str, Any] = {"point": path.stem, "model": model, "evaluations": int(evaluations)}
    about["settings"] = dict(settings or {})
    about["arrays"] = {name: _array_digest(array) for name, array in arrays.items()}
    with atomic.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        text = json.dumps({**about, records.CHECKSUM: records.record_digest(about)}, indent=2)
        archive.writestr(zipfile.ZipInfo(RECORD), text, zipfile.ZIP_DEFLATED)
        for name, array in arrays.items():
            # numpy's savez forces zip headers with 64-bit sizes. Python 3.11.2 and 3.11.7 write such headers differently, so
            # the bytes would vary.
            member = zipfile.ZipInfo(f"{name}.npy")
            member.compress_type = zipfile.ZIP_DEFLATED
            member.file_size = array.nbytes
            with archive.open(member, "w") as file:
                _write_array(file, array)


RECORD = "record.json"  # the name of the record inside a sample set


@dataclass(frozen=True)
class Samples:
    """A sample set.

    Args:
        images: uint8 N,C,H,W.
        evaluations: network evaluations per image.
        model: sha256 of the network's weights.
        sha256: hash of the content, independent of the compression.
        labels: int64 N, the class of each image, or None.
    """

    images: Images
    evaluations: int
    model: str
    sha256: str
    labels: NDArray[np.int64] | None = None


def read_samples(path: Path, dataset: Dataset | None = None) -> Samples:
    """Reads and verifies a sample set. Raises InputError if the set is damaged, or if the dataset's images have another shape."""
    with _sample_set(path) as (archive, record):
        shape = _declared_shape(archive.zip)
        if dataset is not None and shape[1:] != dataset.train.shape[1:]:
            raise InputError(
                f"{path}: images of shape {list(shape[1:])}, the dataset's are {list(dataset.train.shape[1:])};"
                " train and sample again (dvc repro)"
            )
        images = archive["images"]
        # protects: tests/files/test_bad_input.py::test_a_sample_set[a record of other images]
        if _array_digest(images) != record.arrays.get("images"):
            raise ValueError(f"its images are not those that its {RECORD} describes")
        labels = archive["labels"] if "labels" in record.arrays else None
        if labels is not None and _array_digest(labels) != record.arrays["labels"]:
            raise ValueError(f"its labels are not those that its {RECORD} describes")
        return Samples(images, record.evaluations, record.model, record.record_sha256, labels)


def read_samples_record(path: Path) -> SamplesRecord:
    """Reads the record of a sample set without its images. Raises InputError."""
    with _sample_set(path) as (_, record):
        return record


@dataclass(frozen=True)
class SamplesRecord:
    """The record inside a sample set.

    Args:
        point: the name of the point.
        model: sha256 of the network's weights.
        evaluations: network evaluations per image.
        settings: the parameters that the images were drawn with.
        arrays: the hash of each array, by name.
        record_sha256: the hash of this record.
    """

    point: str
    model: str
    evaluations: int
    settings: dict[str, Any]
    arrays: dict[str, str]
    record_sha256: str

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ValueError(f"evaluations: {self.evaluations} is less than 1")


@contextmanager
def _sample_set(path: Path) -> Iterator[tuple[Any, SamplesRecord]]:
    """Yields the open archive of a sample set, and its record. Converts every error of the `with` block into InputError."""
    try:
        archive = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            yield archive, _samples_record(path, archive)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such sample set; make it with `ddpm sample {path.stem}`") from None
    except Exception as error:  # noqa: BLE001 - numpy and zipfile raise a dozen types on a damaged archive
        raise InputError(
            f"{path}: not a sample set: {_unreadable(error)}; make it again with `ddpm sample {path.stem}`"
        ) from None


def _samples_record(path: Path, archive: Any) -> SamplesRecord:
    if RECORD not in archive.files:
        raise ValueError(f"there is no {RECORD} in the file, so another version of ddpm wrote it")
    value = json.loads(archive[RECORD], parse_constant=records._no_constant)
    if not isinstance(value, dict) or value.get(records.CHECKSUM) != records.record_digest(value):
        raise ValueError(f"its {RECORD} is not what its checksum says")
    record = records.build(SamplesRecord, value)
    # protects: tests/files/test_bad_input.py::test_a_sample_set[a record of another point]
    if record.point != path.stem:
        raise ValueError(f"it holds the images of {record.point}")
    return record


def _declared_shape(archive: Any) -> tuple[int, ...]:
    """Reads the shape of images.npy from the header, before memory is allocated. Raises ValueError, KeyError."""
    with archive.open("images.npy") as file:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, kind = readers[np.lib.format.read_magic(file)](file)
        start = file.tell()
    if kind != np.uint8 or len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"expected uint8 images of shape N,C,H,W, found {kind} {shape}")
    # protects: tests/files/test_bad_input.py::test_a_sample_set[a petabyte]
    if archive.getinfo("images.npy").file_size != start + math.prod(shape):
        raise ValueError(f"images.npy declares the shape {shape}, but has another size")
    return tuple(shape)


class KeptImages:
    """The images of a sampling in progress, on disk, so that memory stays bounded and finished batches survive a kill.

    As a context manager, yields the array of images.

    Args:
        folder: where the images are kept. Images with another key or shape in this folder are removed.
        key: a hash of everything that decides the images, such as the weights and the seed.
        shape: N, C, H, W.

    Attributes:
        batches: maps the index of each finished batch's first image to the network evaluations per image. Includes
            batches that an earlier run finished, if their checksums are correct.

    Raises:
        InputError: the disk is full.
    """

    def __init__(self, folder: Path, key: str, shape: tuple[int, ...]) -> None:
        self._folder, self._log = folder, folder / "batches.jsonl"
        self.batches: dict[int, int] = {}
        about, array, content = folder / "about.json", folder / "images.npy", {"key": key, "shape": list(shape)}
        try:
            # protects: tests/stages/test_faults.py::test_what_another_sampling_made_is_not_taken[change0]
            if records.read_json(about) != content:
                raise ValueError("the kept images belong to another sampling")
            self._images: Images = np.lib.format.open_memmap(array, mode="r+")
        except (InputError, ValueError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._images = _new_array(array, shape)
            records.write_json(about, content)  # written last, so that this file implies a complete array
        for line in self._log.read_bytes().splitlines() if self._log.exists() else []:
            try:
                entry = json.loads(line)
                start, stop = entry["batch"]
                if self._entry(range(start, stop), entry["evaluations"]) == entry:
                    self.batches[start] = entry["evaluations"]
            except (ValueError, KeyError, TypeError):
                continue  # a kill cut off this line, so the batch is drawn again

    def __enter__(self) -> Images:
        return self._images

    def __exit__(self, *_: object) -> None:
        del self._images

    def keep(self, batch: range, evaluations: int) -> None:
        """Records a finished batch, so that a later run does not draw it again."""
        assert isinstance(self._images, np.memmap)
        self._images.flush()
        entry = self._entry(batch, evaluations)
        with atomic.disk_full_is_one_line(self._log), self._log.open("ab") as file:
            file.write(f"\n{json.dumps(entry)}\n".encode())  # the first line break ends an entry that a kill cut off
            file.flush()
            os.fsync(file.fileno())
        self.batches[batch.start] = evaluations

    def _entry(self, batch: range, evaluations: int) -> dict[str, Any]:
        """Returns the log entry of a finished batch."""
        digest = hashlib.sha256(f"{batch.start} {batch.stop} {evaluations}".encode())
        digest.update(np.ascontiguousarray(self._images[batch.start : batch.stop]).data)
        return {"batch": [batch.start, batch.stop], "evaluations": evaluations, "sha256": digest.hexdigest()}

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
