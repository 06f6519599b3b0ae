"""Turns encoded images, such as PNG files, into the contents of a source: chooses their layout and decodes them into place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files.arrays import Images
from ddpm.parameters import Data
from ddpm.runtime.progress import Progress, Report
from ddpm.sources import decoding
from ddpm.sources.source import Contents, Labels, centre, padded_side


@dataclass(frozen=True)
class Sorted:
    """Where images belong.

    is_test: mask of the test split, bool [N]. classes: names of the classes; None without classes. labels: int64 [N], or None.
    """

    is_test: NDArray[np.bool_]
    classes: tuple[str, ...] | None
    labels: Labels | None


def contents(
    data: Data, files: Mapping[str, decoding.Read], sort: Callable[[list[str]], Sorted], where: str, report: Report
) -> Contents:
    """Returns the contents of a source of encoded images. Sides are padded with zeros to a multiple of 8 unless data.size is set.

    Args:
        data: the section `data`.
        files: functions that read the images, by name.
        sort: takes names of images, and says where they belong.
        where: the source of the images, as messages name it.
        report: called with the progress.

    Raises:
        InputError: the images have no common layout.
    """
    if data.fit != "error" and data.size is None:
        raise InputError(f"data.fit: {data.fit} needs data.size, the side in pixels")
    belong = sort(list(files))
    is_test, labels = belong.is_test, belong.labels
    layout = _layout(files, data, where)
    side = layout.side if data.size else padded_side(layout.side)

    def fill(train: Images, test: Images) -> None:
        places = _Places(train, test, is_test, centre(layout.side, side))
        decoding.read_all(files, layout, places, where, lambda done: report(Progress(done, len(files), "images")))

    return Contents(
        shape=(layout.channels, side, side),
        counts=(int((~is_test).sum()), int(is_test.sum())),
        labels=None if labels is None else (labels[~is_test], labels[is_test]),
        classes=belong.classes,
        fill=fill,
    )


def _layout(files: Mapping[str, decoding.Read], data: Data, where: str) -> decoding.Layout:
    """Chooses channels and side: from the parameters, else as decoding.first_shape finds them. Raises InputError."""
    name, channels, (width, height) = decoding.first_shape(files, data.channels, where)
    if data.size is None and width != height:
        raise InputError(
            f"{where}: {decoding.shown(name)} is {width}x{height}, and networks here need squares;"
            " set data.size, and data.fit to crop, pad or resize"
        )
    given, convert = data.size is not None, data.channels is not None
    return decoding.Layout(channels, data.size or width, data.fit, convert, given)


class _Places(Sequence[Images]):
    """The place of each image in the arrays of its split, made when it is asked for: a million views take 200 MB.

    Args:
        train, test: uint8 N,C,H,W.
        is_test: mask of the test split, bool [N].
        inner: index of the image in its padded square.
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
