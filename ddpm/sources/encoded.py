"""Turns encoded images, such as PNG files, into the contents of a source: chooses a layout and decodes the images into arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files.arrays import Images
from ddpm.parameters import Data
from ddpm.runtime.progress import Progress, Report
from ddpm.sources import decoding
from ddpm.sources.source import MULTIPLE, Contents, Labels, centre, padded_sides

LARGEST = 2**20  # the most pixels of an image whose size is kept unchanged


@dataclass(frozen=True)
class Assignment:
    """The split and the class of each image.

    Args:
        is_test: mask of the test split, bool [N].
        classes: the names of the classes; None without classes.
        labels: int64 [N]; None without classes.
    """

    is_test: NDArray[np.bool_]
    classes: tuple[str, ...] | None
    labels: Labels | None


def contents(
    data: Data,
    files: Mapping[str, decoding.Read],
    assign: Callable[[list[str]], Assignment],
    where: str,
    report: Report,
    faults: Iterable[decoding.Fault] = (),
) -> Contents:
    """Returns the contents of a source of encoded images. Sides are padded to a multiple of 8 unless data.size is set.

    Args:
        data: the section `data`.
        files: functions that read the images, by name.
        assign: takes the names of images, and returns the split and the class of each image.
        where: the source of the images, for messages.
        report: called with the progress.
        faults: the names of files that were left out already, with the reasons.

    Raises:
        InputError: the images have no common layout.
    """
    if data.fit != "error" and data.size is None:
        raise InputError(f"data.fit: {data.fit} needs data.size, the side in pixels or [height, width]")
    layout, broken = _layout(files, data, where), list[decoding.Fault]()
    if data.unusable == "skip":
        checked = partial(Progress, total=len(files), unit="images checked")
        files, layout, broken = decoding.usable(files, layout, where, lambda done: report(checked(done)))
        _check_size(layout, where, "most images are")
    assigned = assign(list(files))
    is_test, labels = assigned.is_test, assigned.labels
    sides = layout.sides if data.sides else padded_sides(layout.sides)

    def fill(train: Images, test: Images) -> None:
        if sides != layout.sides and any(layout.border):
            train[:] = test[:] = np.reshape(layout.border, (-1, 1, 1))
        places = _Places(train, test, is_test, centre(layout.sides, sides))
        decoding.read_all(files, layout, places, where, lambda done: report(Progress(done, len(files), "images")))

    return Contents(
        shape=(layout.channels, *sides),
        counts=(int((~is_test).sum()), int(is_test.sum())),
        labels=None if labels is None else (labels[~is_test], labels[is_test]),
        classes=assigned.classes,
        fill=fill,
        unusable=sorted((decoding.shown(name), decoding.shown(why)) for name, why in (*faults, *broken)),
    )


def _layout(files: Mapping[str, decoding.Read], data: Data, where: str) -> decoding.Layout:
    """Takes channels and size from `data`, or else from the first valid image.

    Raises InputError if no image is valid or the size is too large.
    """
    wanted = data.channels or (3 if data.convert else None)
    background = _colour(data.background) if data.convert else None
    name, channels, (width, height) = decoding.first_shape(files, wanted, where, background)
    given, convert = data.sides is not None, wanted is not None
    layout = decoding.Layout(channels, data.sides or (height, width), data.fit, convert, given, background)
    _check_size(layout, where, f"{decoding.shown(name)} is")
    return layout


def _check_size(layout: decoding.Layout, where: str, subject: str) -> None:
    """Raises InputError if the user chose no size, and the images are too large to train on.

    subject: the start of the message, such as "most images are".
    """
    height, width = layout.sides
    if layout.given or width * height <= LARGEST:
        return
    scale = max(width, height) / 64
    usual = [round(side / scale / MULTIPLE) * MULTIPLE or MULTIPLE for side in (height, width)]
    raise InputError(
        f"{where}: {subject} {width}x{height}, too large to train on unchanged; set data.size,"
        f" such as {usual} (height, width), and data.fit to crop, pad or resize"
    )


def _colour(text: str) -> decoding.Colour:
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue


class _Places(Sequence[Images]):
    """Maps the index of an image to its view in the train or test array, into which the image is decoded.

    Each view is made on request, because a million stored views would take 200 MB.

    Args:
        train, test: uint8 N,C,H,W.
        is_test: mask of the test split, bool [N].
        inner: the slices that cut the unpadded image out of its padded rectangle; see `centre`.
    """

    def __init__(self, train: Images, test: Images, is_test: NDArray[np.bool_], inner: tuple[Any, ...]) -> None:
        self._splits = np.asarray(train), np.asarray(test)  # views of a plain array are quicker to make
        self._is_test, self._inner = is_test, inner
        self._rows = np.where(is_test, is_test.cumsum(), (~is_test).cumsum()) - 1

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Images: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Images]: ...
    def __getitem__(self, index: int | slice) -> Images | Sequence[Images]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        return self._splits[int(self._is_test[index])][self._rows[index]][self._inner]
