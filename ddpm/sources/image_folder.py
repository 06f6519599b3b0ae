"""Reads a user's images: PNG and JPEG files (with `data.convert`, also GIF, WebP, BMP and TIFF) in a folder or a zip file.

Images may lie at any depth. Zip files in the folder are read as if they were unpacked there. The path of an image gives its split
and class. WRAPPER stands for outer folders that hold all images:

    [WRAPPER/...][train/|test/][CLASS/]...NAME.png    or    [WRAPPER/...]CLASS/train/|test/...NAME.png

A folder named train, test, val or another key of ROLES, in upper or lower case, is a split. If such folders hold every image,
these splits are used. Otherwise a share of the images (`data.test_fraction`), chosen with the seed, becomes the test split. If
every image also lies in a folder that is neither WRAPPER nor a split, the outermost such folder is the image's class. The sides
are padded to the next multiple of 8, unless `data.size` sets the sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.parameters import Data
from ddpm.runtime.progress import Progress, Report
from ddpm.sources import decoding, encoded
from ddpm.sources.source import Contents, Labels, Source, held_out

# The split of each folder name, in lower case.
ROLES = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(
    ("test", "testing", "val", "valid", "validation"), "test"
)


def _open(data: Data, seed: int, root: Path, report: Report) -> Contents:
    found = decoding.find(root / data.path, data.path, data.convert, data.unusable == "skip")
    files = {name: found.images[name] for name in sorted(found.images)}

    def say(message: str) -> None:
        report(Progress(0, len(files), "images", message=message))

    if found.left_out:
        say(_left_out(found.left_out, data.convert))

    def assign(names: list[str]) -> encoded.Assignment:
        inner, is_test = _split(names, data, seed)
        return encoded.Assignment(is_test, *_classes(inner, say))

    return encoded.contents(data, files, assign, data.path, report, found.faults)


def _left_out(names: list[str], convert: bool) -> str:
    kinds = sorted({PurePosixPath(name).suffix.lower() or "no suffix" for name in names})
    more = ", ..." if len(kinds) > 5 else ""
    files = decoding.counted(len(names), "file")
    why = "hidden or no images" if convert else "hidden or neither PNG nor JPEG"
    help = "" if convert else decoding.convertible(names)
    return f"left out {files}, {why} ({decoding.shown(', '.join(kinds[:5]))}{more})" + (f"; {help}" if help else "")


def _split(names: list[str], data: Data, seed: int) -> tuple[list[str], NDArray[np.bool_]]:
    """Removes the outer folders and the folders of splits from names. Returns the names, and a mask of the test split, bool [N].

    Raises InputError if the folders of splits are ambiguous or incomplete.
    """
    unwrapped = _unwrapped([tuple(name.split("/")) for name in names])
    for depth in (0, 1):
        words = [path[depth] if len(path) > depth + 1 else "" for path in unwrapped]
        roles = {word: ROLES.get(word.lower()) for word in sorted(set(words))}
        found = set(roles.values())
        if None not in found and (depth == 0 or "train" in found):
            _check_roles(roles, data)
            inner = ["/".join((*path[:depth], *path[depth + 1 :])) for path in unwrapped]
            return inner, np.array([roles[word] == "test" for word in words])
        if {"train", "test"} <= found:
            raise _mixed(roles, data)
    # A single folder of images is no wrapper, but a class.
    inner = ["/".join(path) for path in unwrapped] if any(len(path) > 1 for path in unwrapped) else names
    return inner, held_out(names, data.test_fraction, seed)


def _unwrapped(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Removes from the paths the outer folders that hold all images. Keeps folders with the name of a split."""
    while {path[0] for path in paths} == {paths[0][0]} and len(paths[0]) > 1 and paths[0][0].lower() not in ROLES:
        paths = [path[1:] for path in paths]
    return paths


def _check_roles(roles: Mapping[str, str | None], data: Data) -> None:
    """Raises InputError if a split has several folders, or if there is no folder of training images."""
    for role in ("train", "test"):
        if len(folders := [word for word in roles if roles[word] == role]) > 1:
            kind = "training images" if role == "train" else "held-out images"
            raise InputError(
                f"{data.path}: several folders hold {kind}: {', '.join(folders)}; keep one, and merge the others into it or"
                " move them out"
            )
    if "train" not in roles.values():
        raise InputError(
            f"{data.path}: no training images: all lie in {', '.join(roles)}; put training images into a folder train"
        )


def _mixed(roles: Mapping[str, str | None], data: Data) -> InputError:
    splits = ", ".join(word for word in roles if roles[word])
    others = [decoding.shown(word) if word else "images without a split" for word in roles if not roles[word]]
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    return InputError(
        f"{data.path}: {splits} look like splits, but beside them there are {', '.join(others[:3])}{more}; move those out of"
        f" data.path, or rename {splits} if they are classes"
    )


def _classes(names: list[str], say: Callable[[str], None]) -> tuple[tuple[str, ...] | None, Labels | None]:
    """Returns the classes and the label of each image. Returns None for both unless each image lies in a folder."""
    loose = [name for name in names if "/" not in name]
    if loose:
        if len(loose) < len(names):
            first = ", ".join(decoding.shown(name) for name in loose[:3])
            say(
                f"no classes, because {len(loose):,} of {decoding.counted(len(names), 'image')} lie in no folder: {first}"
            )
        return None, None
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
