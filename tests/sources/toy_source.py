"""An example source of drawn squares, full and hollow. Copied to ddpm/sources/toy.py, it is selected by `data.source: toy`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddpm.parameters import Data
from ddpm.runtime.progress import Report
from ddpm.sources.source import Contents, Source, held_out, in_memory

COUNT, SIDE = 120, 8  # number of images, and pixels per side
CLASSES = ("full", "hollow")


def _open(data: Data, seed: int, root: Path, report: Report) -> Contents:
    generator = np.random.default_rng(seed)
    images = np.zeros((COUNT, 1, SIDE, SIDE), np.uint8)
    labels = np.arange(COUNT) % len(CLASSES)
    for image, label in zip(images, labels, strict=True):
        top, left = generator.integers(0, 4, 2)
        image[0, top : top + 5, left : left + 5] = 255
        if CLASSES[label] == "hollow":
            image[0, top + 1 : top + 4, left + 1 : left + 4] = 0
    is_test = held_out([str(index) for index in range(COUNT)], data.test_fraction, seed)
    train, test = ((images[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return in_memory(data, train, test, CLASSES, report)


SOURCE = Source(_open, licence="drawn squares, CC0", shareable=True, flip=True)
