"""Draws images from a model: loads the denoiser from a checkpoint, chooses the classes, and samples batches of uint8 images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.samplers import check_options, trajectory
from ddpm.diffusion.schedule import SCHEDULES, NoiseSchedule
from ddpm.diffusion.timesteps import noise_levels
from ddpm.errors import InputError
from ddpm.files import checkpoint, snapshots
from ddpm.files.models import ModelRecord
from ddpm.files.params import Params
from ddpm.parameters import Point, Sampler
from ddpm.runtime import compiling

GUIDANCE = ("guidance", "guidance_interval", "guidance_rescale")  # fields of Denoiser that a sampler row may set
EQUAL_WITHIN = 1.25  # class counts that differ by at most this factor count as equal
UNGUIDED = "needs a class-conditional model (diffusion.conditional: true) that predicts without labels too"


def to_uint8(x: Tensor) -> Tensor:
    """Converts images in [-1, 1] to uint8 in 0 ... 255, clamped and rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def arguments(settings: Mapping[str, Any], T: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the options of a row of `samplers` in params.yaml into arguments of `ddpm.sample` and guidance fields of Denoiser.

    T: the number of timesteps of the network's schedule.
    """
    guidance = {key: settings[key] for key in GUIDANCE if key in settings}
    if interval := guidance.get("guidance_interval"):
        guidance["guidance_interval"] = tuple(interval)
    plain = {key: value for key, value in settings.items() if key not in (*GUIDANCE, "fitted_to", "ema")}
    if along := plain.get("along"):
        plain["along"] = NoiseSchedule.named(along, T)
    if times := plain.get("times"):
        plain["times"] = {int(steps): row for steps, row in times.items()}  # JSON turned the keys into text
    return plain, guidance


def with_sampler(settings: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    """Returns a model's sampling settings with another `sampler`, a key of SAMPLERS in ddpm.diffusion.samplers.

    Keeps the spacing, the guidance and the number of steps. Drops the other options, which belong to the model's own sampler.
    """
    if sampler == settings["sampler"]:
        return dict(settings)
    kept = ("spacing", *GUIDANCE, "steps")
    return {"sampler": sampler, **{key: settings[key] for key in kept if key in settings}}


def weights_id(model: ModelRecord, ema: float | None) -> str:
    """Returns what `fitted_to` in a row of `samplers` names: a sha256 that changes with the weights from which the row draws.

    Args:
        model: the record of the model.
        ema: the length of the weights' average, as in `prepared_denoiser`.
    """
    if ema in (None, model.ema):
        return model.weights_sha256
    return hashlib.sha256(f"{model.weights_sha256} {ema}".encode()).hexdigest()


def check_fitted(settings: Mapping[str, Any], model: ModelRecord, ema: float | None) -> None:
    """Raises ValueError if the `times` of a row of `samplers` in params.yaml were fitted to other weights. See `weights_id`."""
    known = weights_id(model, ema)
    fitted = settings.get("fitted_to", known)
    if fitted != known:
        raise ValueError(
            f"fitted_to: the times were fitted to weights {fitted[:12]}, but this row draws with weights {known[:12]}; fit the"
            " times again with `ddpm fit-times`"
        )


def check_row(name: str, row: Sampler) -> None:
    """Raises InputError if a sampler, spacing, schedule or option in a row of `samplers` is unknown."""
    try:
        options = row.options()
        if (along := options.get("along")) is not None and along not in SCHEDULES:
            raise ValueError(f"along: no schedule '{along}'; there are {', '.join(SCHEDULES)}")
        options, _ = arguments(options, T=1)
        for key in ("along", "times"):
            options.pop(key, None)
        check_options(**options)
    except ValueError as error:
        raise InputError(f"samplers.{name}: {error}") from None


def sampler_row(params: Params, name: str) -> Sampler:
    """Returns the row `name` of `samplers` in params.yaml. Raises InputError, which lists the rows, if there is no such row."""
    if name not in params.samplers:
        raise InputError(f"params.yaml: no row '{name}' in samplers; the rows are {', '.join(params.samplers)}")
    return params.samplers[name]


def check_point(params: Params, point: Point, schedule: NoiseSchedule, learned: bool, guidable: bool) -> None:
    """Raises InputError if a point (schedule, sampler and steps) could not be sampled from a network with these properties.

    Args:
        params: the parameters, with the rows of `samplers`.
        point: the point to check.
        schedule: the network's noise schedule.
        learned: whether the network has a learned variance.
        guidable: whether the network predicts with and without a label.
    """
    row = sampler_row(params, point.sampler)
    check_row(point.sampler, row)
    try:
        along = NoiseSchedule.named(row.along, schedule.T) if row.along else None
        noise_levels(schedule, point.steps, row.spacing or "leading", along, row.times)
        if row.variance == "learned" and not learned:
            raise ValueError("variance learned: this network has learned no variance; take fixed_large or fixed_small")
        if row.guidance is not None and not guidable:
            raise ValueError(f"guidance {UNGUIDED}")
    except ValueError as error:
        raise InputError(f"{point.name}: {error}") from None


def class_labels(model: ModelRecord, count: int, label: str | int | None = None) -> np.ndarray | None:
    """Chooses the class of each image to draw.

    Without a label, classes are as frequent as among the training images, because scores compare the drawn images with the
    training images. If all classes are about equally frequent, image i has class i mod classes.

    Args:
        model: the record of the model.
        count: the number of images.
        label: the name or number of one class for all images, or None.

    Returns:
        int64 [count], or None for an unconditional model.

    Raises:
        ValueError: the model has no such class.
    """
    classes = model.network.classes
    if not classes:
        if label is not None:
            raise ValueError("this model is unconditional: it takes no label")
        return None
    if label is None:
        return _proportional_labels(model.data.class_counts or [1] * classes, count)
    names = model.data.classes or []
    if str(label) in names:
        return np.full(count, names.index(str(label)))
    if str(label).isdecimal() and int(label) < classes:
        return np.full(count, int(label))
    raise ValueError(f"no class '{label}'; there are {', '.join(names)}, numbered from 0")


def _proportional_labels(counts: list[int], total: int) -> np.ndarray:
    """Returns the class of each of `total` images, int64 [total].

    The classes appear in proportion to `counts`. If all counts are similar, the classes take turns: 0, 1, 2, 0, 1, 2. Each
    image gets the class that is furthest behind its share. So the labels of a smaller set are the beginning of the labels of
    a larger set.
    """
    if max(counts) <= EQUAL_WITHIN * min(counts):
        counts = [1] * len(counts)
    deficits, labels = np.zeros(len(counts), np.int64), np.empty(total, np.int64)
    for i in range(total):  # exact, because deficits are integers, in units of 1 / sum(counts) images
        deficits += counts
        labels[i] = deficits.argmax()
        deficits[labels[i]] -= sum(counts)
    return labels


@torch.inference_mode()
def draw(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    indices: range,
    *,
    seed: int,
    batch: int,
    steps: int,
    settings: dict[str, Any],
    device: torch.device,
    labels: np.ndarray | None = None,
    done: Callable[[int, int], None] = lambda images, evaluations: None,
    into: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Draws the images with these indices. The noise of an image depends only on seed and index, not on `batch`.

    Args:
        denoiser: the model, with its network on `device`.
        shape: C, H, W of an image.
        indices: the indices of the images.
        seed: the seed of the noise.
        batch: the number of images drawn at once.
        steps: the number of sampling steps.
        settings: the options of a row of `samplers` in params.yaml.
        device: the device of the noise.
        labels: int64 [len(indices)], the class of each image, for a conditional network.
        done: called as done(images, evaluations) after each step and each batch, with the images drawn so far (a batch counts
            in proportion to its steps) and the evaluations per image so far.
        into: an array to fill, uint8 [len(indices), *shape]. By default a new array.

    Returns:
        The images, uint8 [len(indices), *shape], and the network evaluations per image.

    Raises:
        ValueError: the settings do not fit the network.
    """
    options, guidance = arguments(settings, denoiser.schedule.T)
    if guidance and labels is None:
        raise ValueError(f"guidance {UNGUIDED}")
    images = np.empty((len(indices), *shape), np.uint8) if into is None else into
    evaluations = 0
    for start in range(0, len(indices), batch):
        rows = indices[start : start + batch]
        x_T = gaussian(seed, rows, 0, shape, device).to(memory_format=torch.channels_last)
        if labels is not None:
            classes = torch.from_numpy(labels[start : start + batch]).to(device)
            denoiser = replace(denoiser, labels=classes, **guidance)

        def noise(k: int, rows: range = rows) -> Tensor:
            return gaussian(seed, rows, k + 1, shape, device)

        for state in trajectory(denoiser, x_T, steps=steps, noise=noise, **options):
            x, evaluations = state.x, state.evaluations
            done(start + len(rows) * state.k // steps, evaluations)
        images[start : start + len(rows)] = to_uint8(x).cpu().numpy()
        done(start + len(rows), evaluations)
    return images, evaluations


def prepared_denoiser(
    path: Path, device: torch.device, clip: bool | float, precision: str, compiled: bool, ema: float | None = None
) -> tuple[Denoiser, ModelRecord]:
    """Loads a checkpoint's denoiser for sampling.

    Args:
        path: the folder of the checkpoint.
        device: the device of the network.
        clip: see `Denoiser`.
        precision: "float32", or "bfloat16" for autocast.
        compiled: whether to compile the network.
        ema: the length of the weights' average to load from the snapshots (see `Sampler`). None for the checkpoint's weights,
            which may be such an average themselves.

    Returns:
        The denoiser, and the record of the model.

    Raises:
        InputError: the checkpoint cannot be read, the network cannot be compiled, or `ema` is set and the model has no snapshots.
    """
    denoiser, model = checkpoint.load(path, device, clip)
    if ema not in (None, model.ema):
        checkpoint.replace_weights(denoiser.net, snapshots.averaged(path, model, ema), path)
    net = compiling.compiled(denoiser.net, "sampling") if compiled else denoiser.net
    if precision == "bfloat16":
        plain = net

        def net(x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return plain(x, t, *labels).float()

    return Denoiser(net, denoiser.schedule, denoiser.target, clip), model
