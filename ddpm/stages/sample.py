"""`sample POINT`: a trained network, a sampler row and a step count -> one file of uint8 images and a preview grid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.samplers import check_options, noise_levels, trajectory
from ddpm.diffusion.schedule import SCHEDULES, NoiseSchedule
from ddpm.errors import InputError
from ddpm.files import checkpoint, store
from ddpm.files.params import Params, Point, Sampler
from ddpm.provenance import code
from ddpm.runtime import compiling
from ddpm.runtime.device import find_device, memory_errors
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.runtime.stopping import Stopped, deferred

ALIKE = 1.25  # classes of which none has more than this times the images of another


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 0 ... 255, rounded; what lies outside is clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def check_row(name: str, row: Sampler) -> None:
    """Raises InputError for a sampler row that `ddpm.sample` would refuse."""
    try:
        options = row.options()
        options.pop("guidance", None)
        if (along := options.pop("along", None)) is not None and along not in SCHEDULES:
            raise ValueError(f"no schedule '{along}' to go along; there are {', '.join(SCHEDULES)}")
        check_options(**options)
    except ValueError as error:
        raise InputError(f"samplers.{name}: {error}") from None


def check_point(params: Params, point: Point, schedule: NoiseSchedule, learned: bool, conditional: bool) -> None:
    """Raises InputError for a point whose row or steps such a network could not be sampled with: at once, not after its training.

    schedule: the network's. learned: whether it has learned its variance; conditional: whether it knows classes.
    """
    if point.sampler not in params.samplers:
        raise InputError(f"no row '{point.sampler}' in samplers; there are {', '.join(params.samplers)}")
    row = params.samplers[point.sampler]
    check_row(point.sampler, row)
    try:
        along = NoiseSchedule.named(row.along, schedule.T) if row.along else None
        noise_levels(schedule, point.steps, row.spacing, along)
        if row.variance == "learned" and not learned:
            raise ValueError("variance learned: this network has learned no variance; take fixed_large or fixed_small")
        if row.guidance is not None and not conditional:
            raise ValueError("guidance takes a class-conditional model (diffusion.conditional: true)")
    except ValueError as error:
        raise InputError(f"{point.name}: {error}") from None


def class_labels(about: dict[str, Any], count: int, label: str | int | None = None) -> np.ndarray | None:
    """The class of each of `count` images, int64; None for an unconditional model. about: model.json.

    label: the name of a class, or its number. Without one each class is as frequent as among the training images, which scores
    compare with; where these are about alike, image i is of class i mod classes. Raises ValueError.
    """
    classes = about["network"].get("classes", 0)
    if not classes:
        if label is not None:
            raise ValueError("this model is unconditional: it takes no label")
        return None
    if label is None:
        return _as_frequent(about["data"].get("class_counts") or [1] * classes, count)
    names = about["data"]["classes"]
    if str(label) in names:
        return np.full(count, names.index(str(label)))
    if str(label).isdecimal() and int(label) < classes:
        return np.full(count, int(label))
    raise ValueError(f"no class '{label}'; there are {', '.join(names)}, numbered from 0")


def _as_frequent(counts: list[int], total: int) -> np.ndarray:
    """The class of each of `total` images, int64 [total], as frequent as `counts` say; in turn, where they are alike.

    Every image goes to the class furthest behind its share, so that a smaller set is the beginning of a larger one.
    """
    if max(counts) <= ALIKE * min(counts):
        counts = [1] * len(counts)
    behind, labels = np.zeros(len(counts), np.int64), np.empty(total, np.int64)
    for i in range(total):  # in units of 1 / sum(counts): exactly
        behind += counts
        labels[i] = behind.argmax()
        behind[labels[i]] -= sum(counts)
    return labels


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    shape: tuple[int, int, int],
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
    """Images number `indices` of a seed: uint8 [len(indices), *shape], and the network evaluations each took.

    Their noise depends on seed and index alone, never on `batch`. done(images, evaluations) is told of each finished
    batch, and of each step. settings: a sampler row's options. labels: the class of each image, for a conditional network.
    into: an array to fill instead of a new one. Raises ValueError.
    """
    options = dict(settings)
    guidance = options.pop("guidance", None)
    if guidance is not None and labels is None:
        raise ValueError("guidance takes a class-conditional model (diffusion.conditional: true)")
    if along := options.get("along"):
        options["along"] = NoiseSchedule.named(along, denoiser.schedule.T)
    images = np.empty((len(indices), *shape), np.uint8) if into is None else into
    evaluations = 0
    for start in range(0, len(indices), batch):
        rows = indices[start : start + batch]
        x_T = gaussian(seed, rows, 0, shape, device).to(memory_format=torch.channels_last)
        if labels is not None:
            these = torch.from_numpy(labels[start : start + batch]).to(device)
            denoiser = replace(denoiser, labels=these, guidance=1.0 if guidance is None else guidance)

        def noise(k: int, rows: range = rows) -> Tensor:
            return gaussian(seed, rows, k + 1, shape, device)

        for state in trajectory(denoiser, x_T, steps=steps, noise=noise, **options):
            x, evaluations = state.x, state.evaluations
            done(start + len(rows) * state.k // steps, evaluations)
        images[start : start + len(rows)] = to_uint8(x).cpu().numpy()
        done(start + len(rows), evaluations)
    return images, evaluations


def prepared_denoiser(
    path: Path, device: torch.device, clip: bool | float, precision: str, compiled: bool
) -> tuple[Denoiser, dict[str, Any]]:
    """A checkpoint's denoiser, as the `sampling` section wants it computed. Raises InputError."""
    denoiser, about = checkpoint.load(path, device, clip)
    net = compiling.compiled(denoiser.net, "sampling") if compiled else denoiser.net
    if precision == "bfloat16":
        plain = net

        def net(x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return plain(x, t, *labels).float()

    return Denoiser(net, denoiser.schedule, denoiser.target, clip), about


def sampling_key(params: Params, point: Point, about: dict[str, Any], device: torch.device) -> str:
    """Names everything that decides the images of a point, the code among it. about: model.json."""
    settings = [params.seed, params.samplers[point.sampler].options(), params.sampling.model_dump(mode="json")]
    decisive = [about, settings, point.steps, device.type, code.digest(__name__)]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def sample_point(params: Params, point: Point, root: Path = Path(), report: Report = silent) -> int:
    """Writes samples/POINT.npz and samples/POINT.png; returns the network evaluations per image.

    Finished batches are kept in the cache until both are there, so that a stopped run goes on where it was.
    Raises InputError, and Stopped when a signal came.
    """
    settings = params.sampling
    torch.set_num_threads(settings.threads)
    device = find_device(params.compute.device)
    checkpoint.require_trained(params, point.schedule, root)
    store.read_trained(root, point.schedule)
    denoiser, about = prepared_denoiser(
        root / store.model_dir(point.schedule), device, settings.clip, settings.precision, settings.compile
    )
    network = about["network"]
    learned = (network.get("out_channels") or 0) > network["image_channels"]
    check_point(params, point, denoiser.schedule, learned, conditional=bool(network.get("classes")))
    row, path, total = params.samplers[point.sampler], root / store.samples_file(point), settings.images
    channels, height, width = about["data"]["shape"]
    labels = class_labels(about, total)
    folder = root / store.CACHE / "sampling" / point.name
    kept = store.KeptImages(folder, sampling_key(params, point, about, device), (total, channels, height, width))
    batches = [range(start, min(start + settings.batch, total)) for start in range(0, total, settings.batch)]
    evaluations = 0
    with kept as images, deferred() as signalled, memory_errors(point.name, "lower sampling.batch"):
        made = sum(len(batch) for batch in batches if batch.start in kept.batches)
        if made:
            report(Progress(made, total, "images", message=f"going on after {made:,} images"))

        def done(count: int, _: int) -> None:
            if signalled():
                raise Stopped(
                    f"{point.name}: stopped; the next run goes on after {made:,} of {total:,} images", signalled()
                )
            report(Progress(made + count, total, "images"))

        for batch in batches:
            if batch.start in kept.batches:
                evaluations = kept.batches[batch.start]
                continue
            try:
                _, evaluations = generate(
                    denoiser,
                    (channels, height, width),
                    batch,
                    seed=params.seed,
                    batch=len(batch),
                    steps=point.steps,
                    settings=row.options(),
                    device=device,
                    labels=None if labels is None else labels[batch.start : batch.stop],
                    done=done,
                    into=images[batch.start : batch.stop],
                )
            except ValueError as error:
                raise InputError(f"{point.name}: {error}") from None
            kept.keep(batch, evaluations)
            made += len(batch)
        drawn_with = {"seed": params.seed, "row": row.options(), "sampling": settings.model_dump(mode="json")}
        store.write_samples(path, images, evaluations, about["weights_sha256"], labels, drawn_with)
        store.write_png(path.with_suffix(".png"), store.preview(images))
    kept.remove()
    return evaluations
