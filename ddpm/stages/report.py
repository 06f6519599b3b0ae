"""`report`: the scores of the whole sweep -> one table, the best point, FID against evaluations, samples side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.stages import store
from ddpm.stages.errors import InputError
from ddpm.stages.params import Params, Point
from ddpm.stages.progress import Progress, Report, silent

SIDE_BY_SIDE = 10  # images of each point
SCORES = ("evaluations", "fid", "kid", "kid_std", "images", "reference_images", "layer")
PROTOCOL = ("reference", "extractor_sha256", "layer", "images", "reference_images")

# Okabe and Ito's colours, told apart by colour-blind readers; markers and dashes tell lines apart in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")

Row = dict[str, Any]


def report(params: Params, root: Path = Path(), report: Report = silent) -> dict[str, Any]:
    """Writes report/ and returns best.json's content: the point of lowest FID, then of fewest evaluations.

    Removes what samples/ and metrics/ still hold of points that have left the sweep, where DVC can bring it back.
    Raises InputError when a point of the sweep has no scores.
    """
    points = params.points()
    rows, protocols = _read_rows(points, root)
    removed, kept = _prune(params, root)
    if removed:
        report(Progress(0, len(points), "points", message=f"removed what has left the sweep: {_few(removed)}"))
    if kept:
        message = f"not of the sweep, and kept because DVC has no copy: {_few(kept)}"
        report(Progress(0, len(points), "points", message=message))
    if protocols > 1:
        message = "points were scored under different protocols; their FIDs don't compare (dvc repro)"
        report(Progress(0, len(points), "points", message=message))
    best = {**min(rows, key=lambda row: (row["fid"], row["evaluations"])), "points": len(rows)}
    folder = root / store.report_dir()
    store.write_csv(folder / "points.csv", rows)
    store.write_json(folder / "best.json", best)
    _plot_fid(folder / "fid.png", rows)

    def done(count: int) -> None:
        report(Progress(count, len(points), "points"))

    _plot_samples(folder / "samples.png", rows, [root / store.samples_file(point) for point in points], done)
    return best


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of points.csv as aligned text, FID falling: the best point is the last line."""
    falling = sorted(rows, key=lambda row: (-float(row["fid"]), -int(row["evaluations"])))
    cells = [("point", "evaluations", "FID", "KID"), *(_cells(row) for row in falling)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip() for row in cells
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return (
        row["point"],
        f"{int(row['evaluations']):,}",
        f"{float(row['fid']):.4g}",
        f"{float(row['kid']):.2g} ± {float(row['kid_std']):.1g}",
    )


def _read_rows(points: Sequence[Point], root: Path) -> tuple[list[Row], int]:
    """-> points.csv's rows, and how many protocols they were scored under."""
    missing = [point.name for point in points if not (root / store.metrics_file(point)).exists()]
    if missing:
        raise InputError(f"{root / 'metrics'}: no scores of {_few(missing)}; run `dvc repro` or `ddpm evaluate POINT`")
    rows, protocols = [], set()
    for point in points:
        path = root / store.metrics_file(point)
        scores = store.read_json(path)
        absent = [key for key in (*SCORES, *PROTOCOL) if key not in scores]
        if absent:
            raise InputError(f"{path}: without {', '.join(absent)}; run `ddpm evaluate {point.name}` again")
        protocols.add(tuple(scores[key] for key in PROTOCOL))
        rows.append({"point": point.name, **point.model_dump(), **{key: scores[key] for key in SCORES}})
    return rows, len(protocols)


def _prune(params: Params, root: Path) -> tuple[list[str], list[str]]:
    """Removes the outputs of points and schedules that have left the sweep, if DVC's cache has them; -> removed, kept.

    The report depends on the folders samples/ and metrics/ whole, so they should hold the sweep and no more.
    """
    points, schedules = {point.name for point in params.points()}, set(params.sweep.schedules)
    point, schedule = r"[a-z0-9_]+-[a-z0-9_]+-[1-9][0-9]*", r"[a-z0-9_]+"
    some, first = params.points()[0], params.sweep.schedules[0]
    kinds = (
        ("sample", store.samples_file(some).parent, point, r"\.npz|\.png", points),
        ("evaluate", store.metrics_file(some).parent, point, r"\.json", points),
        ("train", store.history_file(first).parent, schedule, r"\.json|\.csv", schedules),
    )
    stages = store.dvc_lock(root)
    removed, kept = set(), set()
    for stage, folder, name, suffixes, wanted in kinds:
        for path in sorted((root / folder).glob("*")):
            match = re.fullmatch(f"({name})({suffixes})", path.name)
            if match is None or match[1] in wanted or path.is_dir():
                continue
            if store.is_locked(stages, f"{stage}@{match[1]}", root, path.relative_to(root)):
                path.unlink()
                store.run_file(path).unlink(missing_ok=True)
                removed.add(match[1])
            else:
                kept.add(match[1])
    return sorted(removed), sorted(kept)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def drawing(path: Path, width: int, height: int, dpi: int) -> Iterator[Any]:
    """A matplotlib figure of that many pixels, written to `path` as PNG when the block ends well.

    The reader's own matplotlibrc has no say, and no date or version is written: same content, same bytes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
        FigureCanvasAgg(figure)
        yield figure
        with store.replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def _plot_fid(path: Path, rows: Sequence[Row]) -> None:
    """One line per schedule (its colour) and sampler (its dashes), each with a marker of its own."""
    from matplotlib.ticker import LogFormatter

    schedules = list(dict.fromkeys(row["schedule"] for row in rows))
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    with drawing(path, 1050, 675, dpi=150) as figure:
        axes = figure.add_subplot()
        for i, schedule in enumerate(schedules):
            for j, sampler in enumerate(samplers):
                line = [row for row in rows if (row["schedule"], row["sampler"]) == (schedule, sampler)]
                line.sort(key=lambda row: row["evaluations"])
                axes.plot(
                    [row["evaluations"] for row in line],
                    [row["fid"] for row in line],
                    color=COLOURS[i % len(COLOURS)],
                    marker=MARKERS[(i * len(samplers) + j) % len(MARKERS)],
                    linestyle=DASHES[j % len(DASHES)],
                    label=f"{schedule}-{sampler}",
                )
        axes.set_xscale("log")
        if all(row["fid"] > 0 for row in rows):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        ticks: list[int] = []
        for evaluations in sorted({row["evaluations"] for row in rows}):
            if not ticks or evaluations > 1.3 * ticks[-1]:  # labels closer than that would overlap
                ticks.append(evaluations)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("network evaluations per image")
        axes.set_ylabel("FID")
        axes.set_title(_protocol(rows), fontsize="medium")
        axes.grid(which="both", alpha=0.25)
        axes.legend()
        figure.set_layout_engine("tight")


def _protocol(rows: Sequence[Row]) -> str:
    """In words, where all rows agree."""
    if len({(row["layer"], row["images"], row["reference_images"]) for row in rows}) > 1:
        return "scored under different protocols"
    first = rows[0]
    return f"Inception layer {first['layer']}, {first['images']:,} samples against {first['reference_images']:,} images"


def _plot_samples(path: Path, rows: Sequence[Row], files: Sequence[Path], done: Callable[[int], None]) -> None:
    """The first images of each point, one row a point: all start from the same noise, so columns compare."""
    strips = []
    for count, file in enumerate(files):
        done(count)
        images = store.read_samples(file)[0][:SIDE_BY_SIDE]
        strips.append(store.grid(images, columns=SIDE_BY_SIDE).transpose(1, 2, 0))
    done(len(files))
    label, gap = 250, 4  # pixels
    height, width = strips[0].shape[:2]
    with drawing(path, label + width, len(rows) * (height + gap), dpi=100) as figure:
        for index, (row, strip) in enumerate(zip(rows, strips, strict=True)):
            bottom = (len(rows) - 1 - index) * (height + gap)
            figure.figimage(np.broadcast_to(strip, (*strip.shape[:2], 3)), xo=label, yo=bottom, origin="upper")
            middle = (bottom + height / 2) / (len(rows) * (height + gap))
            text = f"{row['point']}   FID {row['fid']:.3g}"
            figure.text((label - 8) / (label + width), middle, text, ha="right", va="center", fontsize=9)
