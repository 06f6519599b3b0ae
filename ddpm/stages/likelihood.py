"""`likelihood SCHEDULE`: measures a network's bits per dimension on train and test images, and its rate-distortion curve."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ddpm.diffusion.bound import Bound, mean_and_error, variational_bound
from ddpm.errors import InputError
from ddpm.files import checkpoint, models, paths, records
from ddpm.files.dataset import read_dataset, spread
from ddpm.files.params import Params
from ddpm.runtime.device import find_device, memory_errors
from ddpm.runtime.progress import Progress, Report, silent


def likelihood(params: Params, schedule: str, root: Path = Path(), report: Report = silent) -> dict[str, Any]:
    """Measures the variational bound of a model. Writes metrics/likelihood/SCHEDULE.json and SCHEDULE.csv.

    The JSON file has a section for each split of two or more images: `bits_per_dim` and its three parts, each with a standard
    error. The parts are `prior` (L_T), `decoder` (L_0) and `kl` (the sum of the other terms). The CSV file holds the
    rate-distortion curve of the test split, or of the train split if there are no test images.

    Args:
        params: the parameters of the run.
        schedule: the name of a row of `schedules` in params.yaml with a trained model.
        root: the top of the checkout.
        report: called with the progress.

    Returns:
        The content of the JSON file.

    Raises:
        InputError: an input is missing or does not fit the model, or the bound is not finite.
    """
    settings = params.likelihood
    torch.set_num_threads(settings.threads)
    checkpoint.require_trained(params, schedule, root)
    models.read_trained(root, schedule)
    denoiser, model = checkpoint.load(
        root / paths.model_dir(schedule), find_device(params.compute.device), settings.clip
    )
    dataset = read_dataset(root)
    if list(dataset.train.shape[1:]) != model.data.shape:
        raise InputError(
            f"models/{schedule} takes images of shape {model.data.shape}, but the dataset holds images of shape "
            f"{list(dataset.train.shape[1:])}; train {schedule} again"
        )
    labels = {"train": dataset.train_labels, "test": dataset.test_labels} if model.network.classes else {}
    splits = {"train": spread(dataset.train, settings.images), "test": spread(dataset.test, settings.images)}
    splits = {name: images for name, images in splits.items() if len(images) > 1}
    if not splits:
        raise InputError("dataset: neither train nor test has the two images that a standard error needs; add images")
    times = settings.times or denoiser.schedule.T
    total, done = sum(len(images) for images in splits.values()) * times, 0

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        report(Progress(done, total, "evaluations"))

    bounds = {}
    for name, images in splits.items():
        known = labels.get(name)
        if len(images) < settings.images:
            message = f"measuring all {len(images)} {name} images, fewer than likelihood.images = {settings.images}"
            report(Progress(done, total, "evaluations", message=message))
        try:
            with memory_errors(f"likelihood {schedule}", "lower likelihood.batch"):
                bounds[name] = variational_bound(
                    denoiser,
                    torch.from_numpy(images),
                    labels=None if known is None else torch.from_numpy(spread(known, settings.images)),
                    seed=params.seed,
                    times=times,
                    batch=settings.batch,
                    variance=settings.variance,
                    device=find_device(params.compute.device),
                    done=count,
                )
        except ValueError as error:
            raise InputError(f"likelihood: {error}") from None
    scores = {
        "schedule": schedule,
        "model": model.weights_sha256,
        "dataset": dataset.record.sha256,
        "seed": params.seed,
        "variance": "learned" if model.network.learned_variance else settings.variance,
        "clip": settings.clip,
        "times": times,
        **{name: split_scores(bound) for name, bound in bounds.items()},
    }
    table = root / paths.likelihood_curve_file(schedule)
    records.write_csv(table, curve(bounds.get("test") or bounds["train"]))
    return records.write_record(root / paths.likelihood_file(schedule), scores, (table,))


def split_scores(bound: Bound) -> dict[str, Any]:
    """Returns the mean of each part of the bound over the images, in bits/dim, with its standard error."""
    parts = {"bits_per_dim": bound.total, "prior": bound.prior, "kl": bound.kl, "decoder": bound.decoder}
    scores: dict[str, Any] = {}
    for name, values in parts.items():
        scores[name], scores[f"{name}_error"] = (_rounded(value) for value in mean_and_error(values))
    return {**scores, "images": len(bound.prior)}


def curve(bound: Bound) -> list[dict[str, Any]]:
    """Returns the rate-distortion curve: a row for each stratum of timesteps, from noise to image.

    The columns:

    - time: the middle of the stratum.
    - times: the number of timesteps in the stratum.
    - rate: bits/dim spent up to `time`.
    - distortion: RMSE of x0_hat on the scale 0 ... 255.
    - term: bits/dim of the stratum.
    """
    terms, rates, distortions = bound.terms.mean(0).tolist(), bound.rate.tolist(), bound.distortion.tolist()
    rows = [
        {
            "time": (stratum.start + stratum.stop - 1) // 2,
            "times": len(stratum),
            "rate": _rounded(rate),
            "distortion": _rounded(distortion),
            "term": _rounded(term),
        }
        for stratum, rate, distortion, term in zip(bound.strata, rates, distortions, terms, strict=True)
    ]
    return rows[::-1]


def _rounded(value: float) -> float:
    """Rounds to 6 digits, since the last bits depend on the processor. Raises InputError if the value is not finite."""
    if not math.isfinite(value):
        raise InputError(
            f"likelihood: the bound is {value}, because the network predicts values that are very large or not finite; set"
            " likelihood.clip, or train the model again"
        )
    return float(f"{value:.6g}")
