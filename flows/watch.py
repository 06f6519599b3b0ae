"""Who sees what a stage says while it runs: Prefect's log, or the terminal of `python -m flows`."""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

EVERY = 10.0  # seconds between two progress lines of one stage in the log, and two moves of its bar


@dataclass(frozen=True)
class Outcome:
    """kind: the name of the Prefect state. text: one line, without the stage's name."""

    kind: Literal["Completed", "Restored", "Unchanged", "Busy", "Killed", "Unreachable", "Failed"]
    text: str

    @property
    def failed(self) -> bool:
        return self.kind in ("Busy", "Killed", "Unreachable", "Failed")


class Watcher(Protocol):
    """`stage` is always the stage's address, such as sample@linear-ddim-50."""

    def started(self, stage: str) -> None: ...

    def line(self, stage: str, text: str) -> None: ...

    def progress(self, stage: str, report: dict[str, Any]) -> None:
        """report: done, total, unit, values, as ddpm.stages.display writes them."""

    def ended(self, stage: str, outcome: Outcome) -> None: ...


class Log:
    """Everything goes to the Prefect run that the calling thread is in: lines to its log, progress to a bar on its page."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}
        self._bars: dict[str, UUID] = {}

    def started(self, stage: str) -> None:
        self._told[stage] = time.monotonic()
        self._bars.pop(stage, None)  # a retry has a bar of its own

    def line(self, stage: str, text: str) -> None:
        get_run_logger().info(text)

    def progress(self, stage: str, report: dict[str, Any]) -> None:
        now = time.monotonic()
        due = now - self._told.get(stage, 0.0) >= EVERY
        if stage in self._bars and not due and report["done"] < report["total"]:
            return
        values = "".join(f", {name} {value:.4g}" for name, value in report["values"].items())
        text = f"{stage}: {report['done']:,} of {report['total']:,} {report['unit']}{values}"
        if due:
            self._told[stage] = now
            get_run_logger().info(text)
        self._move(stage, 100 * report["done"] / max(report["total"], 1), text)

    def ended(self, stage: str, outcome: Outcome) -> None:
        """Prefect logs the state a task ends in."""
        if stage in self._bars and not outcome.failed:
            self._move(stage, 100.0, f"{stage}: {outcome.text}")

    def _move(self, stage: str, percent: float, text: str) -> None:
        try:
            if stage in self._bars:
                update_progress_artifact(self._bars[stage], percent, text)
            else:
                key = re.sub("[^a-z0-9]+", "-", stage.lower())  # all that Prefect allows
                self._bars[stage] = create_progress_artifact(percent, key, text)  # type: ignore[assignment]
        except Exception as error:  # noqa: BLE001 - who watches must not fail the work
            get_run_logger().warning(f"{stage}: no progress bar ({type(error).__name__}: {error})")


watcher: ContextVar[Watcher] = ContextVar("watcher")
