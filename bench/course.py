"""A training with its scores along the way: it stops in time, and goes on from its folder as if it had not.

It wants torch, numpy and `ddpm` alone, so that it runs where nothing else can be installed (bench/cifar10.py), and on any CPU
(bench/curves.py).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.harness import cpu_seconds
from ddpm import Denoiser, NoiseSchedule, UNet, fit, gaussian, sample
from ddpm.networks import winograd
from ddpm.scores import fidelity, intervals
from ddpm.scores.features import extract
from ddpm.scores.inception import Inception
from ddpm.training.fit import TrainingState, autocast
from ddpm.training.objective import Objective

Images = NDArray[np.uint8]


class OutOfTime(Exception):
    """What was done is kept; the next command goes on."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but for the number of steps.

    network: the arguments of UNet. schedule: those of NoiseSchedule.named. decay: pairs of a share of the steps and what the
    learning rate is multiplied by from there on (`fit` goes on from any state, with any rate).
    """

    network: dict[str, Any]
    schedule: dict[str, Any]
    batch: int
    learning_rate: float
    warmup: int
    ema: float
    target: str = "eps"
    loss: str = "simple"
    clip: float = 1.0
    flip: bool = True
    precision: str = "float32"
    compiled: bool = False
    decay: tuple[tuple[float, float], ...] = ()
    log_every: int = 50
    seed: int = 0

    def noise(self) -> NoiseSchedule:
        return NoiseSchedule.named(**self.schedule)

    def net(self, device: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return UNet(**self.network).to(device).to(memory_format=torch.channels_last)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate after `step` of `steps` steps."""
        return self.learning_rate * next((by for share, by in self.decay[::-1] if step >= share * steps), 1.0)


@dataclass
class Course:
    """How far a training has come. seconds: of training alone; starts: of each process's first step, which compiles.

    losses: rows of step and mean loss since the row before. scores: rows of what was measured on the way.
    """

    training: TrainingState
    recipe: str = ""
    steps: int | None = None
    seconds: float = 0.0
    processor: float = 0.0
    starts: list[float] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {key: value for key, value in vars(self).items() if key != "training"}
        kept = {"step": self.training.step, "tensors": self.training.tensors(), "about": json.dumps(about)}
        torch.save(kept, folder / "course.tmp")
        (folder / "course.tmp").replace(folder / "course.pt")

    @classmethod
    def load(cls, folder: Path, recipe: Recipe, device: str) -> Course:
        """Where `save` left it, or the start. What was saved under another recipe is refused."""
        course = cls(TrainingState(recipe.net(device)), json.dumps(asdict(recipe)))
        if (folder / "course.pt").exists():
            kept = torch.load(folder / "course.pt", weights_only=True, mmap=True)
            if json.loads(kept["about"])["recipe"] != course.recipe:
                raise SystemExit(f"{folder}: a training of another recipe; remove it, or name another --state")
            course.training.load(kept["step"], kept["tensors"])
            for key, value in json.loads(kept["about"]).items():
                setattr(course, key, value)
        return course


def advance(course: Course, recipe: Recipe, images: Tensor, device: str) -> Iterator[float]:
    """Trains to course.steps, without end where that is None. -> the loss of every log_every steps; the clock stands meanwhile.

    Stopped after a row and gone on with later, it gives the losses and weights of training straight through.
    """
    state = course.training
    objective = Objective.of(recipe.noise(), recipe.target, device, recipe.loss)
    forward = winograd.compiled(state.net, dynamic=False) if recipe.compiled else None
    rate, running, losses, first = math.nan, None, [], True
    began, processor = time.perf_counter(), cpu_seconds()
    while course.steps is None or state.step < course.steps:
        if (now := recipe.rate(state.step, course.steps or sys.maxsize)) != rate:
            rate = now
            running = fit(
                state,
                images,
                objective,
                batch=recipe.batch,
                learning_rate=rate,
                seed=recipe.seed,
                warmup=recipe.warmup,
                clip=recipe.clip,
                ema=recipe.ema,
                flip=recipe.flip,
                precision=recipe.precision,
                forward=forward,
            )
        assert running is not None
        losses.append(next(running).loss)
        if first:
            losses[-1].item()  # waits for the device
            course.starts.append(time.perf_counter() - began)
            began, first = time.perf_counter(), False
        if state.step % recipe.log_every == 0 or state.step == course.steps:
            loss = float(torch.stack(losses).mean())
            if not math.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {state.step}; lower the learning rate")
            course.losses.append((state.step, loss))
            losses.clear()
            course.seconds += time.perf_counter() - began
            course.processor += cpu_seconds() - processor
            yield loss
            began, processor = time.perf_counter(), cpu_seconds()


def denoiser_of(course: Course, recipe: Recipe, device: str, precise: bool = False) -> Denoiser:
    """Of the averaged weights. precise: in float32 and not compiled, whatever the recipe says."""
    net = course.training.ema
    forward: Callable[..., Any] = net if precise or not recipe.compiled else winograd.compiled(net, dynamic=False)
    precision = "float32" if precise else recipe.precision

    def predict(x: Tensor, t: Tensor) -> Tensor:
        with autocast(torch.device(device), precision):
            return forward(x, t).float()

    return Denoiser(predict, recipe.noise(), recipe.target, clip=True)


@torch.inference_mode()
def drawn(denoiser: Denoiser, shape: tuple[int, ...], rows: range, row: dict[str, Any], device: str) -> Images:
    """Images number `rows` of seed 0: uint8 [len(rows), *shape]. row: the arguments of `ddpm.sample`."""
    x_T = gaussian(0, rows, 0, shape, device).to(memory_format=torch.channels_last)
    x = sample(denoiser, x_T, noise=lambda k: gaussian(0, rows, k + 1, shape, device), **row)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def kept(make: Callable[[range], NDArray[Any]], count: int, batch: int, folder: Path, until: float) -> NDArray[Any]:
    """make(rows) of all `count` rows, kept batch by batch. Raises OutOfTime."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, longest = [], 0.0
    for start in range(0, count, batch):
        path = folder / f"{start:06d}.npy"
        if not path.exists():
            began = time.monotonic()
            if began + 1.2 * longest > until:
                raise OutOfTime
            with path.with_suffix(".tmp").open("wb") as file:
                np.save(file, make(range(start, min(start + batch, count))))
            path.with_suffix(".tmp").replace(path)
            longest = max(longest, time.monotonic() - began)
        parts.append(np.load(path))
    return np.concatenate(parts)


def features_of(
    make: Callable[[range], Images], count: int, batch: int, inception: Inception, folder: Path, until: float
) -> NDArray[np.float32]:
    """Features [count, layer] of the images that `make` gives, kept batch by batch. Raises OutOfTime."""
    return kept(lambda rows: extract(inception, make(rows), min(batch, 250)), count, batch, folder, until)


def fid(features: NDArray[np.float32], reference: fidelity.Statistics, device: str) -> dict[str, Any]:
    """FID, its 95 % interval, and its part that comes from the number of images, where there are more than features."""
    found = fidelity.jackknife(features, reference, device)
    reach = intervals.quantile() * intervals.standard_error(found.influence)
    about = {"images": len(features), "fid": found.fid, "low": max(0.0, found.fid - reach), "high": found.fid + reach}
    if len(features) > features.shape[1]:
        about["bias"] = found.bias
    return about


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def machine(device: str) -> dict[str, Any]:
    about: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    return about
