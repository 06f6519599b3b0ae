"""Reads and writes arrays with the hash of their content, and writes images as one picture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import atomic, paths, records

Images = NDArray[np.uint8]  # N,C,H,W


# Parts that several modules of this package share.


def _unreadable(error: Exception) -> str:
    """Describes why numpy cannot read a file. Leaves out numpy's advice to allow pickle, which would run code from the file."""
    why = " ".join(str(error).split()) or type(error).__name__
    if "pickled (object) data" in why:
        return "neither a numpy array nor a zip archive of arrays"
    objects = "allow_pickle" in why or "Python objects in dtype" in why
    return "Python objects, which are not read here" if objects else why


def _write_array(file: IO[bytes], array: NDArray[Any]) -> None:
    """Writes the same bytes as np.save. On a full disk, the error has an errno, unlike the error that np.save raises."""
    np.lib.format.write_array(cast(IO[bytes], SimpleNamespace(write=file.write)), array, allow_pickle=False)


def _array_digest(array: NDArray[Any]) -> str:
    """Hashes an array's type, shape and values."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# Cached arrays.


def write_arrays(path: Path, key: str, **arrays: Any) -> None:
    """Writes named arrays to one file, with a checksum of the arrays and of `key`.

    key: a text that identifies what the arrays were computed from.
    """
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, sha256=np.asarray(_arrays_digest(key, arrays)))


def read_arrays(path: Path, key: str) -> dict[str, NDArray[Any]]:
    """Reads a file that write_arrays wrote.

    Raises InputError if the file is missing or damaged, or if `key` is not the text that write_arrays was given.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        if str(arrays.pop("sha256")) != _arrays_digest(key, arrays):
            raise ValueError("its checksum does not match its arrays")
    except Exception as error:  # noqa: BLE001 - numpy and zipfile raise a dozen types on a damaged archive
        raise InputError(f"{path}: not readable: {_unreadable(error)}") from None
    return arrays


def _arrays_digest(key: str, arrays: Mapping[str, Any]) -> str:
    parts = {name: _array_digest(np.asarray(array)) for name, array in arrays.items()}
    return records.record_digest({"key": key, **parts})


# Pictures.


def grid(images: Images, columns: int | None = None) -> Images:
    """Arranges images, uint8 N,C,H,W, in rows of a picture, uint8 C,H',W', with white lines in between. Enlarges small images."""
    count, channels, height, width = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    scale = max(1, 64 // max(height, width))
    picture = np.full((channels, rows * (height * scale + 1) + 1, columns * (width * scale + 1) + 1), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = 1 + row * (height * scale + 1), 1 + column * (width * scale + 1)
        large = image.repeat(scale, axis=1).repeat(scale, axis=2)
        picture[:, top : top + height * scale, left : left + width * scale] = large
    return picture


def preview(samples: Images) -> Images:
    """Returns a picture of the first PREVIEW samples."""
    return grid(samples[: paths.PREVIEW])


def write_png(path: Path, picture: Images) -> None:
    """Writes a picture, uint8 C,H,W with one or three channels."""
    from PIL import Image

    pixels = picture[0] if picture.shape[0] == 1 else picture.transpose(1, 2, 0)
    with atomic.replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG", optimize=False)
