"""`report`: the scores of the whole sweep -> one table, the best point, the best for each budget of evaluations, pictures,
and all of it on one page.

The best point is not simply the one of the best score, which may be so by luck: of the points that may be the best in truth
(intervals.may_be_best: the best is among them with 95 %, however many points there are; in pairs, since all points start from the
same noise), it is the one that takes the fewest network evaluations. The best for a budget is chosen in the same way from the
points within it.
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
    Gap,
    Row,
    Standing,
    Step,
    read_point_influence,
    read_scores,
    write_table,
)
from ddpm.parameters import Point
from ddpm.provenance import dvc_lock
from ddpm.reporting.page import SHOWN, check_records, page
from ddpm.reporting.plots import draw_scores, drawing
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.scores.choice import Candidate, choose, front
from ddpm.scores.intervals import CONFIDENCE, difference, simultaneous
from ddpm.scores.metrics import RANKING

BUDGETS = (10, 20, 50, 100, 1000)  # network evaluations an image, at most

FILES = ("best.json", PICTURE, "index.html", "points.csv", "samples.png")  # that front.json describes


def report(params: Params, root: Path = Path(), report: Report = silent) -> Best:
    """Writes report/ and returns what best.json holds.

    Removes what samples/ and metrics/ still hold of points that have left the sweep, where DVC can bring it back.
    Raises InputError when a point of the sweep has no scores.
    """
    points, lock = params.points(), dvc_lock.read(root)
    rows, candidates, protocols = _read_rows(points, root)
    check_records(params, root)
    if protocols > 1:
        message = "points were scored under different protocols; their scores don't compare (dvc repro)"
        report(Progress(0, len(points), "points", message=message))
    dataset, samples = read_dataset(root), {}
    for count, point in enumerate(points):
        report(Progress(count, len(points), "points"))
        found = read_samples(root / paths.samples_file(point), dataset)
        samples[point.name] = found.images[:SHOWN].copy()
    choice = choose(candidates)
    chosen = next(row for row in rows if row.point == choice.best.name)
    best = Best(chosen, len(rows), choice.leader.name, len(choice.tied))
    frontier = _front(candidates)
    with TemporaryDirectory(prefix="ddpm-report-") as name:
        with drawing(Path(name) / PICTURE, 1050, 675, dpi=150) as figure:
            draw_scores(figure, rows, front=[step.point for step in frontier.steps])
        plot = (Path(name) / PICTURE).read_bytes()
    text = page(params, root, rows, best, frontier, dataset, samples, plot)
    removed, kept = _prune(params, root, lock)  # all that is read has been read
    if removed:
        report(Progress(0, len(points), "points", message=f"removed what has left the sweep: {_few(removed)}"))
    if kept:
        message = f"not of the sweep, and kept because DVC has no copy: {_few(kept)}"
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


def _front(candidates: Sequence[Candidate]) -> Front:
    """Chooses for each budget, and among all points those that no other of as few evaluations beats.

    The intervals of the differences hold at once for all pairs of points, so also for these, which were picked by their scores.
    """
    budgets = {}
    for budget in BUDGETS:
        if within := [point for point in candidates if point.evaluations <= budget]:
            choice = choose(within)
            budgets[budget] = Answer(**vars(_standing(choice.best)), lowest=choice.leader.name, may_be_best=choice.tied)
    reach = simultaneous([point.estimate for point in candidates])
    steps, best = [], front(candidates)
    for before, point in zip([None, *best], best, strict=False):
        gap = None if before is None else _gap(point, before, reach)
        steps.append(Step(**vars(_standing(point)), gap=gap))
    return Front(CONFIDENCE, budgets, steps)


def _gap(point: Candidate, before: Candidate, reach: float) -> Gap:
    """reach: of the interval, in standard errors."""
    gap = difference(point.estimate, before.estimate)
    low, high = gap.value - reach * gap.error, gap.value + reach * gap.error
    return Gap(_rounded(gap.value), _rounded(low), _rounded(high), low > 0 or high < 0, gap.paired)


def _standing(point: Candidate) -> Standing:
    low, high = point.estimate.interval()
    low, high = max(RANKING.low, low), min(RANKING.high, high)
    return Standing(point.name, point.evaluations, point.estimate.value, _rounded(low), _rounded(high))


def _read_rows(points: Sequence[Point], root: Path) -> tuple[list[Row], list[Candidate], int]:
    """-> points.csv's rows, the same to choose from, and how many protocols they were scored under."""
    missing = [point.name for point in points if not (root / paths.metrics_file(point)).exists()]
    if missing:
        raise InputError(f"{root / 'metrics'}: no scores of {_few(missing)}; run `dvc repro` or `ddpm evaluate POINT`")
    rows, candidates, protocols = [], [], set()
    for point in points:
        scores = read_scores(root, point)
        protocols.add(tuple(getattr(scores, name) for name in PROTOCOL))
        influence = read_point_influence(root, point, scores)
        if len(influence) != scores.images:
            path = root / paths.metrics_file(point)
            raise InputError(f"{path}: not of the same run as its influence values; evaluate {point.name} again")
        candidates.append(Candidate(point.name, scores.evaluations, scores.estimate(influence)))
        rows.append(Row.of(point, scores))
    return rows, candidates, len(protocols)


def _prune(params: Params, root: Path, stages: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Removes the outputs of points and schedules that have left the sweep, if DVC's cache has them; -> removed, kept.

    The report depends on the folders samples/ and metrics/ whole, so they should hold the sweep and no more.
    """
    points, schedules = {point.name for point in params.points()}, set(params.sweep.schedules)
    point, schedule = r"[a-z0-9_]+-[a-z0-9_]+-[1-9][0-9]*", r"[a-z0-9_]+"
    some, first = params.points()[0], params.sweep.schedules[0]
    kinds = (
        ("sample", paths.samples_file(some).parent, point, r"\.npz|\.png", points),
        ("evaluate", paths.metrics_file(some).parent, point, r"\.json|\.influence\.npy", points),
        ("train", paths.history_file(first).parent, schedule, r"\.json|(\.by_time)?\.csv", schedules),
        ("likelihood", paths.likelihood_file(first).parent, schedule, r"\.json|\.csv", schedules),
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


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _plot_samples(path: Path, rows: Sequence[Row], samples: Mapping[str, arrays.Images]) -> None:
    """The first images of each point, one row a point: all start from the same noise, so columns compare."""
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
    """To 8 digits, as in metrics/."""
    return float(f"{value:.8g}")
