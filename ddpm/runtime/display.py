"""Shows the progress of a stage: a bar on a terminal, plain lines without a terminal, or lines of JSON for a program."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ddpm.runtime.progress import Progress, Report

PREFIX = "@progress "  # starts each progress line if DDPM_PROGRESS=lines
# Set in a stage's environment if the program that started the stage prints the best point at its own end.
SAID_LATER = "DDPM_ANSWER_FOLLOWS"


@contextmanager
def display(stage: str) -> Iterator[Report]:
    """Yields a function that takes the Progress reports of `stage` and shows them on standard output."""
    if os.environ.get("DDPM_PROGRESS") == "lines":
        yield _json_lines(stage)
    elif sys.stdout.isatty():
        with _bar(stage) as report:
            yield report
    else:
        yield _line_per_tenth(stage)


def say(message: str) -> None:
    """Prints a line in one write. print() writes the line break separately, so lines from several threads could mix."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table. The first column is left-aligned, and the others are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    formatted = Table(box=None, pad_edge=False)
    for index, head in enumerate(heads):
        formatted.add_column(head, justify="right" if index else "left", overflow="fold")
    for row in rows:
        formatted.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(formatted, markup=False, highlight=False)


def _json_lines(stage: str) -> Report:
    """Returns a function that prints messages as plain lines, and progress as PREFIX and JSON, at most four times a second."""
    shown = 0.0  # when the last line was printed

    def report(progress: Progress) -> None:
        nonlocal shown
        if progress.message:
            say(f"{stage}: {progress.message}")
        now = time.monotonic()
        if now - shown < 0.25 and progress.done < progress.total:
            return
        shown = now
        fields = {"stage": stage, "done": progress.done, "total": progress.total, "unit": progress.unit}
        say(PREFIX + json.dumps({**fields, "values": dict(progress.values)}))

    return report


def _line_per_tenth(stage: str) -> Report:
    """Returns a Report that prints a line after each tenth of the work."""
    shown = 0  # tenths of the work

    def report(progress: Progress) -> None:
        nonlocal shown
        if progress.message:
            say(f"{stage}: {progress.message}")
        tenth = 10 * progress.done // max(progress.total, 1)
        if tenth > shown:
            shown = tenth
            values = "".join(f", {name} {value:.4g}" for name, value in progress.values.items())
            say(f"{stage}: {progress.done:,} of {progress.total:,} {progress.unit}{values}")

    return report


@contextmanager
def _bar(stage: str) -> Iterator[Report]:
    """Yields a Report that draws a progress bar during the block."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Bars(*columns, transient=True) as bars:
        task = bars.add_task(stage, total=None, unit="", values="")

        def report(progress: Progress) -> None:
            if progress.message:
                bars.console.print(f"{stage}: {progress.message}", highlight=False, markup=False)
            bars.update(task, completed=progress.done, total=progress.total, unit=progress.unit)
            if progress.values:
                bars.update(task, values=" ".join(f"{name} {value:.3g}" for name, value in progress.values.items()))

        yield report
