"""Compares settings of recipes/cifar10-cpu.yaml in equal processor time: `python -m bench.trials --seconds 240`.

Every row of CHANGES is trained for --seconds of processor time. It is scored by the recipe's protocol and by its error on
test images. Results: bench/results/trials-cifar10-cpu.json. The command stops after --minutes, and resumes from --state when
it is repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import course, harness
from bench.course import Course, OutOfTime, Recipe
from bench.curves import ROOT, load_prepared, recipe_of_params
from ddpm import Denoiser
from ddpm.scores import fidelity, inception

NAME = "cifar10-cpu"
# Each row changes one setting of the recipe or of its network.
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
    "dit": {"kind": "dit", "network": {"width": 192, "depth": 6, "heads": 3, "patch": 4}},
}
PACED = 30  # after the first row of losses, this many steps measure the speed, which decides the number of steps


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


def trial(
    recipe: Recipe, params: Any, dataset: Any, extractor: inception.Inception, seconds: float, state: Path, until: float
) -> dict[str, Any]:
    """Trains one recipe and scores it.

    Args:
        recipe: the changed recipe.
        params: the parameters of sampling and scoring.
        dataset: the prepared dataset.
        extractor: the feature extractor.
        seconds: processor seconds of training. They decide the number of steps, after the first rows of losses.
        state: folder from which to resume.
        until: time.monotonic() at which to stop.

    Raises:
        OutOfTime: `until` is reached.
    """
    shape, point, scoring = tuple(dataset.train.shape[1:]), params.points()[-1], params.evaluation
    here = Course.load(state, recipe, "cpu")
    first: tuple[float, int] | None = None
    if here.steps is None or here.training.step < here.steps:
        for _ in course.advance(here, recipe, torch.from_numpy(np.array(dataset.train)), "cpu"):
            now = (here.processor, here.training.step)
            first = first or now  # the first row also compiles
            if here.steps is None and now[1] - first[1] >= PACED:
                pace = (now[0] - first[0]) / (now[1] - first[1])
                here.steps = now[1] + max(0, round((seconds - now[0]) / pace))
            if time.monotonic() > until:
                break
        here.save(state)
        if here.steps is None or here.training.step < here.steps:
            raise OutOfTime
    denoiser = course.denoiser_of(here, recipe, "cpu")
    row = {**params.samplers[point.sampler].options(), "steps": point.steps}
    some, count = np.array(dataset.train[: scoring.images]), scoring.images
    real = course.features_of(
        lambda rows: some[rows.start : rows.stop], count, 100, extractor, state.parent / "real", until
    )
    made = course.features_of(
        lambda rows: course.draw_images(denoiser, shape, rows, row, "cpu"), count, 100, extractor, state / "made", until
    )
    test = torch.from_numpy(np.array(dataset.test[:256]))
    return {
        "steps": here.training.step,
        "processor_seconds": here.processor,
        "minutes": here.seconds / 60,
        "parameters": sum(parameter.numel() for parameter in here.training.net.parameters()),
        "error": error(denoiser, test),
        "layer": scoring.layer,
        "point": point.name,
        **course.fid(made, fidelity.statistics(real), "cpu"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trials", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows: {', '.join(CHANGES)}; default: all")
    parser.add_argument("--images", type=Path, help="folder of PNG files or zips to use instead of the recipe's data")
    parser.add_argument("--seconds", type=float, default=240, help="processor time of each training")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each row")
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads; default: the recipe's. Use 1 beside other work, since two threads would wait for each other",
    )
    parser.add_argument("--minutes", type=float, default=9, help="time limit of this command, roughly")
    parser.add_argument("--state", type=Path, default=ROOT / ".cache" / "curves" / f"{NAME}-trials")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in CHANGES]:
        parser.error(f"unknown row {', '.join(unknown)}; choose from {', '.join(CHANGES)}")
    until = time.monotonic() + options.minutes * 60
    params, dataset = load_prepared(NAME, options.images, options.state)
    if harness.TINY:
        params = params.model_copy(update={"evaluation": replace(params.evaluation, images=20, layer=64)})
    threads = options.threads or params.training.threads
    torch.set_num_threads(threads)
    recipe = recipe_of_params(params, params.points()[-1].schedule, tuple(dataset.train.shape[1:]))
    extractor = inception.load(params.evaluation.layer, ROOT / ".cache" / "inception")
    path = options.out / f"trials-{NAME}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["trials"] if path.exists() else {}
    try:
        for seed, change in product(range(options.seeds), options.names or CHANGES):
            name = f"{change}, seed {seed}" if seed else change
            if name in found:
                continue
            folder = options.state / name.replace(" ", "-")
            row = trial(
                replace(with_change(recipe, CHANGES[change]), seed=seed),
                params,
                dataset,
                extractor,
                options.seconds,
                folder,
                until,
            )
            found[name] = harness._short(row)
            about = {"trials": found, "machine": harness.machine("cpu", threads)}
            course.write_json(path, about)
            shutil.rmtree(folder)
            print(f"  {name}: FID {row['fid']:.4g}, error {row['error']:.4g}, {row['steps']:,} steps", flush=True)
    except OutOfTime:
        print("out of time; repeat the command to continue")
        return 0
    print("complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
