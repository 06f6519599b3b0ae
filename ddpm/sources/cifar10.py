"""Reads CIFAR-10 with torchvision, from data.path or from a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddpm.errors import InputError
from ddpm.files import paths
from ddpm.parameters import Data
from ddpm.runtime.progress import Report
from ddpm.sources.source import Contents, Source, downloading, in_memory


def _open(data: Data, seed: int, root: Path, report: Report) -> Contents:
    """Reads the folder cifar-10-batches-py, which is data.path or lies in data.path. Without this folder, downloads CIFAR-10."""
    from torchvision.datasets import CIFAR10

    path = root / data.path
    if path.name == CIFAR10.base_folder:
        path = path.parent
    if not (path / CIFAR10.base_folder).is_dir():
        path = root / paths.downloads_dir(data.source)
        files = f"the folder {CIFAR10.base_folder} of {CIFAR10.url}"
        with downloading(data, path, files, report):
            CIFAR10(str(path), download=True)
    try:
        splits = [CIFAR10(str(path), train=train) for train in (True, False)]
    except (RuntimeError, OSError):
        place = path / CIFAR10.base_folder
        raise InputError(f"{place}: CIFAR-10 is damaged or incomplete there; unpack {CIFAR10.url} again") from None
    train, test = ((split.data.transpose(0, 3, 1, 2), np.array(split.targets, np.int64)) for split in splits)
    return in_memory(data, train, test, tuple(splits[0].classes), report)


SOURCE = Source(
    _open,
    licence="CIFAR-10 (Krizhevsky 2009), published without a licence: photographs from the web",
    flip=True,
)
