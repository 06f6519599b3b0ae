"""Runs the sides of a benchmark in turn, and reports medians, ratios with their range, and the machine."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("torch", "torchvision", "numpy", "scipy", "diffusers", "accelerate", "denoising-diffusion-pytorch"),
    *("torch-fidelity", "pillow", "dvc", "prefect", "mlflow"),
)


TINY = "BENCH_TINY" in os.environ  # runs all rows with little work, in about a minute, and writes no results

Times = dict[str, dict[str, list[float]]]  # side -> "wall" or "cpu" -> seconds of each repetition


def cpu_seconds() -> float:
    """Returns the processor seconds of this process and its finished children. Other load affects them less than clock time."""
    return sum(
        resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(
    sides: Mapping[str, Callable[[], Any]], repeats: int, *, warmups: int = 1, device: str = "cpu"
) -> tuple[Times, dict[str, Any]]:
    """Runs every side `repeats` times, in turn, and reverses the order after each turn.

    Args:
        sides: name -> function that does the work of one call.
        repeats: number of timed turns.
        warmups: number of untimed turns before the timed turns.
        device: with "cuda", waits for the GPU before and after each call.

    Returns:
        The times, and the last return value of each side.
    """
    repeats, warmups = (1, 0) if TINY else (repeats, warmups)
    times: Times = {side: {"wall": [], "cpu": []} for side in sides}
    given: dict[str, Any] = {}
    for turn in range(-warmups, repeats):
        for side in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            _settle(device)
            cpu, wall = cpu_seconds(), time.perf_counter()
            given[side] = sides[side]()
            _settle(device)
            if turn >= 0:
                times[side]["wall"].append(time.perf_counter() - wall)
                times[side]["cpu"].append(cpu_seconds() - cpu)
    return times, given


def figure(
    name: str, values: Sequence[float], unit: str, goal: float | None = None, most: bool = False
) -> dict[str, Any]:
    """Summarises values by median and range.

    Args:
        name: the label in the tables.
        values: one value per repetition.
        unit: "x", "%" or "s".
        goal: the bound on the median, if any.
        most: whether the goal is an upper bound; otherwise it is a lower bound.
    """
    median = statistics.median(values)
    about: dict[str, Any] = {"name": name, "value": median, "low": min(values), "high": max(values), "unit": unit}
    if goal is not None:
        about |= {"goal": goal, "at": "most" if most else "least", "met": median <= goal if most else median >= goal}
    return about


def ratios(
    times: Times, peer: str, goal: float | None = None, ours: str = "ours", name: str = ""
) -> list[dict[str, Any]]:
    """Divides a peer's time by ours, turn by turn. Returns a figure in clock time and a figure in processor time.

    Args:
        times: the result of `alternate`.
        peer: the side whose time is divided.
        goal: the lower bound on the ratio of clock times, if any.
        ours: the side to divide by.
        name: the label of the figure; default: "PEER / ours".
    """
    clock, processor = (
        [theirs / mine for theirs, mine in zip(times[peer][kind], times[ours][kind], strict=True)]
        for kind in ("wall", "cpu")
    )
    name = name or f"{peer} / ours"
    return [figure(name, clock, "x", goal), figure(f"{name}, processor time", processor, "x")]


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Measures the floating point operations per second of a large matrix product."""
    side = 8192 if device == "cuda" else 1536
    a = torch.randn(side, side, device=device, dtype=dtype)
    times, _ = alternate({"matmul": lambda: a @ a}, 9, warmups=2, device=device)
    return 2 * side**3 / min(times["matmul"]["wall"])


def limit(work: float, seconds: float, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compares work with the machine's rate of matrix products.

    Args:
        work: floating point operations.
        seconds: the time that the operations took.
        device: "cpu" or "cuda".
        dtype: the type of the matrix product to compare with.

    Returns:
        operations; matmul_rate, in operations per second; share of that rate.
    """
    rate = matmul_rate(device, dtype)
    return {"operations": work, "matmul_rate": rate, "share": work / seconds / rate}


def machine(device: str, threads: int) -> dict[str, Any]:
    # imported here, because bench.cifar10 must run without the packages that this import needs
    from ddpm.provenance.run_record import _hardware

    about = {**_hardware(), "threads": threads, "load": os.getloadavg()[0]}
    about["device"] = device
    return about


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _short(value: Any) -> Any:
    """Rounds every float to 4 significant digits, which is about the precision of the times."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(name: str, device: str, threads: int, result: dict[str, Any]) -> Path:
    path = RESULTS / f"{name}-{device}.json"
    if TINY:
        return path
    RESULTS.mkdir(exist_ok=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    about = {"row": name, **result, "peak_memory_bytes": peak}
    if device == "cuda":
        about["gpu_peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    about |= {"machine": machine(device, threads), "versions": versions()}
    path.write_text(json.dumps(_short(about), indent=1) + "\n", encoding="utf-8")
    return path
