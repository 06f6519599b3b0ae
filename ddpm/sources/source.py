"""Defines Source, SOURCES, and the functions that several sources share.

A new source is a new module in this package. The module ends with its row, `SOURCE = Source(...)`, and `data.source` selects
the row by the module's name.
"""

from __future__ import annotations

import hashlib
import math
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files.arrays import Images
from ddpm.files.params import Params
from ddpm.parameters import Data
from ddpm.rooms import Room
from ddpm.runtime.progress import Progress, Report

Labels = NDArray[np.int64]

MULTIPLE = 8  # padded sides are multiples of this: a network with four levels halves a side three times
DOWNLOAD_TIMEOUT = 20.0  # seconds to wait for an answer of the server


@dataclass(frozen=True)
class Contents:
    """The content of an opened source, before its images are read.

    Args:
        shape: C,H,W of an image.
        counts: the number of images in train and in test.
        labels: int64 N for train and for test; None without classes.
        classes: the names of the classes; None without classes.
        fill: reads the images into two uint8 arrays N,C,H,W, train and test, which hold zeros. Raises InputError.
        unusable: path and reason of each file that was left out because it is broken.
    """

    shape: tuple[int, int, int]
    counts: tuple[int, int]
    labels: tuple[Labels, Labels] | None
    classes: tuple[str, ...] | None
    fill: Callable[[Images, Images], None]
    unusable: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Source:
    """A source of images: a row of SOURCES, which `data.source` selects by name.

    Args:
        open: takes the section `data`, the seed, the folder at which relative paths start, and a progress report. Returns
            the contents without reading all images. Raises InputError.
        licence: the licence of the images, if known, for the model card.
        shareable: whether the licence lets a trained model be shared under this project's own licence.
        flip: whether a mirrored image could come from the same source.
        any_images: whether users bring their own images, so two datasets from this source may have nothing in common.
    """

    open: Callable[[Data, int, Path, Report], Contents]
    licence: str
    shareable: bool = False
    flip: bool = False
    any_images: bool = False


SOURCES: Room[Source] = Room("ddpm.sources", "data.source", "SOURCE")


def check_name(params: Params) -> None:
    """Raises InputError if tracking.name is the name of a source other than data.source.

    With that name, this dataset would share its experiment and champion with the dataset of the other source.
    """
    name, source = (params.tracking.name or "").replace("-", "_"), params.data.source
    if name != source and name in SOURCES:
        raise InputError(
            f"tracking.name: {params.tracking.name} is the name of another source, but data.source is {source};"
            " choose another name"
        )


# Functions that sources share.


def padded_side(side: int) -> int:
    """Returns the next multiple of 8: 8 -> 8, 28 -> 32."""
    return math.ceil(side / MULTIPLE) * MULTIPLE


def padded_sides(sides: tuple[int, int]) -> tuple[int, int]:
    """Returns height and width, each padded to the next multiple of 8: (28, 40) -> (32, 40)."""
    height, width = sides
    return padded_side(height), padded_side(width)


def centre(sides: tuple[int, int], padded: tuple[int, int]) -> tuple[Any, ...]:
    """Returns the index of a centred rectangle in the last two axes of a larger rectangle. Sizes are height and width."""
    first = [(outer - inner) // 2 for inner, outer in zip(sides, padded, strict=True)]
    return (..., *(slice(start, start + side) for start, side in zip(first, sides, strict=True)))


def held_out(names: Sequence[str], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Returns the mask of the test split, bool [N], with round(fraction * N) of the names.

    The names with the lowest hashes form the test split, so an added image moves almost no other image between the splits.
    """

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{names[index]}".encode(errors="surrogateescape")).digest()

    chosen = sorted(range(len(names)), key=rank)[: round(fraction * len(names))]
    result = np.zeros(len(names), bool)
    result[chosen] = True
    return result


def in_memory(
    data: Data,
    train: tuple[Images, Labels],
    test: tuple[Images, Labels],
    classes: tuple[str, ...],
    report: Report,
) -> Contents:
    """Describes images that are already in memory.

    Args:
        data: the section `data`. Its size and channels must be None, or equal to the size and channels of the images.
        train, test: uint8 N,C,H,W and int64 labels N of each split.
        classes: the name of each label.
        report: called when the images are copied.

    Raises:
        InputError: data asks for another size or number of channels.
    """
    channels, height, width = train[0].shape[1:]
    shape = (channels, height, width)
    if data.sides not in (None, (height, width)) or data.channels not in (None, channels):
        raise InputError(
            f"data.size, data.channels: {data.source} always has {'x'.join(map(str, shape))}"
            " (channels x height x width): leave them null"
        )
    counts = (len(train[0]), len(test[0]))

    def fill(train_images: Images, test_images: Images) -> None:
        train_images[:] = train[0]
        test_images[:] = test[0]
        report(Progress(sum(counts), sum(counts), "images"))

    return Contents(shape, counts, (train[1], test[1]), classes, fill)


@contextmanager
def downloading(data: Data, path: Path, files: str, report: Report) -> Iterator[None]:
    """Sets a timeout for the download in the `with` block, and converts errors of the download into InputError.

    Args:
        data: the section `data`, for messages.
        path: the folder of the download.
        files: the files that users can put into data.path instead, for messages.
        report: called once, to say that a download may follow.
    """
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
