"""Measures the ledger: FID of CIFAR-10 against processor time, for single changes, the baseline, the winner and the peers.

`python -m bench.ledger --images FOLDER` needs about eight hours of two cores in all, and resumes where it stopped. It

- measures the processor time of a step of every row, in turns with the baseline (`pace`). Each row then trains for the number of
  steps that its processor time buys. So a machine that is slower for a while changes no comparison, and another machine can
  continue. While the paces are measured, the machine should do nothing else;
- trains every row of CHANGES for 300 processor seconds from two seeds (`screening`);
- trains the rows of CANDIDATES for 300 and 600 processor seconds from one seed, and the baseline, the best row
  (WINNER) and both peers of bench.peers for 300, 600 and 900 processor seconds from three seeds (`curves`);
- scores the baseline and the winner once more, as papers do: layer 2048, 5,000 images (`large`);
- trains the winner for an hour of two cores (`hour`), and draws its images as a grid.

Two trainings run side by side, each with one thread; `hour` has both cores. All models are sampled from the same noise, by the
sampler and steps of the baseline's last point. So each score is compared with the baseline's image by image. The results are
bench/results/ledger-cifar10-cpu.json, and a file in the folder of the same name for the images of each score;
`python -m bench.page` writes docs/ledger.md from the former.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, product
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bench import course, curves, harness
from bench.course import Course, Images, OutOfTime, Recipe
from bench.curves import PICTURES, ROOT, load_prepared, recipe_of_params
from bench.peers import PEERS, operations
from ddpm import Denoiser
from ddpm.files import arrays
from ddpm.files.dataset import spread
from ddpm.scores import fidelity, inception, intervals
from ddpm.scores.intervals import Estimate
from ddpm.stages.evaluate import reference_images

NAME = "cifar10-cpu"
RESULT = f"ledger-{NAME}.json"
BASELINE = Path(__file__).with_name("ledger.yaml")
RECIPE = "as it is"  # the baseline: the row of CHANGES with which the others are compared
DIT = {"width": 192, "depth": 6, "heads": 3, "patch": 4}
# The screening. Each row changes one setting of the baseline or of its network; the last rows combine changes.
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "eps": {"target": "eps"},
    "min_snr": {"loss": "min_snr"},
    "linear": {"schedule": {"name": "linear", "steps": 1000}},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rate 4e-3": {"learning_rate": 4e-3},
    "batch 8": {"batch": 8},
    "batch 32": {"batch": 32},
    "batch 64": {"batch": 64},
    "batch 32, channels 24": {"batch": 32, "network": {"channels": 24}},
    "ema 0.99": {"ema": 0.99},
    "unflipped": {"flip": False},
    "channels 48": {"network": {"channels": 48}},
    "multipliers 1-2-4": {"network": {"multipliers": [1, 2, 4]}},
    "no attention": {"network": {"attention": []}},
    "decay linear 0.3": {"descent": ("linear", 0.3)},
    "decay cosine 0.5": {"descent": ("cosine", 0.5)},
    "adamw 0.01": {"optimizer": "adamw", "weight_decay": 0.01},
    "muon": {"optimizer": "muon"},
    "muon, decay linear 0.3": {"optimizer": "muon", "descent": ("linear", 0.3)},
    "immiscible": {"pairing": "immiscible"},
    "loss_aware": {"times": "loss_aware"},
    "log_normal": {"times": "log_normal"},
    "rectified flow": {"schedule": {"name": "rectified", "steps": 1000}, "target": "flow"},
    "patch 2, channels 64": {"network": {"patch": 2, "channels": 64}},
    "patch 2, channels 64, rate 1e-3": {"network": {"patch": 2, "channels": 64}, "learning_rate": 1e-3},
    "dit, rate 5e-4": {"kind": "dit", "network": DIT, "learning_rate": 5e-4},
    "dit, muon": {"kind": "dit", "network": DIT, "optimizer": "muon"},
    "muon, min_snr": {"optimizer": "muon", "loss": "min_snr"},
    "muon, log_normal": {"optimizer": "muon", "times": "log_normal"},
    "muon, min_snr, log_normal": {"optimizer": "muon", "loss": "min_snr", "times": "log_normal"},
    "muon, min_snr, loss_aware": {"optimizer": "muon", "loss": "min_snr", "times": "loss_aware"},
    "muon, min_snr, no attention": {"optimizer": "muon", "loss": "min_snr", "network": {"attention": []}},
    "muon, min_snr, linear": {"optimizer": "muon", "loss": "min_snr", "schedule": {"name": "linear", "steps": 1000}},
    "muon, min_snr, batch 32": {"optimizer": "muon", "loss": "min_snr", "batch": 32},
    "muon, min_snr, decay linear 0.3": {"optimizer": "muon", "loss": "min_snr", "descent": ("linear", 0.3)},
    "muon, min_snr, ema 0.99": {"optimizer": "muon", "loss": "min_snr", "ema": 0.99},
}
# Rows with larger networks, which are not in the screening: they need more time to become better than a small network.
LARGER: dict[str, dict[str, Any]] = {
    "muon, channels 48": {"optimizer": "muon", "network": {"channels": 48}},
    "muon, min_snr, channels 48": {"optimizer": "muon", "loss": "min_snr", "network": {"channels": 48}},
    "muon, blocks 2": {"optimizer": "muon", "network": {"blocks": 2}},
}
# The rows that train for longer from one seed, so that the winner can be chosen.
CANDIDATES = ("muon", "muon, decay linear 0.3", "muon, min_snr", *LARGER)
WINNER = "muon, decay linear 0.3"  # the best of CANDIDATES; recipes/cifar10-cpu.yaml has its settings
ROUNDS, TURN = 9, 10  # turns of the baseline and a row that measure the processor time of a step; steps of a turn
SCREENING, SEEDS = 300, 2  # processor seconds, trainings of each row
MARKS, REPLICATES = (300, 600, 900), 3  # the same for the curves
HOUR = 7200  # processor seconds of an hour of two cores
LARGE = (2048, 5000)  # layer and images of the score that papers use
GRID = 100  # images


def with_change(recipe: Recipe, change: dict[str, Any]) -> Recipe:
    """Applies a row of CHANGES. Another kind of network keeps only the settings that follow from the data."""
    derived = ("image_channels", "image_size")
    kept = recipe.network if "kind" not in change else {key: recipe.network[key] for key in derived}
    return replace(recipe, **{**change, "network": {**kept, **change.get("network", {})}})


@torch.inference_mode()
def error(denoiser: Denoiser, images: torch.Tensor, seed: int = 0) -> float:
    """Returns the mean of min(SNR, 5) times the squared error of x0_hat, on fixed times and noise.

    All trainings on one schedule are compared on the same times and noise.
    """
    schedule, generator = denoiser.schedule, torch.Generator().manual_seed(seed)
    t = ((torch.arange(len(images)) + 0.5) / len(images) * schedule.T).long()
    alpha_bar = schedule.alpha_bar[t + 1].view(-1, 1, 1, 1)
    x_0 = images.float() / 127.5 - 1
    eps = torch.randn(x_0.shape, generator=generator)
    x_t = (alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps).float()
    x0_hat = torch.cat([denoiser(x, times) for x, times in zip(x_t.split(64), t.split(64), strict=True)])
    return float(((alpha_bar / (1 - alpha_bar)).clamp(max=5) * (x0_hat - x_0).square()).mean())


class Training(Protocol):
    """A training of ours or of a peer, which can stop and resume."""

    steps: int | None

    @property
    def processor(self) -> float: ...

    @property
    def step(self) -> int: ...

    @property
    def parameters(self) -> int: ...

    def advance(self) -> Iterator[Any]: ...

    def save(self, folder: Path) -> None: ...

    def denoiser(self) -> Denoiser: ...


class Ours:
    """A training by `ddpm.fit`, with the interface of bench.peers.Peer."""

    def __init__(self, recipe: Recipe, images: torch.Tensor, folder: Path) -> None:
        self.recipe, self.images, self.course = recipe, images, Course.load(folder, recipe, "cpu")

    @property
    def steps(self) -> int | None:
        return self.course.steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        self.course.steps = steps

    @property
    def step(self) -> int:
        return self.course.training.step

    @property
    def processor(self) -> float:
        return self.course.processor

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.course.training.net.parameters())

    def advance(self) -> Iterator[float]:
        return course.advance(self.course, self.recipe, self.images, "cpu")

    def save(self, folder: Path) -> None:
        self.course.save(folder)

    def denoiser(self) -> Denoiser:
        return course.denoiser_of(self.course, self.recipe, "cpu")


@dataclass(frozen=True)
class Places:
    """Folders, and the time limit.

    Args:
        images: PNG files or zips to use instead of the baseline's data; None for this data.
        state: keeps unfinished work.
        scores: keeps each model's score, with the influence of its images.
        pictures: gets the plot and the grid.
        until: time.monotonic() at which to stop.
    """

    images: Path | None
    state: Path
    scores: Path
    pictures: Path
    until: float


@dataclass(frozen=True)
class Bench:
    """The data and the protocol that all trainings share.

    Args:
        recipe: the baseline that rows change.
        images: the training images, uint8 [N, C, H, W].
        test: test images for `error`.
        point: the name of the baseline's last point.
        row: arguments of `ddpm.sample` for this point.
        layer: the layer of Inception whose features are compared.
        count: the number of samples.
        places: folders, and the time limit.
        weights: the folder of Inception's weights.
    """

    recipe: Recipe
    images: torch.Tensor
    test: torch.Tensor
    point: str
    row: dict[str, Any]
    layer: int
    count: int
    places: Places
    weights: Path = ROOT / ".cache" / "inception"

    def features(self, make: Callable[[range], Images], folder: Path, layer: int, count: int) -> NDArray[np.float32]:
        """Extracts the features [count, layer] of the images that `make` gives. Raises OutOfTime."""
        extractor = inception.load(layer, self.weights)
        return course.features_of(make, count, 100, extractor, folder, self.places.until)

    def real(self, layer: int, count: int) -> NDArray[np.float32]:
        """Returns the features of the images with which the pipeline would compare `count` samples. Raises OutOfTime."""
        images = reference_images(self.images.numpy(), count)
        folder = self.places.state / f"reference-{layer}-{count}"
        return self.features(lambda rows: images[rows.start : rows.stop], folder, layer, count)

    def score(self, denoiser: Denoiser, folder: Path, layer: int, count: int) -> Estimate:
        """Returns the FID of a model, with the influence of its images. Raises OutOfTime."""
        shape = tuple(self.images.shape[1:])
        made = self.features(
            lambda rows: course.draw_images(denoiser, shape, rows, self.row, "cpu"),
            folder / f"made-{layer}",
            layer,
            count,
        )
        found = fidelity.jackknife(made, fidelity.statistics(self.real(layer, count)), "cpu")
        return Estimate(found.fid, intervals.standard_error(found.influence), found.influence)


def train(training: Training, steps: int, folder: Path, until: float) -> None:
    """Trains up to a step. Raises OutOfTime at `until`; the training is saved then."""
    if training.step > steps:
        raise SystemExit(f"{folder}: trained for {training.step} steps already, beyond {steps}; remove this folder")
    training.steps = steps
    for _ in training.advance():
        if time.monotonic() > until:
            break
    training.save(folder)
    if training.step < steps:
        raise OutOfTime


def made(bench: Bench, side: str, change: dict[str, Any], seed: int, folder: Path) -> Training:
    """Returns the training of a peer, or of the baseline with a change, as far as it has been saved."""
    if side not in PEERS:
        return Ours(replace(with_change(bench.recipe, change), seed=seed), bench.images, folder)
    channels, size = bench.images.shape[1:3]
    wanted = operations(bench.recipe.net("cpu"), channels, size)
    peer = PEERS[side](bench.images, seed, bench.recipe.precision == "bfloat16", wanted)
    peer.load(folder)
    return peer


def descends(side: str, change: dict[str, Any]) -> bool:
    """Returns whether the learning rate falls towards the end. If so, a longer training must start from step 0."""
    return side == "diffusers" or "descent" in change


def pace(bench: Bench, side: str, change: dict[str, Any]) -> dict[str, float]:
    """Measures the processor time of a row's step, in turns with the baseline's.

    Returns:
        ratio, low, high: median and range of the row's time over the baseline's of the same turn. recipe: median processor
            seconds of the baseline's step.
    """
    still = {"learning_rate": 0.0, "log_every": TURN}  # this rate, so that no loss diverges
    rows: list[tuple[str, dict[str, Any]]] = [(RECIPE, still), (side, {**change, **still})]
    trainings = [made(bench, name, changed, 0, bench.places.state / "pace") for name, changed in rows]
    turns = [training.advance() for training in trainings]
    seconds: list[list[float]] = [[], []]
    for number in range((1 if harness.TINY else ROUNDS) + 1):
        for training, turn, found in zip(trainings, turns, seconds, strict=True):
            before = (training.processor, training.step)
            next(turn)
            if number:  # the first turn compiles
                found.append((training.processor - before[0]) / (training.step - before[1]))
    ratios = [row / recipe for recipe, row in zip(*seconds, strict=True)]
    about = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {**about, "recipe": statistics.median(seconds[0])}


def steps_for(about: dict[str, Any], model: Model) -> int:
    """Returns how many steps take the model's processor seconds on this machine when nothing slows it."""
    if harness.TINY:
        return model.seconds // 30
    paces = about["paces"]
    ratio = 1.0 if model.side == RECIPE else paces["ratios"][model.side]["ratio"]
    return max(1, round(model.seconds / (paces["step_seconds"] * ratio)))


def measure(bench: Bench, model: Model, steps: int) -> dict[str, Any]:
    """Trains and scores one model. Raises OutOfTime.

    Keeps the row and the score in a file of `Places.scores`, for repeated calls and for `compared`.
    """
    path = model.kept(bench.places.scores)
    if path.exists():
        with np.load(path) as kept:
            if (row := json.loads(str(kept["row"])))["steps"] == steps:
                return dict(row)
    longer = f"-{model.seconds}" if descends(model.side, model.change) else ""
    folder = bench.places.state / f"{model.name}-{model.seed}{longer}"
    training = made(bench, model.side, model.change, model.seed, folder)
    train(training, steps, folder, bench.places.until)
    denoiser, scored = training.denoiser(), folder / path.stem
    score = bench.score(denoiser, scored, model.layer or bench.layer, model.count or bench.count)
    low, high = score.interval()
    row = {
        "steps": steps,
        "processor_seconds": training.processor,
        "parameters": training.parameters,
        "error": error(denoiser, bench.test),
        "fid": score.value,
        "low": max(0.0, low),
        "high": high,
    }
    assert score.influence is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    influence = score.influence.astype(np.float32)
    np.savez(temporary, row=json.dumps(row), value=score.value, error=score.error, influence=influence)
    if model.phase == "hour":
        shape = tuple(bench.images.shape[1:])
        drawn = course.draw_images(denoiser, shape, range(GRID), bench.row, "cpu")
        arrays.write_png(bench.places.pictures / "ledger-grid.png", arrays.grid(drawn, 20))
    temporary.replace(path)
    shutil.rmtree(scored if model.side in (RECIPE, *CANDIDATES, *PEERS) else folder)  # a longer training may follow
    return row


def compared(model: Model, folder: Path) -> dict[str, float] | None:
    """Returns the difference of a model's FID from the baseline's of the same phase, seed and time, if both are kept."""
    paths = model.kept(folder), replace(model, side=RECIPE, change={}).kept(folder)
    if model.side == RECIPE or not all(path.exists() for path in paths):
        return None
    scores = []
    for path in paths:
        with np.load(path) as kept:
            scores.append(Estimate(float(kept["value"]), float(kept["error"]), kept["influence"].astype(float)))
    found = intervals.difference(*scores)
    low, high = found.interval()
    return {"value": found.value, "low": low, "high": high, "of": scores[1].value}


@dataclass(frozen=True)
class Model:
    """A row of the ledger. layer, count: Inception layer and samples of its score; 0: as in the baseline."""

    phase: str
    side: str
    change: dict[str, Any]
    seed: int
    seconds: int
    layer: int = 0
    count: int = 0

    @property
    def key(self) -> str:
        return f"{self.seed}, {self.seconds} s"

    @property
    def name(self) -> str:
        """The name of the model's files: the side, and a hash of the change."""
        digest = hashlib.sha256(json.dumps(self.change, sort_keys=True).encode()).hexdigest()[:8]
        return f"{re.sub('[ ,]+', '-', self.side)}-{digest}"

    def kept(self, folder: Path) -> Path:
        """The file of the score, which models of several phases may share."""
        large = f"-{self.layer}-{self.count}" if self.layer else ""
        return folder / f"{self.name}-{self.seed}-{self.seconds}{large}.npz"


def work() -> Iterator[Model]:
    """Yields the models in the order in which they are measured."""
    for seed, side in product(range(SEEDS), CHANGES):
        yield Model("screening", side, CHANGES[side], seed, SCREENING)
    sides: dict[str, dict[str, Any]] = {**CHANGES, **LARGER, **{peer: {} for peer in PEERS}}
    for seed, side in product(range(REPLICATES), (RECIPE, *CANDIDATES, *PEERS)):
        whole = side not in CANDIDATES or side == WINNER
        for seconds in MARKS if whole else MARKS[:2] if seed == 0 else ():
            yield Model("curves", side, sides[side], seed, seconds)
    for side in (RECIPE, WINNER):
        yield Model("large", side, sides[side], 0, MARKS[-1], *LARGE)
    yield Model("hour", WINNER, sides[WINNER], 0, HOUR)


def draw(about: dict[str, Any], path: Path) -> None:
    """Draws the mean FID of each side of `curves` against processor minutes, with the range over its trainings."""
    lines = {}
    for side, rows in about.get("curves", {}).items():
        if side in CANDIDATES and side != WINNER:
            continue
        by_time: dict[str, list[dict[str, float]]] = {}
        for key, row in rows.items():
            if "failed" not in row:
                by_time.setdefault(key.partition(", ")[2], []).append(row)
        lines[side] = [
            {
                "minutes": float(time.removesuffix(" s")) / 60,
                "fid": statistics.fmean(row["fid"] for row in found),
                "low": min(row["fid"] for row in found),
                "high": max(row["fid"] for row in found),
            }
            for time, found in by_time.items()
        ]
    if lines:
        title = f"Inception layer {about['layer']}, {about['images']:,} samples, {about['point']}"
        curves.draw(lines, path, title, "processor minutes of training", "FID, with the range of trainings")


@cache
def bench_of(places: Places) -> Bench:
    """Loads the data once in each process."""
    params, dataset = load_prepared(BASELINE, places.images, places.state)
    point = params.points()[-1]
    scoring = replace(params.evaluation, images=20, layer=64) if harness.TINY else params.evaluation
    return Bench(
        recipe_of_params(params, point.schedule, tuple(dataset.train.shape[1:])),
        torch.from_numpy(np.array(dataset.train)),
        torch.from_numpy(spread(dataset.test, 256)),
        point.name,
        {**params.samplers[point.sampler].options(), "steps": point.steps},
        scoring.layer,
        scoring.images,
        places,
    )


def measure_in_turn(places: Places, models: list[tuple[Model, int]]) -> list[tuple[Model, dict[str, Any]]]:
    """Measures models one after another in this process. Returns the rows that are done in time.

    A training whose loss is not finite gives the row {"failed": MESSAGE}.
    """
    rows: list[tuple[Model, dict[str, Any]]] = []
    for model, steps in models:
        torch.set_num_threads(2 if model.phase == "hour" else 1)
        torch.set_flush_denormal(True)  # else a training that diverges takes many times as long
        try:
            if time.monotonic() > places.until:
                raise OutOfTime
            rows.append((model, measure(bench_of(places), model, steps)))
        except OutOfTime:
            break
        except SystemExit as error:
            rows.append((model, {"failed": str(error)}))
    return rows


def forget(about: dict[str, Any]) -> None:
    """Removes the rows and paces of changes that are not those of `work`."""
    known = about.setdefault("changes", {})
    current = json.loads(json.dumps({model.side: model.change for model in work()}))  # tuples become lists
    for side in [side for side, change in known.items() if current.get(side) != change]:
        for phase in ("screening", "curves", "large", "hour"):
            about.get(phase, {}).pop(side, None)
        about.get("paces", {"ratios": {}})["ratios"].pop(side, None)
    about["changes"] = current


def _end_with_parent() -> None:
    """Ends this process when its parent has ended, even if the parent was killed."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, get_context("spawn"), _end_with_parent)


def _pace(places: Places, model: Model) -> dict[str, float]:
    torch.set_num_threads(1)
    return pace(bench_of(places), model.side, model.change)


def measure_paces(places: Places, models: list[Model], about: dict[str, Any], path: Path, jobs: int) -> None:
    """Measures the paces of the models that `about` lacks.

    Raises SystemExit if the other paces are another machine's. See `measure_phase` for the arguments.
    """
    here = harness.machine("cpu", threads=1)
    paces = about.setdefault("paces", {"machine": here, "ratios": {}})
    wanted = {model.side: model for model in models if model.side not in paces["ratios"]}
    if wanted.keys() | paces["ratios"].keys() != {RECIPE}:
        wanted.pop(RECIPE, None)  # the baseline is timed against itself only if it is the only row
    if wanted and any(paces["machine"]["hardware"][key] != here["hardware"][key] for key in ("cpu", "cores")):
        raise SystemExit(
            f"{path}: the pace of {', '.join(wanted)} would be compared with those of another machine; "
            "measure on that machine, or name another folder with --out"
        )
    with _pool(jobs) as pool:
        running = {pool.submit(_pace, places, model): side for side, model in wanted.items()}
        for done in as_completed(running):
            found = paces["ratios"][running[done]] = harness._short(done.result())
            course.write_json(path, about)
            print(f"  {running[done]}: a step takes {found['ratio']:.3f} times the baseline's", flush=True)
    paces.setdefault("step_seconds", min(found["recipe"] for found in paces["ratios"].values()))
    course.write_json(path, about)


def record(about: dict[str, Any], model: Model, row: dict[str, Any]) -> None:
    """Adds a row to the results. Rows are sorted as in `work`."""
    rows = about.setdefault(model.phase, {})
    rows.setdefault(model.side, {})[model.key] = harness._short(row)
    order = [(other.side, other.key) for other in work() if other.phase == model.phase]
    about[model.phase] = {
        side: {key: rows[side][key] for other, key in order if other == side and key in rows[side]}
        for side in dict.fromkeys(side for side, _ in order)
        if side in rows
    }


def add_differences(about: dict[str, Any], scores: Path) -> None:
    """Adds the differences from the baseline to the rows. scores: the folder of the scores."""
    for model in work():
        row = about.get(model.phase, {}).get(model.side, {}).get(model.key)
        if row and "failed" not in row and (difference := compared(model, scores)):
            row["difference"] = harness._short(difference)


def missing(about: dict[str, Any], names: list[str]) -> list[Model]:
    """Returns the models without a row. names: the sides to measure besides the baseline; [] for all."""
    return [
        model
        for model in work()
        if (not names or model.side in (RECIPE, *names))
        and model.key not in about.get(model.phase, {}).get(model.side, {})
    ]


def measure_phase(places: Places, models: list[Model], about: dict[str, Any], path: Path, jobs: int) -> None:
    """Measures models of one phase and writes each row to the results.

    If a process fails, the others go on, and the first error is raised at the end.

    Args:
        places: folders, and the time limit.
        models: the models to measure.
        about: the results, changed in place.
        path: the file of the results.
        jobs: the number of trainings side by side.
    """
    bench = bench_of(places)
    with suppress(OutOfTime):
        bench.real(
            models[0].layer or bench.layer, models[0].count or bench.count
        )  # so that no two trainings compute them
    tasks: dict[tuple[str, int], list[tuple[Model, int]]] = {}
    for model in models:
        tasks.setdefault((model.side, model.seed), []).append((model, steps_for(about, model)))
    errors: list[BaseException] = []
    with _pool(jobs) as pool:
        for done in as_completed([pool.submit(measure_in_turn, places, task) for task in tasks.values()]):
            if error := done.exception():
                errors.append(error)
                continue
            for model, row in done.result():
                record(about, model, row)
                said = row.get("failed") or f"FID {row['fid']:.4g}, {row['steps']:,} steps"
                print(f"  {model.side}, {model.key}: {said}", flush=True)
            add_differences(about, places.scores)
            course.write_json(path, about)
            draw(about, places.pictures / "ledger.png")
    if errors:
        raise errors[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sides = sorted({model.side for model in work()})
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows: {', '.join(sides)}; default: everything")
    parser.add_argument("--images", type=Path, help="folder of PNG files or zips to use instead of the baseline's data")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side; 1 leaves a core to other work")
    parser.add_argument("--minutes", type=float, default=60, help="time limit of this command, roughly")
    parser.add_argument("--state", type=Path, default=ROOT / ".cache" / "curves" / f"{NAME}-ledger")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in sides]:
        parser.error(f"unknown row {', '.join(unknown)}; choose from {', '.join(sides)}")
    until = time.monotonic() + options.minutes * 60
    path = options.out / RESULT
    places = Places(options.images, options.state, path.with_suffix(""), options.pictures, until)
    bench = bench_of(places)
    about = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    about |= {"layer": bench.layer, "images": bench.count, "point": bench.point}
    torch.set_num_threads(1)
    forget(about)
    measure_paces(places, missing(about, options.names), about, path, options.jobs)
    for phase, group in groupby(missing(about, options.names), lambda model: model.phase):
        if time.monotonic() < until:
            print(f"{phase}:", flush=True)
            measure_phase(places, list(group), about, path, options.jobs)
    print("out of time; repeat the command to continue" if missing(about, options.names) else "complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
