"""Draws images while a network trains: a grid to look at, and an approximate FID. DVC does not track these previews."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from ddpm.errors import InputError
from ddpm.files import arrays, dataset, paths, records
from ddpm.files.params import Params
from ddpm.runtime.progress import Progress, Report
from ddpm.scores.extractors import EXTRACTORS

IMAGES, STEPS = 36, 25  # images of a grid, and DDIM steps to draw them
MOST_REFERENCE_IMAGES = 10_000  # the largest number of training images that the FID compares with


def preview_file(schedule: str, step: int) -> Path:
    return paths.CACHE / "previews" / schedule / f"{step:07d}.png"


def previews(
    params: Params,
    root: Path,
    schedule: str,
    log: Callable[[int, arrays.Images], None],
    log_fid: Callable[[int, float], None] = lambda step, fid: None,
) -> Report:
    """Returns a progress callback that draws images every `compute.preview_every` training steps, always from the same noise.

    Args:
        params: the parameters of the run.
        root: the top of the checkout.
        schedule: the name of a row of `schedules` in params.yaml.
        log: called with the step and a grid of 36 images, uint8 C,H,W. The grid is also written to
            .cache/previews/SCHEDULE/STEP.png.
        log_fid: called with the step and the FID of `compute.preview_fid` images, from the extractor's lowest layer. Only the
            trend of this FID is useful: the value cannot be compared with the FID in the report. A file in .cache
            keeps all values for the page of the report.
    """
    scored = params.compute.preview_fid

    @cache
    def kept() -> _Fids:
        return _Fids(params, root, schedule)

    @cache
    def fid() -> Callable[[arrays.Images], float]:
        return _fid_to_train(params, root)

    def report(progress: Progress) -> None:
        if progress.model is None or progress.done % params.compute.preview_every:
            return
        from ddpm.runtime.drawing import draw

        denoiser = progress.model()
        shape = tuple(dataset.read_dataset_record(root).shape)
        classes = denoiser.net.classes
        device = next(denoiser.net.parameters()).device
        count = max(IMAGES, scored)
        images, _ = draw(
            denoiser,
            shape,
            range(count),
            seed=params.seed,
            batch=max(IMAGES, min(count, params.sampling.batch)),
            steps=min(STEPS, denoiser.schedule.T),
            settings={"sampler": "ddim"},
            device=device,
            labels=np.arange(count) % classes if classes else None,
        )
        picture = arrays.grid(images[:IMAGES])
        arrays.write_png(root / preview_file(schedule, progress.done), picture)
        log(progress.done, picture)
        if scored:
            found = fid()(images[:scored])
            kept().add(progress.done, found)
            log_fid(progress.done, found)

    return report


class _Fids:
    """Stores the preview FIDs of a training in the cache, where a resumed training finds them.

    `add` first drops the FIDs of this step and of later steps, which a resumed training computes again.
    """

    def __init__(self, params: Params, root: Path, schedule: str) -> None:
        from ddpm.stages.train import training_key

        self.path, self.training = root / paths.preview_fids_file(schedule), params.training_entry(schedule)
        self.fids: dict[int, float] = {}
        self.key = training_key(params, schedule, dataset.read_dataset_record(root).sha256)
        with suppress(InputError):  # there is no such file, or it is damaged
            found = records.read_record(self.path)
            if found["key"] == self.key:
                self.fids = {int(step): fid for step, fid in found["fids"].items()}

    def add(self, step: int, fid: float) -> None:
        self.fids = {earlier: value for earlier, value in self.fids.items() if earlier < step} | {step: fid}
        about = {
            "key": self.key,
            "training": self.training,
            "fids": {str(at): value for at, value in self.fids.items()},
        }
        records.write_record(self.path, about)


def _fid_to_train(params: Params, root: Path) -> Callable[[arrays.Images], float]:
    """Returns a function that computes the FID of images to training images, at the lowest layer of `evaluation.extractor`."""
    from ddpm.scores import features, fidelity

    extractor = features.load(
        params.evaluation.extractor,
        min(EXTRACTORS[params.evaluation.extractor].layers),
        root / paths.CACHE / params.evaluation.extractor,
    )
    train = dataset.read_dataset(root).train[:MOST_REFERENCE_IMAGES]
    reference = fidelity.statistics(features.extract(extractor, train, params.evaluation.batch))

    def fid(images: arrays.Images) -> float:
        found = fidelity.statistics(features.extract(extractor, images, params.evaluation.batch))
        return fidelity.fid(found, reference)

    return fid
