"""Measures Inception features, FID and its interval, beside torch-fidelity and scipy.

`python -m bench.scores POINT` compares the FID of a point with other FIDs (see `main`).
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.harness import TINY, Times, alternate, figure, ratios
from ddpm.files import paths
from ddpm.files.dataset import read_dataset, spread
from ddpm.files.params import Params
from ddpm.files.samples import read_samples
from ddpm.parameters import Point
from ddpm.scores import features, fidelity, inception
from ddpm.scores.features import extract
from ddpm.scores.intervals import Estimate, difference, standard_error
from ddpm.stages.evaluate import reference_images
from ddpm.stages.prepare import prepare
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train

Images = NDArray[np.uint8]

SETS, IMAGES = 3, 150  # number of sample sets; number of images in each set and in the reference
ROWS, DIMENSIONS = (1_000, 128) if TINY else (50_000, 2048)
CACHE = Path(".cache") / "inception"
RECIPE = Path(__file__).parents[1] / "recipes" / "mnist.yaml"
POINT = Point(schedule="cosine", sampler="dpmpp_2m", steps=25)
DRAWN, LAYER = (50, 64) if TINY else (1000, 192)
EXACT = "float32"
# The precision and compilation with which the same weights are sampled.
SETTINGS = {
    EXACT: ("float32", False),
    "float32, compiled": ("float32", True),
    "bfloat16": ("bfloat16", False),
    "bfloat16, compiled": ("bfloat16", True),
}
GOAL = 2.0  # per cent of FID
# For this side, the benchmark itself changes the memory format of torch-fidelity's network.
BEST, BEST_BATCH = "torch-fidelity in channels_last and small batches", 8


def _pictures(count: int, seed: int) -> np.ndarray:
    """Makes smooth random images: uint8 [count, 3, 32, 32]."""
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(small, (32, 32), mode="bicubic").clamp(0, 1) * 255).byte().numpy()


class _Set(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def fid_sets(device: str) -> dict[str, Any]:
    """Measures the FID of several sample sets against one reference."""
    import torch_fidelity

    images = IMAGES * (50 if device == "cuda" else 1) // (10 if TINY else 1)
    reference, *sets = (_pictures(images, seed) for seed in range(SETS + 1))
    extractor = inception.load(2048, CACHE, device)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        state = inception._from_wheel(CACHE)
        assert state is not None
        torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, weights)
        # computed before the measurement, as in a stage's cache
        kept = fidelity.statistics(extract(extractor, reference))

        def ours() -> list[float]:
            began = time.perf_counter()
            extracted = [extract(extractor, samples) for samples in sets]
            seconds.append(time.perf_counter() - began)
            again = fidelity.Statistics(
                kept.mean, kept.covariance
            )  # a new object, so that each call computes the reference's root once
            return [fidelity.jackknife(part, again, device).fid for part in extracted]

        def theirs() -> list[float]:
            return [
                torch_fidelity.calculate_metrics(
                    input1=_Set(samples),
                    input2=_Set(reference),
                    fid=True,
                    cuda=device == "cuda",
                    verbose=False,
                    feature_extractor_weights_path=str(weights),
                    cache=False,
                )["frechet_inception_distance"]
                for samples in sets
            ]

        times, given = alternate({"ours": ours, "torch-fidelity": theirs}, 2, warmups=0, device=device)
        extraction = _extraction(extractor, weights, sets[0], device)
    # On a GPU, the peer's convolutions use TF32 by default, which changes FID by 1e-3. Ours use float32.
    np.testing.assert_allclose(given["ours"], given["torch-fidelity"], rtol=5e-3 if device == "cuda" else 1e-4)
    over = [100 * (1 - part / whole) for whole, part in zip(times["ours"]["wall"], seconds, strict=True)]
    return {
        "work": f"FID and its interval, {SETS} sets of {images} images against one reference of as many, layer 2048",
        "per_call": f"all {SETS} sets; ours starts with the reference's statistics (a stage caches them)",
        "checks": {"FID, ours": given["ours"], "FID, torch-fidelity": given["torch-fidelity"]},
        "times": times | {f"{side}: features of one set": kinds for side, kinds in extraction.items()},
        "figures": [
            figure("share of our time spent outside of the Inception network", over, "%", 5.0, most=True),
            *ratios(times, "torch-fidelity"),
            *ratios(extraction, "torch-fidelity", 1.6, name="features alone: torch-fidelity / ours"),
            *ratios(extraction, BEST, name=f"features alone: {BEST} / ours"),
        ],
    }


def _extraction(extractor: inception.Inception, weights: Path, images: Images, device: str) -> Times:
    """Times feature extraction alone: ours, and torch-fidelity's by default and in its fastest settings on two CPU cores."""
    from torch_fidelity import FeatureExtractorInceptionV3

    plain, best = (
        FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(weights)).to(device)
        for _ in range(2)
    )
    best.to(memory_format=torch.channels_last)

    def theirs(network: Any, batch: int) -> NDArray[np.float32]:
        with torch.no_grad():
            parts = torch.from_numpy(images).to(device).split(batch)
            return torch.cat([network(part)[0] for part in parts]).cpu().numpy()

    sides = {
        "ours": lambda: extract(extractor, images),
        "torch-fidelity": lambda: theirs(plain, 64),  # torch-fidelity's default batch
        BEST: lambda: theirs(best, BEST_BATCH if device == "cpu" else 64),
    }
    times, given = alternate(sides, 3, warmups=0, device=device)
    for found in list(given.values())[1:]:
        assert np.linalg.norm(given["ours"] - found) < (5e-6 if device == "cpu" else 5e-3) * np.linalg.norm(found)
    return times


def statistics(device: str) -> dict[str, Any]:
    """Measures FID and its interval from given features.

    pytorch-fid computes the same as scipy's sqrtm of the product of two float64 covariances. Both peers have no setting for
    the type, and use all cores.
    """
    import scipy.linalg
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    random = np.random.default_rng(0)
    mix = random.standard_normal((DIMENSIONS, DIMENSIONS), np.float32) / DIMENSIONS**0.5
    scale = np.linspace(1, 0.01, DIMENSIONS, dtype=np.float32)
    real, fake = (random.standard_normal((ROWS, DIMENSIONS), np.float32) * scale @ mix + shift for shift in (0, 0.02))
    reference = fidelity.statistics(real)  # computed before the measurement, like the peers' reference
    kept = fid_features_to_statistics(torch.from_numpy(real))

    def ours() -> float:
        again = fidelity.Statistics(
            reference.mean, reference.covariance
        )  # a new object, so that computing its root is part of the work
        return fidelity.jackknife(fake, again, device).fid

    def without_interval() -> float:
        again = fidelity.Statistics(reference.mean, reference.covariance)
        return fidelity.fid(fidelity.statistics(fake), again)

    def torch_fidelity() -> float:
        found = fid_features_to_statistics(torch.from_numpy(fake))
        return float(fid_statistics_to_metric(found, kept, False)["frechet_inception_distance"])

    def scipy_sqrtm() -> float:
        mean, covariance = fake.mean(0, dtype=np.float64), np.cov(fake, rowvar=False)
        root = scipy.linalg.sqrtm(covariance @ kept["sigma"]).real
        shift = mean - kept["mu"]
        return float(shift @ shift + np.trace(covariance) + np.trace(kept["sigma"]) - 2 * np.trace(root))

    sides = {"ours": ours, "without the interval": without_interval}
    sides |= {"torch-fidelity": torch_fidelity, "scipy sqrtm": scipy_sqrtm}
    times, given = alternate(sides, 3, warmups=0, device=device)
    for peer in ("without the interval", "torch-fidelity", "scipy sqrtm"):
        np.testing.assert_allclose(given["ours"], given[peer], rtol=1e-6)
    return {
        "work": f"FID and its interval from {ROWS:,} x {DIMENSIONS} features (peers: FID alone)",
        "per_call": "statistics of the samples, and their distance to known statistics of a reference",
        "checks": {f"FID, {side}": value for side, value in given.items()},
        "times": times,
        "figures": [
            *ratios(times, "torch-fidelity", 1.0, name="torch-fidelity (FID alone) / ours with the interval"),
            *ratios(times, "torch-fidelity", 1.5, "without the interval", "torch-fidelity / ours without the interval"),
            *ratios(times, "scipy sqrtm"),
            *ratios(times, "scipy sqrtm", ours="without the interval", name="scipy sqrtm / ours without the interval"),
            *ratios(
                {
                    **times,
                    "20 resamples": {kind: [20 * x for x in times["torch-fidelity"][kind]] for kind in ("wall", "cpu")},
                },
                "20 resamples",
                name="an interval by 20 resamples with torch-fidelity (20 times its time) / ours",
            ),
        ],
    }


def rounding(device: str) -> dict[str, Any]:
    """Trains the MNIST recipe, samples the model in each of SETTINGS, and compares the results with plain float32.

    A second model is trained and sampled in compiled bfloat16. A third model is trained in float32 from another seed, to show
    how much two trainings differ anyway.
    """
    params = Params.load(RECIPE)
    exactly: dict[str, Any] = {"precision": "float32", "compile": True}
    threads: dict[str, Any] = {"threads": torch.get_num_threads()}
    place: dict[str, Any] = {"device": device}
    base = params.model_copy(
        update={
            "training": replace(params.training, steps=20 if TINY else params.training.steps, **exactly, **threads),
            "sampling": replace(params.sampling, images=DRAWN, batch=min(DRAWN, 250), **threads),
            "compute": replace(params.compute, **place),
        }
    )
    extractor = inception.load(LAYER, CACHE, device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(base, root)
        real = reference_images(read_dataset(root).train, DRAWN)
        reference = fidelity.statistics(extract(extractor, real))

        def drawn(params: Params) -> tuple[Images, Estimate]:
            sample_point(params, POINT, root)
            images = np.array(read_samples(root / paths.samples_file(POINT)).images)
            found = fidelity.jackknife(extract(extractor, images), reference)
            return images, Estimate(found.fid, standard_error(found.influence), found.influence)

        def in_setting(precision: str, compiled: bool, *sections: str) -> Params:
            setting: dict[str, Any] = {"precision": precision, "compile": compiled}
            return base.model_copy(update={name: replace(getattr(base, name), **setting) for name in sections})

        def trained(precision: str, compiled: bool, seed: int) -> tuple[Images, Estimate]:
            rows = {POINT.schedule: replace(base.schedules[POINT.schedule], seed=seed)}
            here = in_setting(precision, compiled, "training", "sampling").model_copy(update={"schedules": rows})
            train(here, POINT.schedule, root)
            return drawn(here)

        trained("float32", True, 0)
        found = {}
        for name, (precision, compiled) in SETTINGS.items():
            found[name] = drawn(in_setting(precision, compiled, "sampling"))
        others = {
            "trained and sampled in bfloat16, compiled": trained("bfloat16", True, 0)[1],
            "trained from another seed": trained("float32", True, 1)[1],
        }
    exact_images, exact = found.pop(EXACT)
    figures, checks = [], dict[str, Any]({f"FID, {EXACT}": exact.value, "its standard error": exact.error})
    for name, (images, score) in found.items():
        apart = difference(score, exact)
        share = [100 * end / exact.value for end in (apart.value, *apart.interval())]
        figures.append(
            {
                **figure(f"FID in {name}, against plain float32", share, "%"),
                "value": share[0],
                "goal": GOAL,
                "at": "within",
                "met": max(map(abs, share)) <= GOAL,
            }
        )
        gap = np.abs(images.astype(int) - exact_images)
        checks[f"mean and largest difference of pixels (of 255), {name}"] = [float(gap.mean()), int(gap.max())]
    checks |= {f"FID, {name}": score.value for name, score in others.items()}
    return {
        "work": f"{DRAWN} images of {POINT.name} from one model of the MNIST recipe, FID at layer {LAYER}",
        "per_call": "no times; the brackets hold the 95% interval of the paired difference",
        "checks": checks,
        "times": {},
        "figures": figures,
    }


def _gaussian(images: Images, count: int, random: np.random.Generator) -> Images:
    """Draws images from the Gaussian with the mean and the covariance of all pixels of `images`."""
    x = np.asarray(images).reshape(len(images), -1).astype(np.float32)
    mean = x.mean(0)
    weights = random.standard_normal((count, len(x)), np.float32) / np.float32(np.sqrt(len(x) - 1))
    drawn = weights @ (x - mean) + mean  # a sum of centred images with independent weights has their covariance
    return drawn.round().clip(0, 255).astype(np.uint8).reshape(count, *images.shape[1:])


def main(point: str) -> None:
    """Prints the FID of a point beside the FIDs of noise, of a Gaussian fitted to the pixels, and of held-out images.

    Reads the outputs of `dvc repro` in this checkout. All sets have the same number of images. They are compared with the
    training images, by the extractor and layer of params.yaml.
    """
    params, dataset = Params.load(), read_dataset()
    samples = read_samples(paths.samples_file(Point.parse(point))).images
    count, random = min(len(samples), len(dataset.test)), np.random.default_rng(0)
    sets = {
        "noise": random.integers(0, 256, (count, *dataset.train.shape[1:]), np.uint8),
        "Gaussian": _gaussian(dataset.train, count, random),
        point: samples[:count],
        "held-out images": spread(dataset.test, count),
    }
    chosen = params.evaluation
    extractor = features.load(chosen.extractor, chosen.layer, CACHE)
    reference = fidelity.statistics(extract(extractor, dataset.train, chosen.batch))
    print(f"{count} images each, {len(dataset.train):,} training images, {chosen.extractor}, layer {chosen.layer}")
    for name, images in sets.items():
        found = fidelity.jackknife(extract(extractor, images, chosen.batch), reference)
        print(f"{name:20} FID {found.fid:10.4g} ± {1.96 * standard_error(found.influence):.2g}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
