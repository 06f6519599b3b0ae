"""Reads a user's images: PNG and JPEG files at any depth of a folder, or one zip file.

Zip files in the folder are read as if they were unpacked there. The path of an image gives its split and class:

    [train/|test/][CLASS/]...NAME.png

If every path starts with train/ or test/, these folders are the splits. Otherwise a seeded fraction becomes the test split. If
every image then lies in a folder, its first folder is its class. Sides are padded with zeros to the next multiple of 8,
unless `data.size` gives the side.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.parameters import Data
from ddpm.runtime.progress import Progress, Report
from ddpm.sources import decoding, encoded
from ddpm.sources.source import Contents, Labels, Source, held_out


def _open(data: Data, seed: int, root: Path, report: Report) -> Contents:
    found, left_out = decoding.find(root / data.path, data.path)
    files = {name: found[name] for name in sorted(found)}
    if left_out:
        report(Progress(0, len(files), "images", message=_left_out(left_out)))

    def sort(names: list[str]) -> encoded.Sorted:
        names, is_test = _split(names, data, seed)
        return encoded.Sorted(is_test, *_classes(names, data))

    return encoded.contents(data, files, sort, data.path, report)


def _left_out(names: list[str]) -> str:
    kinds = sorted({PurePosixPath(name).suffix.lower() or "no suffix" for name in names})
    more = ", ..." if len(kinds) > 5 else ""
    files = decoding.counted(len(names), "file")
    return f"left out {files}, hidden or neither PNG nor JPEG ({decoding.shown(', '.join(kinds[:5]))}{more})"


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
