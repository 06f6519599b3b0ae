"""Runs a training with scores along the way. The training can stop at any time, and resumes with the same result.

This module needs only torch, numpy and `ddpm`, so bench/cifar10.py runs on machines where nothing else can be installed.
"""

from __future__ import annotations

import json
import math
import os
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
from ddpm import Denoiser, NoiseSchedule, fit, gaussian, sample
from ddpm.networks import winograd
from ddpm.networks.network import NETWORKS
from ddpm.scores import fidelity, intervals
from ddpm.scores.features import extract
from ddpm.scores.inception import Inception
from ddpm.training.fit import Descent, TrainingState, autocast
from ddpm.training.objective import Objective
from ddpm.training.times import TIMES

Images = NDArray[np.uint8]


class OutOfTime(Exception):
    """The time limit is reached. Finished work is saved, and the same command resumes."""


@dataclass(frozen=True)
class Recipe:
    """All settings that decide the weights, except the number of steps.

    Args:
        network: arguments of the network.
        schedule: arguments of NoiseSchedule.named.
        kind: a key of NETWORKS.
        descent: a shape of Descent, and the share of the steps over which the learning rate falls to zero.

    The other fields are arguments of `fit`, `Objective.of` and TrainingState, or entries of the section `training`.
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
    log_every: int = 50
    seed: int = 0
    kind: str = "unet"
    optimizer: str = "adam"
    weight_decay: float = 0.0
    descent: tuple[str, float] | None = None
    pairing: str = "random"
    times: str = "uniform"

    def noise(self) -> NoiseSchedule:
        return NoiseSchedule.named(**self.schedule)

    def net(self, device: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return NETWORKS.select(self.kind)(**self.network).to(device).to(memory_format=torch.channels_last)

    def state(self, device: str) -> TrainingState:
        times = None if self.times == "uniform" else TIMES[self.times](self.noise(), torch.device(device), False)
        return TrainingState(self.net(device), self.optimizer, self.weight_decay, times)

    def coming_down(self, steps: int | None) -> Descent | None:
        """Returns the Descent of the learning rate for a training of this many steps."""
        if self.descent is None or steps is None:
            return None
        shape, share = self.descent
        return Descent(steps - round(share * steps), steps, shape)


@dataclass
class Course:
    """The state of a training, with its losses and scores so far.

    Args:
        training: network, average and optimiser.
        recipe: the Recipe as JSON.
        steps: the last step; None if it is not yet known.
        seconds: seconds of training without the first step of each process and other work.
        processor: processor seconds of training with the first steps, without other work.
        starts: seconds of each process's first step, which compiles.
        losses: rows of the step and the mean loss since the previous row.
        scores: rows of the scores during training.
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
        """Replaces folder/course.pt atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {key: value for key, value in vars(self).items() if key != "training"}
        kept = {"step": self.training.step, "tensors": self.training.tensors(), "about": json.dumps(about)}
        torch.save(kept, folder / "course.tmp")
        (folder / "course.tmp").replace(folder / "course.pt")

    @classmethod
    def load(cls, folder: Path, recipe: Recipe, device: str) -> Course:
        """Loads the state that `save` wrote, or starts a new training.

        Raises SystemExit if the saved training has another recipe.
        """
        course = cls(recipe.state(device), json.dumps(asdict(recipe)))
        if (folder / "course.pt").exists():
            kept = torch.load(folder / "course.pt", weights_only=True, mmap=True)
            if json.loads(kept["about"])["recipe"] != course.recipe:
                raise SystemExit(
                    f"{folder}: holds a training of another recipe; remove this folder, or name another with --state"
                )
            course.training.load(kept["step"], kept["tensors"])
            for key, value in json.loads(kept["about"]).items():
                setattr(course, key, value)
        return course


def advance(course: Course, recipe: Recipe, images: Tensor, device: str) -> Iterator[float]:
    """Trains up to course.steps, or without end if course.steps is None. Does not count the caller's time.

    A training that stops after a row and resumes later has the same losses and weights as an uninterrupted training.

    Args:
        course: the training to continue, changed in place.
        recipe: the recipe of the training.
        images: uint8 [N, C, H, W].
        device: "cpu" or "cuda".

    Yields:
        The mean loss, every recipe.log_every steps and after the last step.
    """
    state = course.training
    objective = Objective.of(recipe.noise(), recipe.target, device, recipe.loss)
    forward = winograd.compiled(state.net, dynamic=False) if recipe.compiled else None
    pair = None if recipe.pairing == "random" else _pairing(recipe.pairing)
    known, running, losses, first = None, None, [], True
    began, processor = time.perf_counter(), cpu_seconds()
    while course.steps is None or state.step < course.steps:
        if running is None or course.steps != known:
            known = course.steps
            running = fit(
                state,
                images,
                objective,
                batch=recipe.batch,
                learning_rate=recipe.learning_rate,
                seed=recipe.seed,
                warmup=recipe.warmup,
                clip=recipe.clip,
                ema=recipe.ema,
                flip=recipe.flip,
                precision=recipe.precision,
                forward=forward,
                descent=recipe.coming_down(course.steps),
                pair=pair,
            )
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


def _pairing(name: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    from ddpm.stages.train import PAIRINGS  # imported here, because it needs packages that this module must not need

    return PAIRINGS[name]


def denoiser_of(course: Course, recipe: Recipe, device: str, precise: bool = False) -> Denoiser:
    """Creates a denoiser from the averaged weights.

    Args:
        course: the training.
        recipe: the recipe of the training.
        device: "cpu" or "cuda".
        precise: use float32 without compilation, instead of the recipe's settings.
    """
    net = course.training.ema
    forward: Callable[..., Any] = net if precise or not recipe.compiled else winograd.compiled(net, dynamic=False)
    precision = "float32" if precise else recipe.precision

    def predict(x: Tensor, t: Tensor) -> Tensor:
        with autocast(torch.device(device), precision):
            return forward(x, t).float()

    return Denoiser(predict, recipe.noise(), recipe.target, clip=True)


@torch.inference_mode()
def draw_images(denoiser: Denoiser, shape: tuple[int, ...], rows: range, row: dict[str, Any], device: str) -> Images:
    """Draws images from the noise of seed 0.

    Args:
        denoiser: the model.
        shape: C, H, W of an image.
        rows: numbers of the images, which select their noise.
        row: arguments of `ddpm.sample`.
        device: "cpu" or "cuda".

    Returns:
        uint8 [len(rows), C, H, W].
    """
    x_T = gaussian(0, rows, 0, shape, device).to(memory_format=torch.channels_last)
    x = sample(denoiser, x_T, noise=lambda k: gaussian(0, rows, k + 1, shape, device), **row)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def compute_rows(
    make: Callable[[range], NDArray[Any]], count: int, batch: int, folder: Path, until: float
) -> NDArray[Any]:
    """Computes rows 0 ... count - 1 and saves each batch, so that a repeated call resumes.

    Args:
        make: computes the given rows.
        count: number of rows.
        batch: number of rows in a file.
        folder: folder of the saved batches.
        until: time.monotonic() at which to stop.

    Raises:
        OutOfTime: the next batch would take too long.
    """
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
    """Extracts the features [count, layer] of the images that `make` returns. See `compute_rows` for arguments and errors."""
    return compute_rows(lambda rows: extract(inception, make(rows), min(batch, 250)), count, batch, folder, until)


def fid(features: NDArray[np.float32], reference: fidelity.Statistics, device: str) -> dict[str, Any]:
    """Returns FID and its 95 % interval. If there are more images than features, also returns FID's bias."""
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
