"""`sample POINT`: draws images from a trained network, with the sampler and the number of steps that the point names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from ddpm.errors import InputError
from ddpm.files import arrays, checkpoint, models, paths, samples
from ddpm.files.models import ModelRecord
from ddpm.files.params import Params
from ddpm.networks.network import NETWORKS
from ddpm.parameters import Point, as_json
from ddpm.provenance import code
from ddpm.runtime import compiling, drawing
from ddpm.runtime.device import find_device, memory_errors
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.runtime.stopping import Stopped, deferred


def sampling_key(params: Params, point: Point, model: ModelRecord, device: torch.device) -> str:
    """Hashes everything that decides the images of a point, including the code. A cached batch with another key is not reused."""
    settings = [params.seed, params.samplers[point.sampler].options(), as_json(params.sampling)]
    decisive = [
        model.content,
        settings,
        point.steps,
        device.type,
        code.digest(__name__, NETWORKS.module(model.network.kind)),
    ]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def sample_point(params: Params, point: Point, root: Path = Path(), report: Report = silent) -> int:
    """Draws the images of a point. Writes samples/POINT.npz and samples/POINT.png.

    Finished batches stay in the cache until both files are written, so the next run resumes a stopped run.

    Args:
        params: the parameters of the run.
        point: the schedule, sampler and number of steps.
        root: the top of the checkout.
        report: called with the progress.

    Returns:
        The number of network evaluations per image.

    Raises:
        InputError: the model is missing or damaged, or the sampler does not fit the model.
        Stopped: a signal came.
    """
    device = find_device(params.compute.device)
    params = compiling.resolved(params, "sampling", device, root, report)
    settings = params.sampling
    torch.set_num_threads(settings.threads)
    checkpoint.require_trained(params, point.schedule, root)
    models.read_trained(root, point.schedule)
    row = drawing.sampler_row(params, point.sampler)
    denoiser, model = drawing.prepared_denoiser(
        root / paths.model_dir(point.schedule),
        device,
        settings.clip,
        settings.precision,
        settings.compile is True,
        row.ema,
    )
    drawing.check_point(
        params, point, denoiser.schedule, model.network.learned_variance, guidable=model.network.guidable
    )
    try:
        drawing.check_fitted(row.options(), model, row.ema)
    except ValueError as error:
        raise InputError(f"samplers.{point.sampler}.{error}") from None
    path, total = root / paths.samples_file(point), settings.images
    channels, height, width = model.data.shape
    labels = drawing.class_labels(model, total)
    folder = root / paths.CACHE / "sampling" / point.name
    kept = samples.KeptImages(folder, sampling_key(params, point, model, device), (total, channels, height, width))
    batches = [range(start, min(start + settings.batch, total)) for start in range(0, total, settings.batch)]
    evaluations = 0
    with kept as images, deferred() as signalled, memory_errors(point.name, "lower sampling.batch"):
        made = sum(len(batch) for batch in batches if batch.start in kept.batches)
        if made:
            report(Progress(made, total, "images", message=f"resuming after {made:,} images"))

        def done(count: int, _: int) -> None:
            if signalled():
                raise Stopped(
                    f"{point.name}: stopped by a signal; the next run resumes after {made:,} of {total:,} images",
                    signalled(),
                )
            report(Progress(made + count, total, "images"))

        for batch in batches:
            if batch.start in kept.batches:
                evaluations = kept.batches[batch.start]
                continue
            try:
                _, evaluations = drawing.draw(
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
            # protects: tests/stages/test_faults.py::test_sampling_goes_on_where_it_was
            kept.keep(batch, evaluations)
            made += len(batch)
        drawn_with = {"seed": params.seed, "row": row.options(), "sampling": as_json(settings)}
        samples.write_samples(path, images, evaluations, model.weights_sha256, labels, drawn_with)
        arrays.write_png(path.with_suffix(".png"), arrays.preview(images))
    kept.remove()
    return evaluations
