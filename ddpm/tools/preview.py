"""Draws images while a network trains: a grid to look at, and an approximate FID. DVC does not track these previews."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpm.errors import InputError
from ddpm.files import arrays, dataset, paths, records
from ddpm.files.params import Params
from ddpm.runtime.progress import Progress, Report
from ddpm.scores.extractors import EXTRACTORS

if TYPE_CHECKING:
    from ddpm.scores import fidelity

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
    # Loads the extractor now, so that a missing one does not end the training halfway.
    fids = _Fids(params, root, schedule) if scored else None

    def report(progress: Progress) -> None:
        if progress.model is None:
            return
        if fids is not None:
            fids.read(progress.done)
        if progress.done % params.compute.preview_every:
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
        if fids is not None:
            log_fid(progress.done, fids.add(progress.done, images[:scored]))

    return report


class _Fids:
    """Computes the FIDs of previews, and stores them in the cache, where a resumed training finds them.

    Loads the lowest layer of `evaluation.extractor`. Raises InputError if its weights are missing.
    """

    def __init__(self, params: Params, root: Path, schedule: str) -> None:
        from ddpm.scores import features

        self.params, self.root, self.schedule = params, root, schedule
        name = params.evaluation.extractor
        self.extractor = features.load(name, min(EXTRACTORS[name].layers), root / paths.CACHE / name)
        self.path = root / paths.preview_fids_file(schedule)
        self.fids: dict[int, float] | None = None

    @cached_property
    def key(self) -> str:
        from ddpm.stages.train import training_key

        return training_key(self.params, self.schedule, dataset.read_dataset_record(self.root).sha256)

    @cached_property
    def reference(self) -> fidelity.Statistics:
        from ddpm.stages.evaluate import reference_images

        return self._statistics(reference_images(dataset.read_dataset(self.root).train, MOST_REFERENCE_IMAGES))

    def read(self, first: int) -> None:
        """Reads the FIDs of the steps before `first`, the first step after resuming. The first call counts.

        Later FIDs in the file belong to weights that this training may never have.
        """
        if self.fids is not None:
            return
        self.fids = {}
        with suppress(InputError):  # there is no such file, or it is damaged
            found = records.read_record(self.path)
            if found["key"] == self.key:
                self.fids = {int(step): fid for step, fid in found["fids"].items() if int(step) < first}
                self._write()

    def add(self, step: int, images: arrays.Images) -> float:
        """Returns the FID of the images that were drawn after a step, and stores it."""
        from ddpm.scores import fidelity

        assert self.fids is not None
        self.fids[step] = fidelity.fid(self._statistics(images), self.reference)
        self._write()
        return self.fids[step]

    def _statistics(self, images: arrays.Images) -> fidelity.Statistics:
        from ddpm.scores import features, fidelity

        return fidelity.statistics(features.extract(self.extractor, images, self.params.evaluation.batch))

    def _write(self) -> None:
        about = {
            "key": self.key,
            "training": self.params.training_entry(self.schedule),
            "fids": {str(step): fid for step, fid in (self.fids or {}).items()},
        }
        records.write_record(self.path, about)
