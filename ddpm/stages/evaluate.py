"""`evaluate POINT`: scores the samples of a point of the sweep against training images, with confidence intervals.

A point is a schedule, a sampler and a number of steps. All points are scored in the same way: the first `evaluation.images`
samples are compared with the same number of training images, the reference images. If there are fewer samples or training images,
all of them are used. The reference images are chosen at random with a fixed seed, independent of `params.seed`.

One pass of `evaluation.extractor` over these images computes the features of all metrics except the judges. A judge is a metric
with an extractor or a layer of its own. Each judge in `evaluation.judges` takes one more pass over the same images.

NAME_low and NAME_high are the ends of the confidence interval of the score NAME. The interval covers the mean score over sample
sets of the same model and size, against the same reference images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import arrays, atomic, paths
from ddpm.files.dataset import read_dataset
from ddpm.files.params import Params
from ddpm.files.samples import read_samples
from ddpm.files.scores import Scores, extractor, write_scores
from ddpm.parameters import Point
from ddpm.provenance import code
from ddpm.runtime import locks
from ddpm.runtime.device import find_device, memory_errors
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.scores import fidelity
from ddpm.scores.extractors import Extractor, judges
from ddpm.scores.features import Features, extract, load
from ddpm.scores.intervals import CONFIDENCE, Estimate
from ddpm.scores.metric import Metric
from ddpm.scores.metrics import METRICS, RANKING

FEWEST = fidelity.NEIGHBOURS + 1  # the fewest images that can be scored


def evaluate(params: Params, point: Point, root: Path = Path(), report: Report = silent) -> Scores:
    """Scores the samples of a point. Writes metrics/POINT.json and metrics/POINT.influence.npy.

    Args:
        params: the parameters of the run.
        point: the schedule, sampler and number of steps; samples/POINT.npz must exist.
        root: the top of the checkout.
        report: called with the progress.

    Returns:
        The scores, as in metrics/POINT.json.

    Raises:
        InputError: an input is missing, damaged or too small.
    """
    with memory_errors(f"evaluate {point.name}", "lower evaluation.batch or evaluation.images"):
        scores, influence = _evaluate(params, point, root, report)
    return write_scores(root, point, scores, influence)


def _evaluate(params: Params, point: Point, root: Path, report: Report) -> tuple[Scores, NDArray[np.floating]]:
    """Computes the scores of a point, and the influence values of its N samples.

    The influence values are [N] for the metric that ranks points, or [1 + J, N] with J judges.
    """
    protocol = params.evaluation
    torch.set_num_threads(protocol.threads)
    path = root / paths.samples_file(point)
    dataset = read_dataset(root)
    sample_set = read_samples(path, dataset)
    samples, real = sample_set.images[: protocol.images], reference_images(dataset.train, protocol.images)
    if min(len(samples), len(real)) < FEWEST:
        raise InputError(
            f"{path}: {len(samples)} samples and {len(real)} reference images, but a score needs at least {FEWEST} of each;"
            " raise sampling.images or add training images"
        )
    message = ""
    if len(samples) < protocol.images:
        message = f"scoring all {len(samples)} samples, fewer than evaluation.images = {protocol.images}"
    images_per_pass = len(real) + len(samples)

    def feature_sets(row: Extractor, layer: int, before: int) -> tuple[Features, fidelity.Sets]:
        """Loads an extractor and computes the features of the samples and of the reference images.

        before: the number of images that earlier extractors have processed, for the progress.
        """

        def done(count: int, message: str = "") -> None:
            total = images_per_pass * (1 + len(protocol.judges))
            report(Progress(before + count, total, "images", message=message))

        cache = root / paths.CACHE / row.name
        with atomic.disk_full_is_one_line(cache):
            loaded = load(row.name, layer, cache, find_device(params.compute.device))
        folder = root / paths.CACHE / "features"
        reference = _reference(loaded, real, protocol.batch, folder, code.digest(__name__, row.module), done)
        done(len(real), message)
        fake = extract(loaded, samples, protocol.batch, lambda count: done(len(real) + count))
        return loaded, fidelity.Sets(fake, *reference, loaded.logits(fake), loaded.device)

    loaded, sets = feature_sets(extractor(protocol.extractor), protocol.layer, 0)
    values: dict[str, float] = {}
    for metric in METRICS.values():
        values |= {} if metric.judge else metric.values(sets)
    influence, judged = [_influence(RANKING, sets)], {}
    for index, name in enumerate(protocol.judges, 1):
        row, metric = judges()[name], METRICS[name]
        judge, sets = feature_sets(row, row.judges[name], index * images_per_pass)
        values |= metric.values(sets)
        influence.append(_influence(metric, sets))
        judged[name] = {"extractor": judge.name, "layer": judge.layer, "extractor_sha256": judge.sha256}
    scores = Scores(
        point=point.name,
        evaluations=sample_set.evaluations,
        images=len(samples),
        reference_images=len(real),
        layer=protocol.layer,
        reference=dataset.record.sha256,
        extractor_sha256=loaded.sha256,
        confidence=CONFIDENCE,
        values={name: _rounded(value) for name, value in values.items()},
        samples=sample_set.sha256,
        model=sample_set.model,
        features=loaded.name,
        evaluation=protocol.recorded(),
        judges=judged,
    )
    return scores, np.stack(influence) if judged else influence[0]


def _influence(metric: Metric, sets: fidelity.Sets) -> NDArray[np.floating]:
    found = metric.measure(sets)
    if not isinstance(found, Estimate) or found.influence is None:
        raise TypeError(f"{metric.name} compares points, so its row in METRICS must return influence values")
    return found.influence


def reference_images(train: arrays.Images, count: int) -> arrays.Images:
    """Returns `count` random images of the train split, or all if there are fewer. A larger count only adds images."""
    if count >= len(train):
        return train
    chosen = np.random.RandomState(0).permutation(len(train))[:count]
    return train[np.sort(chosen)]


def _reference(
    extractor: Features, images: arrays.Images, batch: int, folder: Path, version: str, done: Callable[..., None]
) -> tuple[fidelity.Features, fidelity.Statistics]:
    """Returns the features and statistics of the reference images. Reads them from the cache if an earlier run stored them.

    Args:
        extractor: the loaded extractor.
        images: the reference images, uint8 N,C,H,W.
        batch: images per call of the extractor.
        folder: the cache folder. A file's name contains a hash of the images, weights, device and code.
        version: a digest of the code that computes the features.
        done: called with the number of finished images and a message.
    """
    decisive = (extractor.sha256, extractor.device.type, images.shape, version)
    content = hashlib.sha256(" ".join(map(str, decisive)).encode())
    content.update(np.ascontiguousarray(images).data)
    path = folder / f"{extractor.name}-{extractor.layer}-{content.hexdigest()}.npz"
    folder.mkdir(parents=True, exist_ok=True)

    def waiting() -> None:
        done(0, "waiting for another process that is computing the reference features")

    with locks.held(path.with_suffix(".lock"), waiting=waiting):
        try:
            kept = arrays.read_arrays(path, path.stem)
            return kept["features"], fidelity.Statistics(kept["mean"], kept["covariance"])
        except (InputError, KeyError):
            done(0, f"computing the features of {len(images)} reference images; later points reuse them")
        extracted = extract(extractor, images, batch, done)
        statistics = fidelity.statistics(extracted, extractor.device)
        found = {"features": extracted, "mean": statistics.mean, "covariance": statistics.covariance}
        arrays.write_arrays(path, path.stem, **found)
        return extracted, statistics


def _rounded(value: float) -> float:
    """Rounds to 8 digits, since the last bits depend on the processor."""
    return float(f"{value:.8g}")
