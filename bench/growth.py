"""Measures how the cost of each phase grows with one setting, and how close its speed comes to the machine's limit."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import TINY, alternate, matmul_rate
from bench.network import SETTINGS
from bench.scores import CACHE, _pictures
from ddpm import Denoiser, NoiseSchedule, UNet, sample
from ddpm.networks import winograd
from ddpm.scores import fidelity, inception
from ddpm.scores.features import extract
from ddpm.training.fit import TrainingState, autocast, fit
from ddpm.training.objective import Objective

# Each setting in turn takes all its VALUES, while the other settings stay as in BASE.
BASE = {
    "cpu": {"batch": 4, "size": 32, "width": 128, "steps": 1},
    "cuda": {"batch": 128, "size": 32, "width": 128, "steps": 10},
}
VALUES = {
    "cpu": {"batch": [1, 2, 4, 8, 16], "size": [16, 32, 64], "width": [32, 64, 96, 128, 160], "steps": [1, 2, 4, 8]},
    "cuda": {
        "batch": [16, 64, 128, 256, 1024],
        "size": [16, 32, 64],
        "width": [32, 64, 128, 256],
        "steps": [10, 20, 50, 100],
    },
}
IMAGES = {"cpu": [8, 16, 32, 64], "cuda": [500, 1_000, 2_000, 4_000]}  # numbers of images for Inception
ROWS = [5_000, 10_000, 20_000, 50_000]  # numbers of feature vectors for the statistics and the interval
REPEATS = 3
if TINY:
    BASE["cpu"] |= {"batch": 2, "width": 32}
    VALUES["cpu"], IMAGES["cpu"], ROWS = {"batch": [1, 2], "size": [16, 32], "steps": [1, 2]}, [2, 4], [200, 400]
DIMENSIONS = 64 if TINY else 2048


def _peak(device: str) -> int:
    """Returns the peak memory since `_forget`, in bytes, of this process or of the GPU's tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1)) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget(device: str) -> None:
    """Frees the memory of earlier work, and resets the peak."""
    if device == "cuda":
        torch.compiler.reset()  # otherwise torch compiles for dynamic shapes, and stops compiling after eight shapes
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        winograd._space.__dict__.clear()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc_pid_clear_refs(5))


def _network(width: int, size: int, device: str) -> UNet:
    torch.manual_seed(0)
    net = UNet(**{**SETTINGS, "channels": width, "image_size": size})
    return net.to(device).to(memory_format=torch.channels_last)


def _training(device: str, settings: dict[str, int]) -> Callable[[], Any]:
    """Returns a function that trains for settings["steps"] steps by the paper's recipe."""
    net = _network(settings["width"], settings["size"], device)
    shape = (4 * settings["batch"], 3, settings["size"], settings["size"])
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(device)
    steps = fit(
        TrainingState(net),
        images,
        Objective.of(NoiseSchedule.named("linear", 1000), "eps", device),
        batch=settings["batch"],
        learning_rate=2e-4,
        seed=0,
        flip=True,
        precision=_precision(device),
        forward=winograd.compiled(net, dynamic=False),
    )
    return lambda: [next(steps).loss for _ in range(settings["steps"])][-1]


def _sampling(device: str, settings: dict[str, int]) -> Callable[[], Any]:
    """Returns a function that samples by DDIM in settings["steps"] evaluations."""
    forward = winograd.compiled(
        _network(settings["width"], settings["size"], device).eval().requires_grad_(False), dynamic=False
    )

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with autocast(torch.device(device), _precision(device)):
            return forward(x, t).float()

    denoiser = Denoiser(predict, NoiseSchedule.named("linear", 1000), "eps", clip=True)
    x_T = torch.randn(settings["batch"], 3, settings["size"], settings["size"], device=device).to(
        memory_format=torch.channels_last
    )
    return lambda: sample(denoiser, x_T, steps=settings["steps"], sampler="ddim", noise=lambda k: torch.randn_like(x_T))


def _extraction(extractor: inception.Inception, pictures: NDArray[np.uint8]) -> Callable[[], Any]:
    return lambda: extract(extractor, pictures)


def _interval(rows: NDArray[np.float32], reference: fidelity.Statistics, device: str) -> Callable[[], Any]:
    return lambda: fidelity.jackknife(rows, fidelity.Statistics(reference.mean, reference.covariance), device)


def _precision(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def _evaluation_work(width: int, size: int) -> int:
    """Counts the floating point operations of the network on one image, with direct convolutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _network(width, size, "cpu")(torch.randn(1, 3, size, size), torch.zeros(1))
    return int(counter.get_total_flops())


def _series(
    phase: str, by: str, points: Sequence[tuple[int, Callable[[], Callable[[], Any]], int]], device: str
) -> dict[str, Any]:
    """Measures one phase for each value of one setting.

    Args:
        phase: label of the phase.
        by: the setting that varies.
        points: a value; a function that prepares the work and returns the function to time; the images of one call.
        device: "cpu" or "cuda".

    Returns:
        The rows, and `power`: the exponent p of seconds ~ value^p, by least squares.
    """
    rows = []
    for value, ready, images in points:
        _forget(device)
        times, _ = alternate({"call": ready()}, REPEATS, device=device)
        wall = times["call"]["wall"]
        rows.append(
            {"value": value, "seconds": sorted(wall)[len(wall) // 2], "images": images, "peak_bytes": _peak(device)}
        )
        print(f"  {phase} by {by} {value}: {rows[-1]['seconds']:.3g} s", flush=True)
    x, y = (np.log([row[key] for row in rows]) for key in ("value", "seconds"))
    return {"phase": phase, "by": by, "power": float(np.polyfit(x, y, 1)[0]), "rows": rows}


def _copy_rate(device: str) -> float:
    """Measures the rate of copying, in bytes read and written per second, on arrays larger than the caches."""
    a = torch.zeros(2**22 if TINY else 2**27, device=device)
    b = torch.empty_like(a)
    times, _ = alternate({"copy": lambda: b.copy_(a)}, 9, warmups=2, device=device)
    return 2 * a.nbytes / min(times["copy"]["wall"])


@torch.no_grad()
def _optimiser(state: TrainingState) -> None:
    """Does the part of a training step after the gradients: Adam and the moving average."""
    state.optimizer.step(2e-4)
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.net.parameters()), 0.001)


def _phases(device: str, found: list[dict[str, Any]], extractor: inception.Inception) -> list[dict[str, Any]]:
    """Returns the work of a call for each phase, the seconds that it takes, and its share of the machine's rate."""
    base = BASE[device]
    precision = torch.bfloat16 if device == "cuda" else torch.float32
    evaluation = _evaluation_work(base["width"], base["size"]) * base["batch"] * base["steps"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device))
    last = {one["phase"]: one["rows"][-1] for one in found}
    training, sampling = (
        next(
            row
            for one in found
            if (one["phase"], one["by"]) == (phase, "batch")
            for row in one["rows"]
            if row["value"] == base["batch"]
        )
        for phase in ("training", "sampling")
    )
    N, D = last["FID and interval"]["images"], DIMENSIONS
    # The terms: half a covariance C, M = R^T C R (see ddpm/scores/fidelity.py), M's eigenvectors, their product with R, and
    # the rotation of each image. The rotation counts half, since it runs in float32.
    scores = N * D**2 + (4 * D**3) // 3 + 9 * D**3 + 2 * D**3 + N * D**2
    products = [
        ("training", 3 * evaluation, training["seconds"], precision),
        ("sampling", evaluation, sampling["seconds"], precision),
        (
            "features",
            counter.get_total_flops() * last["features"]["images"],
            last["features"]["seconds"],
            torch.float32,
        ),
        ("FID and interval", scores, last["FID and interval"]["seconds"], torch.float64),
    ]
    rates = {dtype: matmul_rate(device, dtype) for dtype in (precision, torch.float32, torch.float64)}
    phases = [
        {
            "phase": phase,
            "work": work,
            "seconds": seconds,
            "of": f"matrix products, {str(dtype).removeprefix('torch.')}",
            "rate": rates[dtype],
        }
        for phase, work, seconds, dtype in products
    ]
    state = TrainingState(_network(base["width"], base["size"], device))
    for parameter in state.net.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    times, _ = alternate({"call": lambda: _optimiser(state)}, 9, warmups=2, device=device)
    # Per weight, Adam reads 4 values and writes 3, and the average reads 2 and writes 1.
    moved = 10 * sum(parameter.nbytes for parameter in state.net.parameters())
    phases.append(
        {
            "phase": "Adam and EMA",
            "work": moved,
            "seconds": min(times["call"]["wall"]),
            "of": "copying memory",
            "rate": _copy_rate(device),
        }
    )
    return [{**phase, "share": phase["work"] / phase["seconds"] / phase["rate"]} for phase in phases]


def growth(device: str) -> dict[str, Any]:
    """Measures how time and memory of training, sampling, features and FID grow with batch, size, width and steps."""
    base, found = BASE[device], []
    for phase, make in (("training", _training), ("sampling", _sampling)):
        for by, values in VALUES[device].items():
            points = []
            for value in values:
                settings = {**base, by: value}
                points.append((value, partial(make, device, settings), settings["batch"] * settings["steps"]))
            found.append(_series(phase, by, points, device))
    extractor, pictures = inception.load(2048, CACHE, device), _pictures(max(IMAGES[device]), 0)
    points = [(count, partial(_extraction, extractor, pictures[:count]), count) for count in IMAGES[device]]
    found.append(_series("features", "images", points, device))
    random = np.random.default_rng(0)
    rows = random.standard_normal((max(ROWS), DIMENSIONS), np.float32)
    reference = fidelity.statistics(random.standard_normal((4 * DIMENSIONS, DIMENSIONS), np.float32))
    points = [(count, partial(_interval, rows[:count], reference, device), count) for count in ROWS]
    found.append(_series("FID and interval", "images", points, device))
    usual = ", ".join(f"{name} {value}" for name, value in base.items())
    return {
        "work": "training and sampling of the paper's UNet, compiled; Inception features and their scores",
        "per_call": f"one value of the varied setting; the others are {usual}",
        "checks": {},
        "times": {},
        "figures": [],
        "growth": found,
        "phases": _phases(device, found, extractor),
    }
