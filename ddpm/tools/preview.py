"""Draws sample grids while a network trains. DVC does not track the grids, so editing a sampler reruns no training."""

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
    """Returns a Report that draws a grid every `compute.preview_every` steps, from the same noise with 25 DDIM steps.

    The Report writes the grid to .cache/previews/SCHEDULE/STEP.png and passes it to log(step, picture), uint8 C,H,W.
    """

    def report(progress: Progress) -> None:
        if progress.model is None or progress.done % params.compute.preview_every:
            return
        from ddpm.runtime.drawing import draw

        denoiser = progress.model()
        shape = tuple(dataset.read_dataset_record(root).shape)
        classes = denoiser.net.classes
        device = next(denoiser.net.parameters()).device
        images, _ = draw(
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
