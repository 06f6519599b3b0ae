"""Checks whether the dataset fits params.yaml before the training starts, so that no later stage fails because of the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import torch

from ddpm.errors import InputError
from ddpm.files import checkpoint
from ddpm.files.dataset import DatasetRecord
from ddpm.files.params import Params
from ddpm.sources.source import Contents
from ddpm.stages.evaluate import FEWEST
from ddpm.stages.train import class_count, network_entry
from ddpm.training import averages


def check_contents(params: Params, contents: Contents) -> list[str]:
    """Checks a data source before its images are read. Returns warnings or raises InputError, as `check` does."""
    counts = None
    if contents.classes is not None and contents.labels is not None:
        numbers = np.bincount(contents.labels[0], minlength=len(contents.classes)).tolist()
        counts = dict(zip(contents.classes, numbers, strict=True))
    return check(params, contents.shape, contents.counts, counts)


def check_record(params: Params, record: DatasetRecord) -> list[str]:
    """Checks a prepared dataset. Returns warnings or raises InputError, as `check` does."""
    channels, height, width = record.shape
    counts = record.counts.get("train", 0), record.counts.get("test", 0)
    classes = None if record.classes is None else dict(zip(record.classes, record.class_counts or (), strict=False))
    return check(params, (channels, height, width), counts, classes)


def check(
    params: Params, shape: tuple[int, int, int], counts: tuple[int, int], classes: Mapping[str, int] | None
) -> list[str]:
    """Raises InputError if a stage would fail on this dataset. Returns warnings, each on one line.

    Args:
        params: the parameters of the run.
        shape: C, H, W of an image.
        counts: the number of train and test images.
        classes: the number of training images of each class; None without classes.
    """
    check_counts(params, counts)
    check_classes(params, classes)
    if not all(params.schedules[name].imported for name in params.sweep.schedules):
        check_network(params, shape, len(classes or ()))
        check_averages(params)
    return warnings(params, counts[0], classes)


def check_counts(params: Params, counts: tuple[int, int]) -> None:
    """Raises InputError if a score such as FID would have too few training images or samples."""
    train, test = counts
    if train < FEWEST:
        enough = ", or move some from test to train" if train + test >= FEWEST else ""
        raise InputError(
            f"{params.data.place}: {train} train and {test} test images, but a score needs at least {FEWEST} train images; add"
            f" images{enough}"
        )
    if params.sampling.images < FEWEST:
        raise InputError(
            f"sampling.images: {params.sampling.images} is too few; a score needs at least {FEWEST} samples"
        )


def check_classes(params: Params, classes: Mapping[str, int] | None) -> None:
    """Raises InputError if the network is conditional, but there are no classes or a class has no training images."""
    if not class_count(params, params.data.source, classes):
        return
    if absent := _without_images(classes):
        raise InputError(
            f"{params.data.place}: no training images of {absent}, so a conditional network cannot learn these classes; add"
            " training images, remove the test images of these classes, or set diffusion.conditional to false"
        )


def check_network(params: Params, shape: tuple[int, int, int], classes: int) -> None:
    """Raises InputError if the section `network` does not give a valid network for images of this shape.

    The network is built on torch's meta device, so its weights take no memory. A network that cannot be built there is checked
    when trained.
    """
    entry = network_entry(params, shape, classes if params.diffusion.conditional else 0)
    with torch.device("meta"), suppress(RuntimeError):
        checkpoint.network(entry)


def check_averages(params: Params) -> None:
    """Raises InputError if a sampler row of the sweep has an `ema` for which the training takes too few snapshots."""
    training = params.training
    steps = {*range(training.snapshot_every, training.steps + 1, training.snapshot_every or 1), training.steps}
    taken = [(step, length) for step in sorted(steps) for length in averages.LENGTHS]
    for name in params.sweep.samplers:
        try:
            if (length := params.samplers[name].ema) is not None:
                averages.coefficients(taken, training.steps, length)
        except ValueError as error:
            raise InputError(f"samplers.{name}.ema: {error}") from None


def warnings(params: Params, train: int, classes: Mapping[str, int] | None) -> list[str]:
    """Returns a line for each setting that works, but probably not as the user intended."""
    lines = []
    samples, scored = params.sampling.images, params.evaluation.images
    if samples > scored:
        lines.append(
            f"sampling.images: {samples:,} images are drawn for each point, but a score uses only evaluation.images = {scored:,}"
        )
    if scored > min(samples, train):
        compared = f"{min(scored, samples):,} samples and {min(scored, train):,} training images"
        lines.append(f"evaluation.images: {scored:,}, but there are fewer images, so scores will compare {compared}")
    if absent := _without_images(classes):
        lines.append(f"no training images of {absent}")
    return lines


def _without_images(classes: Mapping[str, int] | None) -> str:
    """Returns the names of the classes without training images."""
    names = [name if name.isprintable() else ascii(name) for name, count in (classes or {}).items() if not count]
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
