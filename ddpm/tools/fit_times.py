"""`fit-times`: finds the times t for a sampler of few steps, so that its images come closest to those of 1000 steps.

Prints these times in a row for the section `samplers` of params.yaml.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from typing import Any

import torch

from ddpm.diffusion.fitted import GRID, REFERENCE, Path, fit_times
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.paths import check_flow
from ddpm.errors import InputError
from ddpm.files.params import Params
from ddpm.files.yaml_file import flow_row
from ddpm.runtime.device import find_device, memory_errors
from ddpm.runtime.drawing import UNGUIDED, arguments, check_row, class_labels, prepared_denoiser, weights_id
from ddpm.runtime.progress import Progress, Report, silent

DEFAULT: dict[str, Any] = {"sampler": "unipc"}
SEARCH_RUNS = 400  # the approximate number of sampler runs in a search, for the progress
REPLACED_OPTIONS = ("spacing", "along", "times", "fitted_to")  # the options of a row that the fitted times replace


def fit_row(
    params: Params,
    folder: File,
    steps: Sequence[int],
    sampler: str = "",
    images: int = 64,
    seed: int = 0,
    report: Report = silent,
) -> tuple[str, dict[int, float]]:
    """Finds the best times t for the steps of a sampler with one model. Returns them as a row for the section
    `samplers` of params.yaml.

    Args:
        params: the content of params.yaml.
        folder: the checkpoint folder.
        steps: the numbers of steps S for which to fit times.
        sampler: a row of `samplers` in params.yaml, which gives all options but the times; "" for UniPC.
        images: the number of reference images, each drawn in 1000 steps, to which the times are fitted.
        seed: the seed of the noise from which these images start.
        report: called with the progress, in network evaluations per image.

    Returns:
        The fitted row in YAML, on one line, and for each S the RMS distance of the sampler's images from the reference images.

    Raises:
        InputError: an argument is invalid, or the model cannot be read.
    """
    _check(params, steps, sampler)
    torch.set_num_threads(params.sampling.threads)
    device = find_device(params.compute.device)
    ema = params.samplers[sampler].ema if sampler else None
    denoiser, record = prepared_denoiser(folder, device, params.sampling.clip, "float32", compiled=False, ema=ema)
    row = DEFAULT
    if sampler:
        check_row(sampler, params.samplers[sampler])
        row = {key: value for key, value in params.samplers[sampler].options().items() if key not in REPLACED_OPTIONS}
    options, guidance = arguments(row, denoiser.schedule.T)
    done, total = 0, REFERENCE + SEARCH_RUNS * sum(steps)

    def count(evaluations: int) -> None:
        nonlocal done
        done = min(done + evaluations, total)
        report(Progress(done, total, "evaluations"))

    times, errors = dict[int, list[float]](), dict[int, float]()
    try:
        check_flow(**options)
        if guidance and not record.network.guidable:
            raise ValueError(f"guidance {UNGUIDED}")
        if (labels := class_labels(record, images)) is not None:
            denoiser = replace(denoiser, labels=torch.from_numpy(labels).to(device), **guidance)
        channels, height, width = record.data.shape
        with memory_errors("fit-times", "lower --images"):
            x_T = gaussian(seed, range(images), 0, (channels, height, width), device)
            path = Path.of(denoiser, x_T, lambda evaluations: count(1))
            for each in steps:
                found, errors[each] = fit_times(denoiser, path, each, done=partial(count, each), **options)
                times[each] = [round(t, 2) for t in found]
    except ValueError as error:
        raise InputError(f"fit-times: {error}") from None
    fitted = {**row, "times": times, "fitted_to": weights_id(record, ema)}
    return _one_line(fitted), errors


def _check(params: Params, steps: Sequence[int], sampler: str) -> None:
    """Raises InputError if a number of steps is out of range, or if `samplers` in params.yaml has no row `sampler`."""
    if sampler and sampler not in params.samplers:
        raise InputError(f"params.yaml: no row '{sampler}' in samplers; the rows are {', '.join(params.samplers)}")
    if wrong := [each for each in steps if not 1 <= each <= GRID]:
        raise InputError(f"fit-times: steps = {wrong[0]} must lie in 1 ... {GRID}")


def _one_line(row: dict[str, Any]) -> str:
    from ruamel.yaml import YAML

    yaml, text = YAML(), io.StringIO()
    yaml.width = 1 << 20
    yaml.dump(flow_row(row), text)
    return text.getvalue().strip()
