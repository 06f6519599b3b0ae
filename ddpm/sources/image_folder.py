"""Reads a user's images: PNG and JPEG files at any depth of a folder, or one zip file.

Zip files in the folder are read as if they were unpacked there. The path of an image gives its split and class:

    [train/|test/][CLASS/]...NAME.png

If every path starts with train/ or test/, these folders are the splits. Otherwise a seeded fraction becomes the test split. If
every image then lies in a folder, its first folder is its class. Sides are padded with zeros to the next multiple of 8,
unless `data.size` gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files.arrays import Images
from ddpm.parameters import Data
from ddpm.runtime.progress import Progress, Report
from ddpm.sources import decoding
from ddpm.sources.source import MULTIPLE, Contents, Labels, Source, centre, held_out, padded_sides

LARGEST = 2**20  # pixels of an image whose size is taken as it is


def _open(data: Data, seed: int, root: Path, report: Report) -> Contents:
    if data.fit != "error" and data.size is None:
        raise InputError(f"data.fit: {data.fit} needs data.size, the side in pixels or [height, width]")
    found, left_out = decoding.find(root / data.path, data.path)
    files = {name: found[name] for name in sorted(found)}
    if left_out:
        report(Progress(0, len(files), "images", message=_left_out(left_out)))
    names, is_test = _split(list(files), data, seed)
    classes, labels = _classes(names, data)
    layout = _layout(files, data)
    sides = layout.sides if data.sides else padded_sides(layout.sides)

    def fill(train: Images, test: Images) -> None:
        rows = np.where(is_test, is_test.cumsum(), (~is_test).cumsum()) - 1
        inner = centre(layout.sides, sides)
        splits = np.asarray(train), np.asarray(test)  # views of a plain array are quicker to make
        places = [splits[held][row][inner] for row, held in zip(rows.tolist(), is_test.tolist(), strict=True)]
        decoding.read_all(files, layout, places, data.path, lambda done: report(Progress(done, len(files), "images")))

    return Contents(
        shape=(layout.channels, *sides),
        counts=(int((~is_test).sum()), int(is_test.sum())),
        labels=None if labels is None else (labels[~is_test], labels[is_test]),
        classes=classes,
        fill=fill,
    )


def _left_out(names: list[str]) -> str:
    kinds = sorted({PurePosixPath(name).suffix.lower() or "no suffix" for name in names})
    more = ", ..." if len(kinds) > 5 else ""
    files = decoding.counted(len(names), "file")
    return f"left out {files}, hidden or neither PNG nor JPEG ({decoding.shown(', '.join(kinds[:5]))}{more})"


def _layout(files: Mapping[str, decoding.Read], data: Data) -> decoding.Layout:
    """Chooses channels and sides: from the parameters, else as decoding.first_shape finds them. Raises InputError."""
    name, channels, (width, height) = decoding.first_shape(files, data.channels, data.path)
    if data.sides is None and width * height > LARGEST:
        scale = max(width, height) / 64
        usual = [round(side / scale / MULTIPLE) * MULTIPLE or MULTIPLE for side in (height, width)]
        raise InputError(
            f"{data.path}: {decoding.shown(name)} is {width}x{height}, too large to train on as it is; set data.size,"
            f" such as {usual} (height, width), and data.fit to crop, pad or resize"
        )
    given, convert = data.sides is not None, data.channels is not None
    return decoding.Layout(channels, data.sides or (height, width), data.fit, convert, given)


def _split(names: list[str], data: Data, seed: int) -> tuple[list[str], NDArray[np.bool_]]:
    """Returns the names without a leading train/ or test/, and a mask of the test split, bool [N]."""
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


SOURCE = Source(
    _open,
    licence="a folder of images; their licence is not known here",
    flip=True,  # only users know whether their images may be mirrored: training.flip decides
    any_images=True,
)
