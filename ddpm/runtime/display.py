"""Shows the progress of a stage: a bar on a terminal, plain lines elsewhere, or lines of JSON for a program."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ddpm.runtime.progress import Progress, Report

PREFIX = "@progress "  # starts each progress line under DDPM_PROGRESS=lines
SAID_LATER = "DDPM_ANSWER_FOLLOWS"  # set for stages if the program that started them prints the best point at its end


@contextmanager
def display(stage: str) -> Iterator[Report]:
    """Yields a Report that shows the progress of `stage` on standard output."""
    if os.environ.get("DDPM_PROGRESS") == "lines":
        yield _lines(stage)
    elif sys.stdout.isatty():
        with _bar(stage) as report:
            yield report
    else:
        yield _tenths(stage)


def say(message: str) -> None:
    """Prints a line in one write. print() would write the line break separately, so the lines of threads could mix."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table. The first column is left-aligned, the others are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for index, head in enumerate(heads):
        shown.add_column(head, justify="right" if index else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(shown, markup=False, highlight=False)


def _lines(stage: str) -> Report:
    shown = 0.0

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


def _tenths(stage: str) -> Report:
    shown = 0  # tenths

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
