"""Draws plots. They are reproducible to the byte, and readable for colour-blind readers and in greyscale print."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.files import atomic
from ddpm.files.scores import Row, extractor
from ddpm.scores.metrics import RANKING

# Okabe and Ito's colours, which colour-blind readers can tell apart. Markers and dashes distinguish lines in greyscale print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
NARROW = 5.0  # inches; a figure of at most this width has no room for a title


@contextmanager
def _blank(width: int, height: int, dpi: int) -> Iterator[Any]:
    """Yields a matplotlib figure of width x height pixels. Inside the block, matplotlib ignores the user's matplotlibrc."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "ddpm", "svg.fonttype": "none"})
        figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
        FigureCanvasAgg(figure)
        yield figure


@contextmanager
def drawing(path: Path, width: int, height: int, dpi: int) -> Iterator[Any]:
    """Yields a matplotlib figure, and writes the figure to a PNG file if the `with` block succeeds.

    The file contains no date and no version, so the same content gives the same bytes.

    Args:
        path: the file to write.
        width, height: the size in pixels.
        dpi: pixels per inch, which decides the size of text.
    """
    with _blank(width, height, dpi) as figure:
        yield figure
        with atomic.replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def svg(width: int, height: int, draw: Callable[[Any], None]) -> bytes:
    """Draws a figure with `draw` and returns SVG in which text stays text. The size is in hundredths of an inch."""
    written = io.BytesIO()
    with _blank(width, height, dpi=100) as figure:
        draw(figure)
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


def pictures(draw: Callable[[Any], None], width: int, height: int, narrow: tuple[int, int]) -> dict[str, str]:
    """Draws a figure twice. Returns both pictures as data URIs of SVG: "wide" for a desktop and "narrow" for a phone.

    Args:
        draw: draws on a figure of any size.
        width, height: the size of the wide picture, in hundredths of an inch.
        narrow: the width and height of the narrow picture, in the same unit. A phone shows this picture at nearly that size, so
            its text is readable.
    """
    sizes = {"wide": (width, height), "narrow": narrow}
    return {
        name: "data:image/svg+xml;base64," + base64.b64encode(svg(*size, draw)).decode() for name, size in sizes.items()
    }


def panels(figure: Any) -> Any:
    """Returns two axes: side by side on a wide figure, one above the other on a narrow one."""
    wide, high = figure.get_size_inches()
    return figure.subplots(1, 2) if wide > high else figure.subplots(2, 1)


def draw_scores(
    figure: Any,
    rows: Sequence[Row],
    x: str = "evaluations",
    label: str = "network evaluations per image",
    front: Collection[str] = (),
) -> None:
    """Draws the headline score against `x`, with a line for each schedule (colour) and sampler (dashes).

    Args:
        figure: the matplotlib figure to draw on.
        rows: the points to draw; one or more.
        x: the field of Row on the horizontal axis.
        label: the title of the horizontal axis.
        front: the names of the Pareto-optimal points. A grey staircase joins them.
    """
    schedules = list(dict.fromkeys(row.schedule for row in rows))
    samplers = list(dict.fromkeys(row.sampler for row in rows))
    axes = figure.add_subplot()
    for i, schedule in enumerate(schedules):
        for j, sampler in enumerate(samplers):
            line = [row for row in rows if (row.schedule, row.sampler) == (schedule, sampler)]
            line.sort(key=lambda row: getattr(row, x))
            values = np.array([row.value for row in line])
            shift = 1.0
            if (
                x == "evaluations"
            ):  # points with the same evaluations are drawn side by side, so that their bars do not overlap
                shift = 1.015 ** (i * len(samplers) + j - (len(schedules) * len(samplers) - 1) / 2)
            axes.errorbar(
                [getattr(row, x) * shift for row in line],
                values,
                yerr=[values - [row.low for row in line], [row.high for row in line] - values],
                capsize=3,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[(i * len(samplers) + j) % len(MARKERS)],
                linestyle=DASHES[j % len(DASHES)],
                label=f"{schedule}-{sampler}",
            )
    axes.set_xscale("log")
    _scale(axes, rows)
    if front:
        _draw_front(axes, [(getattr(row, x), row.value) for row in rows if row.point in front])
    _tick(axes, rows, x)
    axes.set_xlabel(label)
    axes.set_ylabel(f"{RANKING.title}, with {rows[0].confidence:.0%} intervals")
    if figure.get_size_inches()[0] > NARROW:
        axes.set_title(protocol(rows), fontsize="medium")
    axes.grid(which="both", alpha=0.25)
    axes.legend()
    figure.set_layout_engine("tight")


def _scale(axes: Any, rows: Sequence[Row]) -> None:
    """Makes the axis of the scores logarithmic if all scores are positive."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if all(row.value > 0 for row in rows):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=0.9 * min(row.low or row.value / 3 for row in rows))  # an interval may reach down to 0
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_front(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Joins the points by a grey staircase that extends to the right edge of the plot."""
    steps = sorted(points)
    reach = axes.get_xlim()[1]
    steps.append((reach, steps[-1][1]))
    style = {"color": "#bbbbbb", "linewidth": 5, "solid_capstyle": "butt", "zorder": 0}
    axes.step(*zip(*steps, strict=True), where="post", label="front", **style)
    axes.set_xlim(right=reach)


def _tick(axes: Any, rows: Sequence[Row], x: str) -> None:
    """Sets ticks at the numbers of evaluations that occur. For another `x`, sets the usual ticks of a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if x == "evaluations":
        ticks: list[int] = []
        for evaluations in sorted({row.evaluations for row in rows}):
            if not ticks or evaluations > 1.3 * ticks[-1]:  # closer labels would overlap
                ticks.append(evaluations)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())


def protocol(rows: Sequence[Row]) -> str:
    """Describes how the points were scored, such as "Inception layer 64, 500 samples against 1,437 images"."""
    if len({(row.extractor, row.layer, row.images, row.reference_images) for row in rows}) > 1:
        return "scored under different protocols"
    first = rows[0]
    features = f"{extractor(first.extractor).title} layer {first.layer}"
    return f"{features}, {first.images:,} samples against {first.reference_images:,} images"
