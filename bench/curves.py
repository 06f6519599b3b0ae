"""Measures FID over minutes of training for a recipe on this CPU: `python -m bench.curves digits`.

The command stops after --minutes, and resumes when it is repeated. It scores the averaged weights at growing intervals by the
recipe's protocol, writes bench/results/curve-RECIPE.json and draws docs/images/curve-RECIPE.png. `draw` redraws all curves.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import course, harness
from bench.course import Course, Images, OutOfTime, Recipe
from ddpm.parameters import as_json

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "images"
GROWTH = 1.6  # the ratio of the training minutes at two successive scores
GREY = "#808080"  # these colours are readable on white and on black
COLOURS = ("#1f8fd6", "#e07b28", "#2aa876", "#c46bb0")

Line = Sequence[Mapping[str, Any]]


def recipe_of_params(params: Any, schedule: str, shape: tuple[int, ...]) -> Recipe:
    """Converts a parameter file to the recipe of one schedule. shape: C, H, W of an image."""
    row, training = params.schedules[schedule].options(), params.training
    network = as_json(params.network)
    kind = network.pop("kind")
    assert training.decay_to == 0, "bench trains to a learning rate of zero"
    return Recipe(
        network={"image_channels": shape[0], "image_size": shape[1], **network},
        schedule={"name": row.pop("schedule"), "steps": params.diffusion.timesteps, **row},
        target=params.diffusion.target,
        batch=training.batch,
        learning_rate=training.learning_rate,
        warmup=training.warmup,
        ema=training.ema,
        loss=training.loss,
        clip=training.clip,
        flip=training.flip,
        precision=training.precision,
        compiled=training.compile,
        log_every=10,
        seed=params.seed,
        kind=kind,
        optimizer=training.optimizer,
        weight_decay=training.weight_decay,
        descent=None if training.decay == "none" else (training.decay, training.decay_share),
        pairing=training.pairing,
        times=training.times,
    )


def load_prepared(path: Path, images: Path | None, state: Path) -> tuple[Any, Any]:
    """Returns the parameters of a file and their dataset. Prepares the dataset on the first call."""
    from ddpm.files.dataset import read_dataset
    from ddpm.files.params import Params
    from ddpm.runtime import compiling
    from ddpm.stages.prepare import prepare

    params = Params.load(path)
    auto, _ = compiling.probe(torch.device("cpu"))
    params = params.model_copy(update={"training": auto.within(params.training)})
    if images is not None:
        data = replace(params.data, source="image_folder", path=str(images.resolve()))
        params = params.model_copy(update={"data": data})
    if not (state / "dataset").exists():
        prepare(params, state)
    return params, read_dataset(state)


def is_due(here: Course, first: float) -> bool:
    """Returns whether a score is due: at the last step, or after GROWTH times the minutes of the last score."""
    last = here.scores[-1] if here.scores else {"step": 0, "minutes": 0.0}
    if here.training.step == last["step"]:
        return False
    return here.training.step == here.steps or here.seconds >= max(first, last["minutes"] * 60 * GROWTH)


def measure(
    name: str, params: Any, dataset: Any, point: Any, state: Path, out: Path, until: float, first: float
) -> bool:
    """Trains to the recipe's last step and scores along the way.

    Args:
        name: the recipe.
        params: the parameters of the recipe.
        dataset: the prepared dataset of the recipe.
        point: the point whose sampler draws the images.
        state: folder from which to resume.
        out: folder for curve-NAME.json.
        until: time.monotonic() at which to stop.
        first: seconds of training until the first score.

    Returns:
        True, once the curve is complete.

    Raises:
        OutOfTime: `until` is reached.
    """
    from ddpm.scores import fidelity, inception
    from ddpm.stages.evaluate import reference_images

    shape, scoring = tuple(dataset.train.shape[1:]), params.evaluation
    recipe = recipe_of_params(params, point.schedule, shape)
    row = {**params.samplers[point.sampler].options(), "steps": point.steps}
    torch.set_num_threads(params.training.threads)
    extractor = inception.load(scoring.layer, ROOT / ".cache" / "inception")
    here = Course.load(state, recipe, "cpu")
    here.steps = params.training.steps
    denoiser = course.denoiser_of(here, recipe, "cpu")
    some = reference_images(dataset.train, scoring.images)

    def features_of(make: Callable[[range], Images], folder: Path) -> NDArray[np.float32]:
        return course.features_of(make, scoring.images, 100, extractor, folder, until)

    def score() -> None:
        real = fidelity.statistics(features_of(lambda rows: some[rows.start : rows.stop], state / "real"))
        folder = state / "features"
        scored = course.fid(
            features_of(lambda rows: course.draw_images(denoiser, shape, rows, row, "cpu"), folder), real, "cpu"
        )
        shutil.rmtree(folder)
        times = {"minutes": here.seconds / 60, "processor_minutes": here.processor / 60}
        loss = float(np.mean([loss for _, loss in here.losses[-10:]]))
        here.scores.append({"step": here.training.step, **times, "loss": loss, **scored})
        here.save(state)
        about = {"recipe": name, "point": point.name, "layer": scoring.layer, "steps": here.steps, "curve": here.scores}
        about |= {
            "complete": here.training.step == here.steps,
            "parameters": sum(p.numel() for p in here.training.net.parameters()),
        }
        about |= {"machine": harness.machine("cpu", params.training.threads)}
        course.write_json(out / f"curve-{name}.json", harness._short(about))
        print(f"  step {here.training.step:,}, {times['minutes']:.2f} min: FID {scored['fid']:.4g}", flush=True)

    if is_due(here, first):  # the last command stopped before this score
        score()
    for _ in course.advance(here, recipe, torch.from_numpy(np.array(dataset.train)), "cpu"):
        over = time.monotonic() > until
        if is_due(here, first) or over:
            here.save(state)
        if over:
            raise OutOfTime
        if is_due(here, first):
            score()
    return True


def draw(
    lines: Mapping[str, Line],
    path: Path,
    title: str,
    x: str = "minutes of training",
    y: str = "FID, with 95% intervals",
) -> None:
    """Draws FID against minutes. The transparent background suits light and dark pages. Equal content gives equal bytes.

    Args:
        lines: the scores of each line, by name.
        path: the PNG file.
        title: the title of the figure.
        x, y: the titles of the axes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(7, 4), dpi=120)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for colour, marker, (name, rows) in zip(COLOURS, "os^D", lines.items(), strict=False):
            minutes, fids = [row["minutes"] for row in rows], np.array([row["fid"] for row in rows])
            bars = [fids - [row["low"] for row in rows], [row["high"] for row in rows] - fids]
            axes.errorbar(minutes, fids, yerr=bars, color=colour, marker=marker, capsize=3, linewidth=2, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="clip")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(x, color=GREY)
        axes.set_ylabel(y, color=GREY)
        axes.set_title(title, color=GREY, fontsize="medium")
        axes.tick_params(which="both", colors=GREY)
        axes.grid(which="both", color=GREY, alpha=0.3)
        for spine in axes.spines.values():
            spine.set_color(GREY)
        axes.legend(labelcolor=GREY, facecolor="none", edgecolor=GREY)
        figure.set_layout_engine("tight")
        written = io.BytesIO()
        figure.savefig(written, format="png", transparent=True, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(written.getvalue())


def draw_all(results: Path, pictures: Path) -> list[Path]:
    """Draws every curve that has results, and returns the paths of the pictures."""
    drawn = []
    for source in sorted(results.glob("curve-*.json")):
        about = json.loads(source.read_text(encoding="utf-8"))
        if about["curve"]:
            title = f"Inception layer {about['layer']}, {about['curve'][-1]['images']:,} samples, {about['point']}"
            drawn.append(pictures / f"{source.stem}.png")
            draw({about["recipe"]: about["curve"]}, drawn[-1], title)
    found = {}
    for name in ("fast", "paper"):
        source = results / f"cifar10-{name}.json"
        if source.exists() and (about := json.loads(source.read_text(encoding="utf-8")))["curve"]:
            found[name] = about["curve"]
    if found:
        drawn.append(pictures / "curve-cifar10.png")
        draw(found, drawn[-1], f"CIFAR-10, Inception layer {about['layer']}, {found[name][-1]['images']:,} samples")
    return drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__)
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    parser.add_argument("what", choices=["draw", *recipes])
    parser.add_argument("--images", type=Path, help="folder of PNG files or zips to use instead of the recipe's data")
    parser.add_argument("--point", help="SCHEDULE-SAMPLER-STEPS; default: the recipe's last point")
    parser.add_argument("--minutes", type=float, default=9, help="time limit of this command, roughly")
    parser.add_argument("--first", type=float, default=5, help="seconds of training until the first score")
    parser.add_argument("--state", type=Path, help="folder to resume from; default: .cache/curves/RECIPE")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    options = parser.parse_args(arguments)
    if options.what != "draw":
        from ddpm.parameters import Point

        until = time.monotonic() + options.minutes * 60
        state = options.state or ROOT / ".cache" / "curves" / options.what
        params, dataset = load_prepared(ROOT / "recipes" / f"{options.what}.yaml", options.images, state)
        point = Point.parse(options.point) if options.point else params.points()[-1]
        try:
            measure(options.what, params, dataset, point, state, options.out, until, options.first)
            print("complete")
        except OutOfTime:
            print("out of time; repeat the command to continue")
    for path in draw_all(options.out, options.pictures):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
