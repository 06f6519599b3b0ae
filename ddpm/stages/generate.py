"""`generate`: images from a registered model or a checkpoint folder, as one picture."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ddpm.stages import store
from ddpm.stages.device import find_device
from ddpm.stages.errors import InputError
from ddpm.stages.params import Params
from ddpm.stages.progress import Progress, Report, silent
from ddpm.stages.sample import check_row, class_labels, prepared_denoiser
from ddpm.stages.sample import generate as draw

DEFAULT: dict[str, Any] = {"sampler": "ddim", "steps": 50}


def generate(
    params: Params,
    *,
    out: Path,
    count: int,
    model: str = "",
    seed: int = 0,
    sampler: str = "",
    steps: int = 0,
    label: str | None = None,
    guidance: float | None = None,
    report: Report = silent,
) -> Path:
    """Writes a grid of `count` images to `out` (PNG) and returns its path.

    model: models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint folder, or "" for the champion of params' dataset.
    sampler: a row of params.samplers, steps: S; "" and 0 take the settings that the model was registered with, or DDIM
    at 50 steps for a folder. label: of a conditional model, the class of all images, by name or number; None: the classes in
    turn. guidance: instead of the settings'. Raises InputError.
    """
    from ddpm.stages import tracking

    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: the picture is a PNG; give --out a name that ends in .png")
    if sampler and sampler not in params.samplers:
        raise InputError(f"no row '{sampler}' in samplers of params.yaml; there are {', '.join(params.samplers)}")
    device = find_device(params.compute.device)
    with tempfile.TemporaryDirectory(prefix="ddpm-generate-") as name:
        if model and not model.startswith("models:"):
            folder, settings = Path(model), dict(DEFAULT)
        else:
            folder, settings = tracking.fetch_model(model or tracking.champion_uri(params), Path(name))
        if sampler:
            check_row(sampler, params.samplers[sampler])
            settings = {**params.samplers[sampler].options(), "steps": settings["steps"]}
        if steps:
            settings["steps"] = steps
        if guidance is not None:
            settings["guidance"] = guidance
        denoiser, about = prepared_denoiser(folder, device, clip=True, precision="float32", compiled=False)
    try:
        images, _ = draw(
            denoiser,
            tuple(about["data"]["shape"]),
            range(count),
            seed=seed,
            batch=params.sampling.batch,
            steps=settings.pop("steps"),
            settings=settings,
            device=device,
            labels=class_labels(about, count, label),
            done=lambda images, _: report(Progress(images, count, "images")),
        )
    except ValueError as error:
        raise InputError(f"generate: {error}") from None
    store.write_png(out, store.grid(images))
    return out
