"""Reads scikit-learn's 1,797 handwritten digits of 8x8 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddpm.parameters import Data
from ddpm.runtime.progress import Report
from ddpm.sources.source import Contents, Source, held_out, in_memory


def _open(data: Data, seed: int, root: Path, report: Report) -> Contents:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]  # values are 0 ... 16
    labels = bunch.target.astype(np.int64)
    is_test = held_out([str(index) for index in range(len(pixels))], data.test_fraction, seed)
    train, test = ((pixels[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return in_memory(data, train, test, tuple(str(name) for name in bunch.target_names), report)


SOURCE = Source(
    _open,
    licence="Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI Machine Learning Repository), CC BY 4.0",
    shareable=True,
)
