"""Shows the progress of `python -m flows` in a terminal: a bar for each running stage, and a line for each ended stage."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from flows.watch import Outcome


class Terminal:
    """A Watcher for a console. Prints lines without bars if the console is not a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.unchanged = 0
        self.answer: list[str] = []
        self.tasks: set[str] = set()  # the names of all tasks that have ended
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._last_line: dict[str, str] = {}

    def __enter__(self) -> Terminal:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def started(self, stage: str) -> None:
        self._began[stage] = time.monotonic()
        self._tasks[stage] = self.bars.add_task(stage, total=None, unit="", values="")

    def line(self, stage: str, text: str) -> None:
        self._last_line[stage] = text
        self.say(text)

    def progress(self, stage: str, report: dict[str, Any]) -> None:
        values = " ".join(f"{name} {value:.3g}" for name, value in report["values"].items())
        task = self._tasks[stage]
        self.bars.update(task, completed=report["done"], total=report["total"], unit=report["unit"])
        if values:
            self.bars.update(task, values=values)

    def concluded(self, lines: list[str]) -> None:
        self.answer = lines  # `python -m flows` prints these lines last

    def ended(self, stage: str, outcome: Outcome) -> None:
        self.tasks.add(stage)
        task = self._tasks.pop(stage, None)
        if task is not None:
            self.bars.remove_task(task)
        if outcome.kind == "Unchanged":
            self.unchanged += 1
        elif outcome.failed:
            self.say(f"{stage}: {'will be tried again' if outcome.kind != 'Failed' else 'failed'}: {outcome.text}")
        elif not self._last_line.pop(stage, "").endswith(outcome.text):
            seconds = time.monotonic() - self._began.pop(stage, time.monotonic())
            self.say(f"{stage}: {outcome.text} in {seconds:.1f} s")
