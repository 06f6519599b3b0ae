"""`evaluate POINT`: samples against the training images -> the scores, how sure they are, and what they were computed from.

The protocol, whatever the point: the first `evaluation.images` samples, as uint8, exactly as saved, against as many
images of the train split, drawn without replacement in an order that never changes (`params.seed` has no say).
One pass of Inception features gives every score. fid_low ... fid_high and kid_low ... kid_high are about the samples: where the
score of other samples of the same model, as many and against the same reference, has its mean.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from ddpm.errors import InputError
from ddpm.files import arrays, atomic, paths, records
from ddpm.files.dataset import read_dataset
from ddpm.files.params import Params, Point
from ddpm.files.samples import read_samples
from ddpm.files.scores import write_influence
from ddpm.provenance import code
from ddpm.runtime.device import find_device, memory_errors
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.scores import fidelity, inception, intervals
from ddpm.scores.copying import copying

FEWEST = fidelity.NEIGHBOURS + 1  # images that can be scored
SPLITS = 10  # of the Inception Score
KID_SUBSET_SIZE = 1000  # at most half of a set, or the subsets would all be alike


def evaluate(params: Params, point: Point, root: Path = Path(), report: Report = silent) -> dict[str, Any]:
    """Writes metrics/POINT.json and POINT.influence.npy and returns the scores. Raises InputError."""
    with memory_errors(f"evaluate {point.name}", "lower evaluation.batch, or evaluation.images"):
        scores, influence = _evaluate(params, point, root, report)
    values = root / paths.influence_file(point)
    write_influence(values, influence)
    return records.write_record(root / paths.metrics_file(point), scores, (values,))


def _evaluate(params: Params, point: Point, root: Path, report: Report) -> tuple[dict[str, Any], fidelity.Features]:
    """-> the scores, and the influence values of FID."""
    protocol = params.evaluation
    torch.set_num_threads(protocol.threads)
    path = root / paths.samples_file(point)
    dataset = read_dataset(root)
    found = read_samples(path, dataset)
    samples, real = found.images[: protocol.images], reference_images(dataset.train, protocol.images)
    if min(len(samples), len(real)) < FEWEST:
        raise InputError(f"{path}: {len(samples)} samples and {len(real)} reference images; a score takes four or more")
    cache = root / paths.CACHE / "inception"
    try:
        with atomic.disk_full_is_one_line(cache):
            extractor = inception.load(protocol.layer, cache, find_device(params.compute.device))
    except inception.WeightsError as error:
        raise InputError(str(error)) from None

    total = len(real) + len(samples)

    def done(count: int, message: str = "") -> None:
        report(Progress(count, total, "images", message=message))

    real_features, real_statistics = _reference(extractor, real, protocol.batch, root / paths.CACHE / "features", done)
    few = len(samples) < protocol.images
    done(len(real), f"{len(samples)} samples, not {protocol.images}: there are no more" if few else "")
    fake_features = inception.extract(extractor, samples, protocol.batch, lambda count: done(len(real) + count))
    scores, influence = _scores(extractor, fake_features, real_features, real_statistics)
    scores |= {
        "point": point.name,
        "model": found.model,
        "evaluations": found.evaluations,
        "images": len(samples),
        "reference_images": len(real),
        "layer": protocol.layer,
        "evaluation": protocol.model_dump(mode="json"),
        "reference": dataset.record.sha256,
        "extractor": inception.EXTRACTOR,
        "extractor_sha256": extractor.sha256,
        "samples": found.sha256,
    }
    return scores, influence


def _scores(
    extractor: inception.Inception, fake: fidelity.Features, real: fidelity.Features, reference: fidelity.Statistics
) -> tuple[dict[str, Any], fidelity.Features]:
    """-> the scores, and the influence values of FID."""
    found = fidelity.jackknife(fake, reference, extractor.device)
    influence = found.influence.astype(np.float32)  # as kept, so that the interval follows from the file
    low, high = intervals.Estimate(found.fid, intervals.standard_error(influence)).interval()
    size = max(2, min(KID_SUBSET_SIZE, len(fake) // 2, len(real) // 2))
    kid, kid_std = fidelity.kid(fake, real, subset_size=size, device=extractor.device)
    luck = intervals.standard_error(fidelity.kid_influence(fake, real, extractor.device))
    drawn = kid_std / math.sqrt(fidelity.SUBSETS)  # by which other subsets would move the mean
    kid_low, kid_high = intervals.Estimate(kid, math.hypot(luck, drawn)).interval()
    precision, recall = fidelity.precision_recall(fake, real, device=extractor.device)
    copied = copying(*fidelity.nearest_distances(fake, real, extractor.device))
    scores = {
        "fid": found.fid,
        "fid_low": max(0.0, low),
        "fid_high": high,
        "confidence": intervals.CONFIDENCE,
        "kid": kid,
        "kid_low": kid_low,
        "kid_high": kid_high,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
        "copying": copied.closer,
        "copying_z": copied.z,
    }
    if len(fake) > extractor.layer:  # with fewer images the bias is not proportional to 1/N
        scores["fid_infinity"] = found.fid - found.bias
    if extractor.classifier is not None and len(fake) >= SPLITS:
        logits = fake @ extractor.classifier.T
        scores["inception_score"], scores["inception_score_std"] = fidelity.inception_score(logits, SPLITS)
    return {name: _rounded(value) for name, value in scores.items()}, influence


def reference_images(train: arrays.Images, count: int) -> arrays.Images:
    """`count` images of a split, or all, if it has no more: always the same ones, and more include fewer."""
    if count >= len(train):
        return train
    chosen = np.random.RandomState(0).permutation(len(train))[:count]
    return train[np.sort(chosen)]


def _reference(
    extractor: inception.Inception, images: arrays.Images, batch: int, folder: Path, done: Callable[..., None]
) -> tuple[fidelity.Features, fidelity.Statistics]:
    """Features and statistics of the reference images, computed once for their content, the layer, the weights and the code."""
    decisive = (extractor.sha256, extractor.device.type, images.shape, code.digest(__name__))
    content = hashlib.sha256(" ".join(map(str, decisive)).encode())
    content.update(np.ascontiguousarray(images).data)
    path = folder / f"{inception.EXTRACTOR}-{extractor.layer}-{content.hexdigest()}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        done(0, "another process computes the reference features: waiting for it")
        held = lock.acquire()
    with held:
        try:
            kept = arrays.read_arrays(path, path.stem)
            return kept["features"], fidelity.Statistics(kept["mean"], kept["covariance"])
        except (InputError, KeyError):
            done(0, f"reference features: {len(images)} images, once for this dataset")
        extracted = inception.extract(extractor, images, batch, done)
        statistics = fidelity.statistics(extracted, extractor.device)
        found = {"features": extracted, "mean": statistics.mean, "covariance": statistics.covariance}
        arrays.write_arrays(path, path.stem, **found)
        return extracted, statistics


def _rounded(value: float) -> float:
    """To 8 digits: the last bits are the processor's, not the samples'."""
    return float(f"{value:.8g}")
