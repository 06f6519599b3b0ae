"""Sample grids while a network trains: something to look at, outside DVC's outs, so that samplers never re-run training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddpm.files import arrays, dataset, paths
from ddpm.files.params import Params
from ddpm.runtime.progress import Progress, Report

IMAGES, STEPS = 36, 25


def preview_file(schedule: str, step: int) -> Path:
    return paths.CACHE / "previews" / schedule / f"{step:07d}.png"


def previews(params: Params, root: Path, schedule: str, log: Callable[[int, arrays.Images], None]) -> Report:
    """A Report that draws a grid every `compute.preview_every` steps: the same noise each time, 25 DDIM steps.

    The grid goes to .cache/previews/SCHEDULE/STEP.png and to log(step, picture).
    """

    def report(progress: Progress) -> None:
        if progress.model is None or progress.done % params.compute.preview_every:
            return
        from ddpm.runtime.drawing import generate

        denoiser = progress.model()
        shape = tuple(dataset.read_dataset_record(root).shape)
        classes = denoiser.net.classes
        device = next(denoiser.net.parameters()).device
        images, _ = generate(
            denoiser,
            shape,
            range(IMAGES),
            seed=params.seed,
            batch=IMAGES,
            steps=min(STEPS, denoiser.schedule.T),
            settings={"sampler": "ddim"},
            device=device,
            labels=np.arange(IMAGES) % classes if classes else None,
        )
        picture = arrays.grid(images)
        arrays.write_png(root / preview_file(schedule, progress.done), picture)
        log(progress.done, picture)

    return report
