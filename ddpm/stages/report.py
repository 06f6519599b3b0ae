"""`report`: collects the scores of the sweep in a table, plots and a page, and chooses the best point.

A point is a schedule, a sampler and a number of steps. The report also chooses the best point for each budget, which limits the
network evaluations per image.

Among many points, the best score looks good partly by chance. So the page lists all points that cannot be told apart from the
best one. With 95% confidence, the truly best point is among them (intervals.compared_with_best).

"Best" is the cheapest point that is nearly as good as the truly best point. "Nearly" means with 95% confidence that its score is
worse by at most `report.margin`, a share of the best score. If no point is proven to be that good, "best" is the point with the
best score. The best point within a budget is chosen in the same way. The scores
of two points are compared image by image, since image i of every point starts from the same noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ddpm.errors import InputError
from ddpm.files import arrays, atomic, paths, records
from ddpm.files.dataset import read_dataset
from ddpm.files.params import Params
from ddpm.files.samples import read_samples
from ddpm.files.scores import (
    PICTURE,
    PROTOCOL,
    Answer,
    Best,
    Front,
    FrontStep,
    Gap,
    Row,
    Standing,
    read_point_influence,
    read_scores,
    write_table,
)
from ddpm.parameters import Point
from ddpm.provenance import dvc_lock
from ddpm.reporting.page import SHOWN, check_records, page
from ddpm.reporting.plots import draw_scores, drawing
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.scores.conclusions import Candidate, Choice, Trainings, choose, front, trainings
from ddpm.scores.intervals import CONFIDENCE, difference
from ddpm.scores.metrics import RANKING

BUDGETS = (10, 20, 50, 100, 1000)  # limits on the network evaluations per image

FILES = ("best.json", PICTURE, "index.html", "points.csv", "samples.png")  # files whose hashes front.json holds


def report(params: Params, root: Path = Path(), report: Report = silent) -> Best:
    """Writes report/ and returns the content of best.json.

    Removes files of points and schedules outside the sweep from samples/ and metrics/, if DVC can restore these files. Raises
    InputError if a point of the sweep has no scores.
    """
    params = params.resolved(root)
    points, lock = params.points(), dvc_lock.read(root)
    rows, candidates, protocols = _read_rows(points, root)
    check_records(params, root)
    if protocols > 1:
        message = "the points were scored under different protocols, so their scores do not compare; run `dvc repro`"
        report(Progress(0, len(points), "points", message=message))
    dataset, samples = read_dataset(root), {}
    for count, point in enumerate(points):
        report(Progress(count, len(points), "points"))
        found = read_samples(root / paths.samples_file(point), dataset)
        samples[point.name] = found.images[:SHOWN].copy()
    margin = params.report.margin
    choice = choose(candidates, margin)
    chosen = next(row for row in rows if row.point == choice.best.name)
    trained = _trainings(params, candidates, chosen)
    best = Best(chosen, len(rows), choice.leader.name, len(choice.tied), trained[0])
    frontier = _front(candidates, margin, choice)
    with TemporaryDirectory(prefix="ddpm-report-") as name:
        with drawing(Path(name) / PICTURE, 1050, 675, dpi=150) as figure:
            draw_scores(figure, rows, front=[step.point for step in frontier.steps])
        plot = (Path(name) / PICTURE).read_bytes()
    text = page(params, root, rows, best, frontier, trained, dataset, samples, plot)
    removed, kept = _prune(params, root, lock)  # after all files have been read
    if removed:
        message = f"removed outputs outside the sweep: {_shortened(removed)}"
        report(Progress(0, len(points), "points", message=message))
    if kept:
        message = f"kept outputs outside the sweep, because DVC has no copy: {_shortened(kept)}"
        report(Progress(0, len(points), "points", message=message))
    folder = root / paths.report_dir()
    write_table(folder / "points.csv", rows)
    records.write_record(folder / "best.json", best.to_json())
    with atomic.replacing(folder / PICTURE) as file:
        file.write_bytes(plot)
    _plot_samples(folder / "samples.png", rows, samples)
    atomic.write_text(folder / "index.html", text)
    records.write_record(folder / "front.json", frontier.to_json(), [folder / name for name in FILES])
    report(Progress(len(points), len(points), "points"))
    return best


def _trainings(params: Params, candidates: Sequence[Candidate], best: Row) -> list[Trainings]:
    """Summarises the scores of trainings that differ only in the seed, at the best point's sampler and steps.

    The summary for the best point's schedule comes first.
    """
    scores = {point.name: point.estimate for point in candidates}
    groups = sorted(params.replicates(), key=lambda group: best.schedule not in group)
    return [trainings(group[0], [scores[f"{name}-{best.sampler}-{best.steps}"] for name in group]) for group in groups]


def _front(candidates: Sequence[Candidate], margin: float, chosen: Choice) -> Front:
    """Chooses the best point for each budget, and the Pareto front.

    A point is on the front if its score is better than that of every other point that takes no more network evaluations. The
    intervals of the differences hold for all pairs of points together, so they also hold for pairs picked by their scores.

    Args:
        candidates: all points of the sweep.
        margin: report.margin.
        chosen: the choice among all candidates.
    """
    budgets, choices = {}, {len(candidates): chosen}
    for budget in BUDGETS:
        if within := [point for point in candidates if point.evaluations <= budget]:
            choice = choices[len(within)] = choices.get(len(within)) or choose(within, margin)
            budgets[budget] = Answer(**vars(_standing(choice.best)), lowest=choice.leader.name, may_be_best=choice.tied)
    steps, best = [], front(candidates)
    for before, point in zip([None, *best], best, strict=False):
        gap = None if before is None else _gap(point, before, chosen.reach)
        steps.append(FrontStep(**vars(_standing(point)), gap=gap))
    return Front(CONFIDENCE, margin, budgets, steps)


def _gap(point: Candidate, before: Candidate, reach: float) -> Gap:
    """Compares a point of the front with the point before it. reach: half the width of the interval, in standard errors."""
    gap = difference(point.estimate, before.estimate)
    low, high = gap.value - reach * gap.error, gap.value + reach * gap.error
    return Gap(_rounded(gap.value), _rounded(low), _rounded(high), low > 0 or high < 0, gap.paired)


def _standing(point: Candidate) -> Standing:
    low, high = point.estimate.interval()
    low, high = max(RANKING.low, low), min(RANKING.high, high)
    return Standing(point.name, point.evaluations, point.estimate.value, _rounded(low), _rounded(high))


def _read_rows(points: Sequence[Point], root: Path) -> tuple[list[Row], list[Candidate], int]:
    """Returns the rows of points.csv, the points as candidates, and in how many ways (protocols) the points were scored."""
    missing = [point.name for point in points if not (root / paths.metrics_file(point)).exists()]
    if missing:
        raise InputError(
            f"{root / 'metrics'}: no scores of {_shortened(missing)}; run `dvc repro` or `ddpm evaluate POINT`"
        )
    rows, candidates, protocols = [], [], set()
    for point in points:
        scores = read_scores(root, point)
        judged = {name: about["extractor_sha256"] for name, about in scores.judges.items()}
        protocols.add((*(getattr(scores, name) for name in PROTOCOL), *sorted(judged.items())))
        influence = read_point_influence(root, point, scores)
        if len(influence) != scores.images:
            path = root / paths.metrics_file(point)
            raise InputError(
                f"{path}: the influence values beside this file are from another run; evaluate {point.name} again"
            )
        candidates.append(Candidate(point.name, scores.evaluations, scores.estimate(influence)))
        rows.append(Row.of(point, scores))
    return rows, candidates, len(protocols)


def _prune(params: Params, root: Path, stages: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Removes the outputs of points and schedules that have left the sweep, if DVC's cache has copies.

    In dvc.yaml, the report depends on the whole folders samples/ and metrics/, so they should hold only the sweep.

    Returns:
        The names of the points and schedules whose files were removed, and the names of those whose files were kept.
    """
    points, schedules = {point.name for point in params.points()}, set(params.sweep.schedules)
    point, schedule = r"[a-z0-9_]+-[a-z0-9_]+-[1-9][0-9]*", r"[a-z0-9_]+"
    first_point, first_schedule = params.points()[0], params.sweep.schedules[0]
    kinds = (
        ("sample", paths.samples_file(first_point).parent, point, r"\.npz|\.png", points),
        ("evaluate", paths.metrics_file(first_point).parent, point, r"\.json|\.influence\.npy", points),
        ("train", paths.history_file(first_schedule).parent, schedule, r"\.json|(\.by_time)?\.csv", schedules),
        ("likelihood", paths.likelihood_file(first_schedule).parent, schedule, r"\.json|\.csv", schedules),
    )
    removed, kept = set(), set()
    for stage, folder, name, suffixes, wanted in kinds:
        for path in sorted((root / folder).glob("*")):
            match = re.fullmatch(f"({name})({suffixes})", path.name)
            if match is None or match[1] in wanted or path.is_dir():
                continue
            if dvc_lock.is_locked(stages, f"{stage}@{match[1]}", root, path.relative_to(root)):
                path.unlink()
                paths.run_file(path).unlink(missing_ok=True)
                removed.add(match[1])
            else:
                kept.add(match[1])
    return sorted(removed), sorted(kept)


def _shortened(names: Sequence[str]) -> str:
    """Joins the first five names, and says how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _plot_samples(path: Path, rows: Sequence[Row], samples: Mapping[str, arrays.Images]) -> None:
    """Draws the first images of each point in a row. All images in a column start from the same noise."""
    strips = [arrays.grid(samples[row.point][:SHOWN], columns=SHOWN).transpose(1, 2, 0) for row in rows]
    label, gap = 250, 4  # pixels
    height, width = strips[0].shape[:2]
    with drawing(path, label + width, len(rows) * (height + gap), dpi=100) as figure:
        for index, (row, strip) in enumerate(zip(rows, strips, strict=True)):
            bottom = (len(rows) - 1 - index) * (height + gap)
            figure.figimage(np.broadcast_to(strip, (*strip.shape[:2], 3)), xo=label, yo=bottom, origin="upper")
            middle = (bottom + height / 2) / (len(rows) * (height + gap))
            text = f"{row.point}   {RANKING.title} {row.value:.3g}"
            figure.text((label - 8) / (label + width), middle, text, ha="right", va="center", fontsize=9)


def _rounded(value: float) -> float:
    """Rounds to 8 digits, as `evaluate` does."""
    return float(f"{value:.8g}")
