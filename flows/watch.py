"""Who sees what a stage says while it runs: Prefect's log, or the terminal of `python -m flows`."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from prefect import get_run_logger

EVERY = 10.0  # seconds between two progress lines of one stage in the log


@dataclass(frozen=True)
class Outcome:
    """kind: the name of the Prefect state. text: one line, without the stage's name."""

    kind: Literal["Completed", "Restored", "Unchanged", "Busy", "Killed", "Failed"]
    text: str

    @property
    def failed(self) -> bool:
        return self.kind in ("Busy", "Killed", "Failed")


class Watcher(Protocol):
    """`stage` is always the stage's address, such as sample@linear-ddim-50."""

    def started(self, stage: str) -> None: ...

    def line(self, stage: str, text: str) -> None: ...

    def progress(self, stage: str, report: dict[str, Any]) -> None:
        """report: done, total, unit, values, as ddpm.stages.display writes them."""

    def ended(self, stage: str, outcome: Outcome) -> None: ...


class Log:
    """Everything goes to the log of the Prefect run that the calling thread is in."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def started(self, stage: str) -> None:
        self._told[stage] = time.monotonic()

    def line(self, stage: str, text: str) -> None:
        get_run_logger().info(text)

    def progress(self, stage: str, report: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._told.get(stage, 0.0) >= EVERY:
            self._told[stage] = now
            values = "".join(f", {name} {value:.4g}" for name, value in report["values"].items())
            get_run_logger().info(f"{stage}: {report['done']:,} of {report['total']:,} {report['unit']}{values}")

    def ended(self, stage: str, outcome: Outcome) -> None:
        """Prefect logs the state a task ends in."""


watcher: ContextVar[Watcher] = ContextVar("watcher")
