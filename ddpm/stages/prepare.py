"""`prepare`: reads the images of `data.source` and writes dataset/: a uint8 array per split, labels, statistics and a preview."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import arrays, paths
from ddpm.files.arrays import Images
from ddpm.files.dataset import DatasetRecord, NewDataset, read_dataset_record, spread, writing_dataset
from ddpm.files.params import Params
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.sources.source import SOURCES, Contents

COLUMNS, ROWS = 10, 20  # number of columns and maximum number of rows of the preview
PREVIEW_SIDE = 64  # maximum side of an image in the preview, in pixels; larger images are subsampled


def prepare(
    params: Params,
    root: Path = Path(),
    report: Report = silent,
    check: Callable[[Contents], Sequence[str]] = lambda contents: (),
) -> DatasetRecord:
    """Writes the dataset that `params.data` describes and returns its record.

    Args:
        params: the parameters of the run.
        root: the top of the checkout.
        report: called with the progress.
        check: called with the opened source before the images are read. Returns warnings, or raises InputError.

    Raises:
        InputError: the images cannot be used. An earlier dataset then stays unchanged.
    """
    source = SOURCES.select(params.data.source)
    contents = source.open(params.data, params.seed, root, report)
    if contents.counts[0] == 0:
        raise InputError(f"{params.data.place}: no training images; add images or lower data.test_fraction")
    total = sum(contents.counts)
    for warning in check(contents):
        report(Progress(0, total, "images", message=warning))
    report(Progress(0, total, "images"))
    with writing_dataset(root, contents.shape, contents.counts, contents.labels) as new:
        contents.fill(new.train, new.test)
        new.description = {"name": params.data.source, **_about(contents, new), "flip": source.flip}
        new.unusable = contents.unusable
        new.picture = preview(new.train, new.train_labels, len(contents.classes or ()))
    report(Progress(total, total, "images", message=f"{params.data.source}: {_summary(contents)}"))
    return read_dataset_record(root)


def preview(train: Images, labels: NDArray[np.int64] | None, classes: int) -> Images:
    """Draws a picture of training images, with COLUMNS columns and at most ROWS rows.

    With labels, each row shows one class. If a class has fewer than COLUMNS images, the rest of the row is white.
    Without labels, the images are evenly spread over the split.

    Args:
        train: the training images, uint8 N,C,H,W.
        labels: the class number of each image, int64 N; None without classes.
        classes: the number of classes.

    Returns:
        The picture, uint8 C,H,W.
    """
    step = math.ceil(max(train.shape[2:]) / PREVIEW_SIDE)
    if labels is None:
        return arrays.grid(spread(train[:, :, ::step, ::step], ROWS * COLUMNS), COLUMNS)
    classes = min(classes, ROWS)
    shape = train[:1, :, ::step, ::step].shape[1:]
    images = np.full((classes, COLUMNS, *shape), 255, np.uint8)
    for label in range(classes):
        members = np.flatnonzero(labels == label)[:COLUMNS]
        images[label, : len(members)] = train[members, :, ::step, ::step]
    return arrays.grid(images.reshape(-1, *shape), COLUMNS)


def _about(contents: Contents, dataset: NewDataset) -> dict[str, Any]:
    mean, deviation = mean_and_deviation(dataset.train)
    return {
        "sha256": _version(dataset),
        "shape": list(contents.shape),
        "counts": dict(zip(("train", "test"), contents.counts, strict=True)),
        "classes": list(contents.classes) if contents.classes is not None else None,
        "class_counts": _class_counts(dataset, contents.classes),
        "mean": mean,
        "std": deviation,
    }


def _class_counts(dataset: NewDataset, classes: tuple[str, ...] | None) -> list[int] | None:
    if classes is None or dataset.train_labels is None:
        return None
    return [int(count) for count in np.bincount(dataset.train_labels, minlength=len(classes))]


def mean_and_deviation(images: Images) -> tuple[list[float], list[float]]:
    """Computes the mean and standard deviation of each channel, on the scale 0 ... 1, rounded to 6 digits.

    Counts grey levels in integers, so the result is exact and does not depend on the order of the images. images: uint8 N,C,H,W.
    """
    counts = np.zeros((images.shape[1], 256), np.int64)
    block = max(1, 2**22 // math.prod(images.shape[1:]))
    for start in range(0, len(images), block):
        for channel, values in enumerate(images[start : start + block].swapaxes(0, 1)):
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    total = int(counts[0].sum())
    sums, squares = ([int(number) for number in counts @ np.arange(256) ** power] for power in (1, 2))
    mean = [number / total / 255 for number in sums]
    variance = [(square * total - number**2) / total**2 for number, square in zip(sums, squares, strict=True)]
    return [round(value, 6) for value in mean], [round(math.sqrt(value) / 255, 6) for value in variance]


def _version(dataset: NewDataset) -> str:
    digest = hashlib.sha256()
    for array in (dataset.train, dataset.test, dataset.train_labels, dataset.test_labels):
        if array is not None:
            digest.update(f"{array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _summary(contents: Contents) -> str:
    train, test = contents.counts
    size = "x".join(str(number) for number in contents.shape)
    number = len(contents.classes or ())
    classes = f"{number} class{'es' if number != 1 else ''}" if contents.classes is not None else "no classes"
    unusable = len(contents.unusable)
    left_out = (
        f"; left out {unusable:,} unusable file{'s' if unusable != 1 else ''}, listed in {paths.dataset_dir()}/unusable.csv"
        if unusable
        else ""
    )
    return f"{train:,} train and {test:,} test images of {size}, {classes}{left_out}"
