"""Renders report/index.html: the whole sweep on one page, which needs no network connection.

The page depends only on parameters and outputs of stages.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.files import arrays, models, paths, records
from ddpm.files.dataset import Dataset, DatasetRecord, spread
from ddpm.files.models import BoundRecord, TrainingRecord
from ddpm.files.params import Params
from ddpm.files.samples import Samples, read_samples
from ddpm.files.scores import Answer, Best, Front, Row, columns, extractor
from ddpm.parameters import Point
from ddpm.reporting.diagnostics import data_mean_square, schedule_of
from ddpm.reporting.identity import key, parameters
from ddpm.reporting.plots import COLOURS, DASHES, MARKERS, draw_scores, panels, pictures, protocol
from ddpm.reporting.templates import render
from ddpm.scores.conclusions import Trainings, from_the_best
from ddpm.scores.copying import Copying, Suspects, affordable, copying, nearest, suspect
from ddpm.scores.metrics import COPYING, RANKING, entries

TITLES = {"reference_images": "reference images"}  # titles of columns other than scores
HIGHLIGHTED = (10, 50)  # the budgets whose answers the page highlights
SHOWN = 10  # the number of images of each point, and the number of samples beside their nearest training images
MOST_NAMES = 6  # the largest number of points that an answer lists by name
LARGEST = 64  # the largest side of an image in pixels; larger images are scaled down
MOST_CLASSES = 20  # the largest number of classes whose samples are shown
SIGNIFICANT_Z = 3.0  # from this many standard errors on, samples count as nearer to training images

# The parts of the page that DVC does not track. report/run.js fills them in; the copy in MLflow contains them.
PARTS = ("compared", "published", "local")
WIDE = (700, 400)  # width and height of a single figure for a desktop, in hundredths of an inch
NARROW = (420, 460)  # width and height of the figures for a phone, in hundredths of an inch

Section = dict[str, Any]  # the values of one section, for the template


def page(
    params: Params,
    root: Path,
    rows: Sequence[Row],
    best: Best,
    front: Front,
    trained: Sequence[Trainings],
    dataset: Dataset,
    samples: Mapping[str, arrays.Images],
    plot: bytes,
) -> str:
    """Returns the text of report/index.html.

    Args:
        params: the parameters of the sweep.
        root: the folder that holds metrics/ and samples/.
        rows: the rows of points.csv.
        best, front: the contents of best.json and front.json.
        trained: the scores of each schedule's trainings, with the best point's sampler and steps. The best point's schedule is
            first.
        dataset: the prepared dataset.
        samples: the first images of each point by its name, uint8 N,C,H,W, in the order of the rows.
        plot: the plot of all scores, PNG.

    Raises:
        InputError: a record or table of a training, a likelihood or a sample set cannot be read.
    """
    points, training = {row.point: row for row in rows}, _training(params, root)
    known, drawn = entries(), read_samples(root / paths.samples_file(Point.parse(best.row.point)))
    return render(
        "report.html.jinja",
        title=f"{dataset.record.name}: which schedule, which sampler, how many steps?",
        metric=RANKING,
        rows=rows,
        table=[(row.point, row.to_json()) for row in rows],
        columns={name: known[name].title if name in known else TITLES.get(name, name) for name in _columns(rows)},
        intervals=[name for name, entry in known.items() if entry.interval and name == entry.name],
        extractor=extractor(best.row.extractor).title,
        best=best.row,
        answers=_answers(front, rows),
        front=front,
        protocol=protocol(rows),
        key=key(params, rows, dataset.record),
        scores_plot={
            "wide": "data:image/png;base64," + base64.b64encode(plot).decode(),
            "narrow": _narrow(rows, front),
        },
        strips={name: (points[name], *_row(images[:SHOWN])) for name, images in samples.items()},
        shown=SHOWN,
        classes=_by_class(drawn, dataset.record),
        all_classes=len(dataset.record.classes or ()),
        training=training,
        lengths=_lengths(params, rows),
        trainings=list(zip(trained, from_the_best(trained), strict=True)),
        seeds=how_sure_of_schedules(trained),
        likelihood=_likelihood(params, root),
        schedules=_schedules(params, training["last"], dataset.record),
        neighbours=_neighbours(drawn.images, best, dataset, params.training.flip),
        dataset=dataset.record,
        preview=_png(arrays.grid(spread(dataset.train, 2 * SHOWN), columns=2 * SHOWN))
        if _small(dataset.train)
        else None,
        parameters=parameters(params),
        nearer=COPYING.title,
        parts={name: _marks(name) for name in PARTS},
    )


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def publish_with(page: str, parts: Mapping[str, str]) -> str:
    """Replaces parts of a page, by their names in PARTS. Raises ValueError if the page has no section for the lineage."""
    for name, content in parts.items():
        begin, end = _marks(name)
        head, begun, rest = page.partition(begin)
        _, ended, tail = rest.partition(end)
        if begun and ended:
            page = f"{head}{begin}\n{content}\n{end}{tail}"
        elif name == "published":  # pages of all versions have this part
            raise ValueError("this page has no section for lineage")
    return page


def _columns(rows: Sequence[Row]) -> list[str]:
    """Returns the columns of the table of all points.

    Omits the steps, since they are part of the point's name; the ends of the intervals, since they are shown beside the scores;
    and settings that are the same for all points.
    """
    known, protocol = entries(), ("images", "reference_images", "layer", "extractor")
    omitted = {name for name, entry in known.items() if name != entry.name}
    omitted |= {"steps", "confidence", *(name for name, entry in known.items() if not entry.title)}
    omitted |= {name for name in protocol if len({getattr(row, name) for row in rows}) == 1}
    return [name for name in columns(rows) if name not in omitted]


# The answer.


def _answers(front: Front, rows: Sequence[Row]) -> list[Section]:
    """Returns the best point within each budget of network evaluations. Merges adjacent budgets that allow the same points."""
    answers: list[Section] = []
    for budget, entry in front.budgets.items():
        within = sum(row.evaluations <= budget for row in rows)
        if answers and (answers[-1]["entry"], answers[-1]["within"]) == (entry, within):
            answers[-1]["budgets"].append(budget)
        else:
            answers.append({"budgets": [budget], "entry": entry, "within": within})
    for answer in answers:
        answer["sure"] = how_sure(answer["entry"], answer["within"], front.confidence, front.margin)
        answer["highlighted"] = any(budget in HIGHLIGHTED for budget in answer["budgets"])
    return answers


def how_sure(entry: Answer, points: int, confidence: float, margin: float) -> str:
    """Returns sentences that say how sure the choice of the best point is.

    Args:
        entry: the best point within a budget.
        points: the number of points within that budget.
        confidence: the confidence, such as 0.95, that the truly best point is one of `entry.may_be_best`.
        margin: how much worse than the truly best point a cheaper point may be, as a share of the best score.
    """
    if points == 1:
        return f"{entry.point} is the only point that the budget allows."
    names, sure = entry.may_be_best, f"{confidence:.0%}"
    better = "higher" if RANKING.direction > 0 else "lower"
    if len(names) == 1 and names[0] != entry.point:
        return _nearly(entry, better, sure, margin)
    if len(names) == 1:
        return f"With {sure} confidence, {entry.point} is the best of the {points} points."
    among = (
        f"With {sure} confidence, the best of the {points} points that the budget allows is one of these {len(names)}"
    )
    more = len(names) - MOST_NAMES
    listed = ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
    if entry.point == entry.lowest:
        title = f"{better.replace('er', 'est')} {RANKING.title}"
        return f"Not certain. This point has the {title}, but may not be the best. {among}: {listed}."
    return f"{_nearly(entry, better, sure, margin)} {among}: {listed}."


def _nearly(entry: Answer, better: str, sure: str, margin: float) -> str:
    """Returns a sentence that says why a point is best although another point has a better score."""
    return (
        f"{entry.lowest} has a {better} {RANKING.title}, but {entry.point} takes fewer evaluations and, with {sure} confidence,"
        f" is at most {100 * margin:g}% worse than the truly best point."
    )


def how_sure_of_schedules(trained: Sequence[Trainings]) -> str:
    """Returns sentences that say how much a comparison of schedules depends on the seeds of the trainings.

    trained: the trainings of each schedule; the best point's schedule is first.
    """
    first = trained[0]
    if all(each.spread is None for each in trained):
        schedules = "Each schedule was" if len(trained) > 1 else "The schedule was"
        return (
            f"{schedules} trained once, so a score describes one model, not its schedule. Another seed may change the order. To"
            " measure this effect, add rows to the section schedules of params.yaml that differ only in their seed."
        )
    sentences = [
        f"The scores of the {each.count} trainings of {each.schedule} have a standard deviation of {each.spread.value:.3g}"
        f" ({each.spread.low:.3g} to {each.spread.high:.3g}). The standard error from sampling is {each.spread.sampling:.3g}."
        for each in trained
        if each.spread is not None
    ]
    if first.spread is None:
        sentences.append(f"The schedule {first.schedule} was trained once, so its score describes only this model.")
    return " ".join(sentences)


# Pictures.


def _two(draw: Any) -> dict[str, str]:
    """Draws a figure of two panels twice: side by side, and stacked for a phone. Returns both pictures."""
    return pictures(draw, 1000, 400, (NARROW[0], 2 * NARROW[1] - 100))


def _narrow(rows: Sequence[Row], front: Front) -> str:
    """Returns the plot of all scores for a phone."""
    names = [step.point for step in front.steps]
    return pictures(lambda figure: draw_scores(figure, rows, front=names), *NARROW, NARROW)["narrow"]


def _png(picture: arrays.Images) -> str:
    """Returns a uint8 picture C,H,W as the data URI of a PNG."""
    from PIL import Image

    pixels = picture[0] if picture.shape[0] == 1 else picture.transpose(1, 2, 0)
    written = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(written, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def _small(images: arrays.Images) -> bool:
    return max(images.shape[2:]) <= LARGEST


def _strip(images: arrays.Images) -> str:
    """Draws images side by side, each at most LARGEST pixels wide and high. Returns a data URI."""
    from PIL import Image

    if not _small(images):
        scale = LARGEST / max(images.shape[2:])
        size = [max(1, round(side * scale)) for side in images.shape[:1:-1]]
        channels = [[Image.fromarray(channel).resize(size, Image.Resampling.LANCZOS) for channel in i] for i in images]
        images = np.stack([np.stack([np.asarray(channel) for channel in image]) for image in channels])
    return _png(arrays.grid(images, columns=len(images)))


# Sections.


Table = list[dict[str, float | None]]


def _table(root: Path, record: Path, files: Mapping[str, str], table: Path) -> Table:
    """Reads a CSV file of numbers and empty cells. Raises InputError if the hash of the file is not the one in `files`."""
    rows = records.read_csv(records.read_described(record, files, root / table))
    return [{key: float(cell) if cell else None for key, cell in row.items()} for row in rows]


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def _lines(axes: Any, tables: Mapping[str, list[dict[str, float | None]]], x: str, y: str, **style: Any) -> bool:
    """Draws a line for each schedule. Returns whether anything was drawn."""
    drawn = False
    for index, (name, table) in enumerate(tables.items()):
        known = [(row[x], row[y]) for row in table if row.get(x) is not None and row.get(y) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), **{**_style(index), "label": name, **style})
            drawn = True
    return drawn


def check_records(params: Params, root: Path) -> None:
    """Raises InputError if the record of a training or a likelihood bound cannot be read. Called before anything is drawn."""
    for name in params.sweep.schedules:
        _trained(root, name)
        _bound(root, name)


def _trained(root: Path, schedule: str) -> tuple[TrainingRecord | None, Table, Table]:
    """Reads the record of a training, the loss history and the losses by timestep. Raises InputError.

    Returns (None, [], []) if the record does not exist.
    """
    path = paths.training_metrics_file(schedule)
    if not (root / path).exists():
        return None, [], []
    record = models.read_training(root, schedule)
    history, by_time = paths.history_file(schedule), paths.losses_by_time_file(schedule)
    return record, _table(root, path, record.files, history), _table(root, path, record.files, by_time)


def _bound(root: Path, schedule: str) -> tuple[BoundRecord | None, Table]:
    """Reads the record and the curve of a likelihood bound. Returns (None, []) without a record. Raises InputError."""
    path = paths.likelihood_file(schedule)
    if not (root / path).exists():
        return None, []
    record = models.read_bound(root, schedule)
    return record, _table(root, path, record.files, paths.likelihood_curve_file(schedule))


def _training(params: Params, root: Path) -> Section:
    """Returns the plot of the losses, over steps and over timestep, and the record of each training."""
    found = {name: _trained(root, name) for name in params.sweep.schedules}
    last = {name: record for name, (record, _, _) in found.items() if record is not None}
    curves = {name: history for name, (_, history, _) in found.items()}
    by_time = {name: losses for name, (_, _, losses) in found.items()}

    def draw(figure: Any) -> None:
        left, right = panels(figure)
        for index, (name, table) in enumerate(curves.items()):
            marker = {
                "color": COLOURS[index % len(COLOURS)],
                "marker": MARKERS[index % len(MARKERS)],
                "linestyle": "none",
            }
            _lines(left, {name: table}, "step", "loss", **_style(index))
            _lines(left, {name: table}, "step", "validation_loss", **marker, label=f"{name}, validation")
        left.set(xlabel="optimiser step", ylabel="loss", title="training", yscale="log")
        _lines(right, by_time, "t", "loss_simple")
        right.set(
            xlabel="timestep t",
            ylabel="mean squared error of the prediction",
            title="loss by timestep",
            yscale="log",
        )
        _finish(figure)

    drawable = any(curves.values()) or any(by_time.values())
    return {"plot": _two(draw) if drawable else None, "last": last}


def _lengths(params: Params, rows: Sequence[Row]) -> dict[str, str] | None:
    """Draws the scores against the length of the weights' average; None if no two samplers differ only in this length."""
    points, lines = {row.point: row for row in rows}, dict[str, list[tuple[float, Row]]]()
    alike: dict[str, list[tuple[float, str]]] = {}
    for name in params.sweep.samplers:
        if (length := params.samplers[name].ema) is not None:
            alike.setdefault(json.dumps(replace(params.samplers[name], ema=None).options()), []).append((length, name))
    groups = [group for group in alike.values() if len(group) > 1]
    for schedule, group, steps in product(params.sweep.schedules, groups, params.sweep.steps):
        label = f"{schedule}, {steps} steps"
        if len(groups) > 1:
            label += f", {'/'.join(name for _, name in group)}"
        lines[label] = [(length, points[f"{schedule}-{name}-{steps}"]) for length, name in sorted(group)]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for index, (label, line) in enumerate(lines.items()):
            values = np.array([row.value for _, row in line])
            reach = [values - [row.low for _, row in line], [row.high for _, row in line] - values]
            style = {**_style(index), "marker": MARKERS[index % len(MARKERS)], "capsize": 3}
            axes.errorbar([length for length, _ in line], values, yerr=reach, label=label, **style)
        axes.set(xlabel="length of the average, as a share of the training", ylabel=RANKING.title)
        _finish(figure)

    return pictures(draw, *WIDE, NARROW) if lines else None


def _likelihood(params: Params, root: Path) -> Section:
    """Returns the likelihood bound of each schedule, and the plot of the rate-distortion curves."""
    found = {name: _bound(root, name) for name in params.sweep.schedules}
    scores = {name: record for name, (record, _) in found.items() if record is not None}
    curves = {name: curve for name, (record, curve) in found.items() if record is not None}

    def draw(figure: Any) -> None:
        left, right = panels(figure)
        _lines(left, curves, "rate", "distortion")
        left.set(xlabel="rate (bits/dim)", ylabel="distortion (RMSE in grey levels)", title="rate and distortion")
        _lines(right, curves, "time", "rate")
        right.set(xlabel="timestep t (right: noise, left: image)", ylabel="rate (bits/dim)")
        right.set_title("rate by timestep")
        _finish(figure)

    return {"scores": scores, "plot": _two(draw) if any(curves.values()) else None}


def _finish(figure: Any) -> None:
    for axes in figure.axes:
        axes.grid(which="both", alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.set_layout_engine("tight")


def _schedules(params: Params, trained: Mapping[str, TrainingRecord], data: DatasetRecord) -> Section:
    """Summarises the effect of each noise schedule of the sweep on this data.

    An imported network has its own T, which is in the training record. Without that record, `unknown` lists the schedule.
    """
    from ddpm.diffusion.forward import summary

    square, rows, unknown = data_mean_square(data), {}, []
    for name in params.sweep.schedules:
        imported = params.schedules[name].imported is not None
        known = trained[name].timesteps if name in trained else None
        T = known if imported else params.diffusion.timesteps
        if T is None:
            unknown.append(name)
        else:
            rows[name] = summary(schedule_of(params, name, T), square)
    return {"rows": rows, "unknown": unknown}


def _row(images: arrays.Images) -> tuple[str, int]:
    """Returns a picture of the images side by side, and the number of images."""
    return _strip(images), len(images)


def _by_class(drawn: Samples, data: DatasetRecord) -> dict[str, tuple[str, int]]:
    """Returns a picture of the first samples of each class and the number of images in it, by class; {} without labels."""
    found: dict[str, tuple[str, int]] = {}
    for label, name in enumerate((data.classes or ())[:MOST_CLASSES] if drawn.labels is not None else ()):
        if len(chosen := np.flatnonzero(drawn.labels == label)[:SHOWN]):
            found[name] = _row(np.asarray(drawn.images[chosen]))
    return found


def _neighbours(samples: arrays.Images, best: Best, dataset: Dataset, mirrored: bool) -> Section:
    """Compares samples of the best point with their nearest training images. Returns the numbers, and the nearest pairs.

    Compares only the first samples if all of them would take too long (see `affordable`).

    Args:
        samples: the samples of the best point, uint8 N,C,H,W.
        best: the content of best.json.
        dataset: the prepared dataset.
        mirrored: whether mirror images of training images count as training images.
    """
    samples = np.asarray(samples[: affordable(len(samples), dataset.train)])
    index, distance = nearest(samples, dataset.train, mirrored)
    compared = affordable(len(dataset.test), dataset.train) if len(dataset.test) else 0
    unseen = nearest(spread(dataset.test, compared), dataset.train, mirrored)[1] if compared else np.empty(0)
    found, suspects = (copying(distance, unseen), suspect(distance, unseen)) if compared else (None, None)
    suspected = set(suspects.samples) if suspects else set()
    closer, z = (best.row.values.get(name) for name in COPYING.entries)
    in_features = None if closer is None or z is None else Copying(closer, z, 0)
    return {
        "pairs": [
            {
                "sample": _strip(samples[i : i + 1]),
                "train": _strip(np.asarray(dataset.train[index[i] : index[i] + 1])),
                "number": int(i),
                "index": int(index[i]),
                "distance": float(distance[i]),
                "suspected": i in suspected,
            }
            for i in np.argsort(distance, kind="stable")[:SHOWN]
        ],
        "median": float(np.median(distance)),
        "least": float(distance.min()),
        "unseen_median": float(np.median(unseen)) if len(unseen) else None,
        "compared": len(samples),
        "unseen": len(unseen),
        "copies": int((distance == 0).sum()),
        "unseen_copies": int((unseen == 0).sum()),
        "copying": found,
        "in_features": in_features,
        "verdict": verdict(found, in_features, suspects),
        "suspects": suspects,
        "mirrored": mirrored,
    }


def verdict(in_pixels: Copying | None, in_features: Copying | None, suspects: Suspects | None = None) -> str:
    """Returns a sentence that says whether the model memorises training images.

    Args:
        in_pixels: the comparison by pixels with unseen images; None without a test split.
        in_features: the comparison by features with unseen images; None if the scores do not contain it.
        suspects: the suspected copies; None without a test split.
    """
    if suspects is not None and suspects.beyond_chance:
        copies = f"{len(suspects.samples)} samples are suspected copies, but chance explains at most {suspects.most}."
        return f"{copies} {verdict(in_pixels, in_features).replace('No sign of memorising: by', 'Most samples look new: by')}"
    spaces = {"pixels": in_pixels, "features": in_features}
    z = {space: found.z for space, found in spaces.items() if found is not None}
    if not z:
        return "Unknown: there are no unseen images to compare the samples with."
    near, compared = [space for space in z if z[space] > SIGNIFICANT_Z], " and ".join(z)
    if not near:
        nearer = "samples lie not significantly nearer to training images than unseen images do"
        return f"No sign of memorising: by {compared}, {nearer}."
    nearer = "samples lie nearer to training images than unseen images do"
    if len(near) == 2:
        return f"A strong sign of memorising: by {compared}, {nearer}."
    other = "".join(f", but not by {space}" for space in z if space not in near)
    return f"A sign of memorising, or of smooth images: by {near[0]}, {nearer}{other}."
