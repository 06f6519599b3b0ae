"""Scores a registered model, such as an earlier champion, with the present dataset and evaluation settings."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import models, paths
from ddpm.files.dataset import read_dataset_record
from ddpm.files.params import Params, section
from ddpm.files.scores import Scores, read_all_influence
from ddpm.parameters import Point, Sampler
from ddpm.runtime.progress import Report, silent
from ddpm.stages.evaluate import evaluate
from ddpm.stages.sample import sample_point


def rescore(
    params: Params, checkpoint: Path, settings: dict[str, Any], root: Path = Path(), report: Report = silent
) -> tuple[Scores, NDArray[np.float32]]:
    """Samples and evaluates a checkpoint in a temporary folder, which shares the dataset and the caches with `root`.

    Args:
        params: the parameters, whose sections `sampling` and `evaluation` are used.
        checkpoint: the folder of the model.
        settings: the options of a row of `samplers`, the number of steps, and `clip` (default: sampling.clip).
        root: the top of the checkout.
        report: called with the progress.

    Returns:
        The scores, and the influence of each image on each score, float32 [1 + judges, images].

    Raises:
        InputError: the model's images have another shape than the dataset's, or a setting is invalid.
    """
    params = params.resolved(root)
    model = models.read_model_record(checkpoint)
    dataset = read_dataset_record(root)
    if model.data.shape != dataset.shape:
        raise InputError(
            f"{checkpoint}: the model makes images of shape {model.data.shape}, but the dataset holds images of shape"
            f" {dataset.shape}, so they cannot be compared"
        )
    row = section(
        Sampler, Sampler.arrange({key: value for key, value in settings.items() if key not in ("steps", "clip")})
    )
    point = Point(schedule=model.schedule.name, sampler="champion", steps=settings["steps"])
    sampling = replace(params.sampling, clip=settings.get("clip", params.sampling.clip))
    alone = params.model_copy(update={"samplers": {"champion": row}, "sampling": sampling})
    with tempfile.TemporaryDirectory(prefix="ddpm-rescore-") as name:
        folder = Path(name)
        (root / paths.CACHE).mkdir(exist_ok=True)
        for shared in (paths.dataset_dir(), paths.CACHE):
            (folder / shared).symlink_to((root / shared).resolve())
        link = folder / paths.model_dir(point.schedule)
        link.parent.mkdir(parents=True)
        link.symlink_to(checkpoint.resolve())
        sample_point(alone, point, folder, report)
        scores = evaluate(alone, point, folder, report)
        return scores, read_all_influence(folder, point, scores)
