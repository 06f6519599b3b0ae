"""Reads Fashion-MNIST, four IDX files, from data.path or from a download. Images of 28x28 pixels are padded to 32x32."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import paths
from ddpm.files.arrays import Images
from ddpm.parameters import Data
from ddpm.runtime.progress import Report
from ddpm.sources.source import Contents, Labels, Source, downloading, in_memory

DOWNLOADS = "fashion-mnist"  # the folder's name in .cache/downloads


def _open(data: Data, seed: int, root: Path, report: Report) -> Contents:
    """Reads the four files in data.path or in torchvision's folders below data.path. Without them, downloads Fashion-MNIST."""
    from torchvision.datasets import FashionMNIST

    folder = _idx_folder(root / data.path)
    if folder is None:
        path = root / paths.downloads_dir(DOWNLOADS)
        files = f"the four *-ubyte.gz files of {FashionMNIST.mirrors[0]} (or of Debian's dataset-fashion-mnist)"
        if _idx_folder(path) is None:
            with downloading(data, path, files, report):
                FashionMNIST(str(path), download=True)
        folder = _idx_folder(path)
        assert folder is not None
    train, test = (_read_split(folder, prefix) for prefix in ("train", "t10k"))
    return in_memory(data, train, test, tuple(FashionMNIST.classes), report)


# IDX files: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as big-endian uint32, data.


def _idx_folder(path: Path) -> Path | None:
    names = [f"{prefix}-{kind}-ubyte" for prefix in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    for folder in (path, path / "raw", path / "FashionMNIST" / "raw"):
        if all(_idx_file(folder, name).exists() for name in names):
            return folder
    return None


def _idx_file(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.exists() else folder / f"{name}.gz"


def _read_split(folder: Path, prefix: str) -> tuple[Images, Labels]:
    pixels = _read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"), 3)
    labels = _read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte"), 1)
    if len(pixels) != len(labels) or pixels.shape[1:] != (28, 28) or labels.max(initial=0) > 9:
        raise InputError(
            f"{folder}: the {prefix} files do not belong to Fashion-MNIST, or the labels do not fit the images; fetch them again"
        )
    return np.pad(pixels[:, None], ((0, 0), (0, 0), (2, 2), (2, 2))), labels.astype(np.int64)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not readable: {error}; fetch the file again") from None
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header], ">u4").astype(int)
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(shape) != dimensions or len(content) != header + shape.prod():
        raise InputError(f"{path}: not an IDX file of uint8 with {dimensions} dimensions, or cut off; fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


SOURCE = Source(
    _open,
    licence="Fashion-MNIST (Xiao et al. 2017), MIT",
    shareable=True,
    flip=False,  # the shoes, three of ten classes, all point to the left
)
