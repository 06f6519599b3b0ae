"""Measures Inception features, FID and its interval, beside torch-fidelity and scipy."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import TINY, alternate, figure, ratios
from ddpm.scores import fidelity, inception
from ddpm.scores.features import extract

SETS, IMAGES = 3, 150  # sample sets; images in each set and in the reference
ROWS, DIMENSIONS = (1_000, 128) if TINY else (50_000, 2048)
CACHE = Path(".cache") / "inception"


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
        kept = fidelity.statistics(extract(extractor, reference))  # computed before, as in a stage's cache

        def ours() -> list[float]:
            began = time.perf_counter()
            extracted = [extract(extractor, samples) for samples in sets]
            seconds.append(time.perf_counter() - began)
            again = fidelity.Statistics(
                kept.mean, kept.covariance
            )  # a new object, so the reference's root is computed once in each call
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
    # On a GPU the peer's convolutions use TF32, its default, which changes FID by 1e-3. Ours use float32.
    np.testing.assert_allclose(given["ours"], given["torch-fidelity"], rtol=5e-3 if device == "cuda" else 1e-4)
    over = [100 * (whole / part - 1) for whole, part in zip(times["ours"]["wall"], seconds, strict=True)]
    return {
        "work": f"FID and its interval, {SETS} sets of {images} images against one reference of as many, layer 2048",
        "per_call": f"all {SETS} sets; ours starts with the reference's statistics (a stage caches them)",
        "checks": {"FID, ours": given["ours"], "FID, torch-fidelity": given["torch-fidelity"]},
        "times": times,
        "figures": [
            figure("time besides feature extraction", over, "%", 5.0, most=True),
            *ratios(times, "torch-fidelity"),
        ],
    }


def statistics(device: str) -> dict[str, Any]:
    """Measures FID and its interval from given features."""
    import scipy.linalg
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    random = np.random.default_rng(0)
    mix = random.standard_normal((DIMENSIONS, DIMENSIONS), np.float32) / DIMENSIONS**0.5
    scale = np.linspace(1, 0.01, DIMENSIONS, dtype=np.float32)
    real, fake = (random.standard_normal((ROWS, DIMENSIONS), np.float32) * scale @ mix + shift for shift in (0, 0.02))
    reference = fidelity.statistics(real)  # known before, as are the peers' own
    kept = fid_features_to_statistics(torch.from_numpy(real))

    def ours() -> float:
        again = fidelity.Statistics(
            reference.mean, reference.covariance
        )  # a new object, so that its root is part of the work
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
    times, given = alternate(sides, 2, warmups=0, device=device)
    for peer in ("without the interval", "torch-fidelity", "scipy sqrtm"):
        np.testing.assert_allclose(given["ours"], given[peer], rtol=1e-6)
    return {
        "work": f"FID and its interval from {ROWS:,} x {DIMENSIONS} features (peers: FID alone)",
        "per_call": "statistics of the samples, and their distance to known statistics of a reference",
        "checks": {f"FID, {side}": value for side, value in given.items()},
        "times": times,
        "figures": [
            *ratios(times, "scipy sqrtm", 5.0),
            *ratios(times, "torch-fidelity"),
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
