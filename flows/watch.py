"""Passes the output of running stages on to Prefect's log or to a terminal."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

UPDATE_SECONDS = 10.0  # seconds between two progress lines of a stage in the log, and between two updates of its bar
LAST_UPDATE_SECONDS = 5.0  # seconds that an ended stage waits for the last update of its bar


Kind = Literal["Completed", "Restored", "Unchanged", "Busy", "Killed", "Unreachable", "Full", "Failed"]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. kind: the name of the Prefect state. text: one line, without the stage's name."""

    kind: Kind
    text: str

    @property
    def failed(self) -> bool:
        return self.kind in ("Busy", "Killed", "Unreachable", "Full", "Failed")


class Watcher(Protocol):
    """Receives the output of tasks. `stage` is a stage's name in DVC, such as train@linear, or another name such as publish."""

    def started(self, stage: str) -> None: ...

    def line(self, stage: str, text: str) -> None: ...

    def progress(self, stage: str, report: dict[str, Any]) -> None:
        """Shows progress. report: done, total, unit and values, as ddpm.runtime.display writes them."""

    def ended(self, stage: str, outcome: Outcome) -> None: ...

    def concluded(self, lines: list[str]) -> None:
        """Receives the closing lines of the flow run, such as its best point (ddpm.reporting.answer)."""


class Log:
    """A Watcher for the Prefect run of the calling thread. Sends lines to the run's log, and progress to a bar on its page."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}  # the time of the last progress line of each stage
        self._bars: dict[str, UUID] = {}
        self._next: dict[str, tuple[float, str]] = {}  # the update of each bar that waits to be sent to Prefect
        self._moves: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._mover = ThreadPoolExecutor(1, "bars")

    def started(self, stage: str) -> None:
        self._logged[stage] = time.monotonic()
        self._bars.pop(stage, None)  # a retry gets a new bar
        self._moves.pop(stage, None)

    def line(self, stage: str, text: str) -> None:
        get_run_logger().info(text)

    def progress(self, stage: str, report: dict[str, Any]) -> None:
        now = time.monotonic()
        due = now - self._logged.get(stage, 0.0) >= UPDATE_SECONDS
        if stage in self._moves and not due and report["done"] < report["total"]:
            return
        values = "".join(f", {name} {value:.4g}" for name, value in report["values"].items())
        text = f"{stage}: {report['done']:,} of {report['total']:,} {report['unit']}{values}"
        if due:
            self._logged[stage] = now
            get_run_logger().info(text)
        self._move(stage, 100 * report["done"] / max(report["total"], 1), text)

    def ended(self, stage: str, outcome: Outcome) -> None:
        """Completes the bar. Prefect itself logs the task's last state."""
        if stage in self._moves:
            if not outcome.failed:
                self._move(stage, 100.0, f"{stage}: {outcome.text}")
            wait([self._moves[stage]], LAST_UPDATE_SECONDS)

    def concluded(self, lines: list[str]) -> None:
        for line in lines:
            get_run_logger().info(line)

    def _move(self, stage: str, percent: float, text: str) -> None:
        """Updates the bar in another thread. A call to an unreachable API would block the stage's output for a minute."""
        with self._lock:
            waiting = stage in self._next
            self._next[stage] = (percent, text)
        if not waiting:
            self._moves[stage] = self._mover.submit(copy_context().run, self._send, stage)

    def _send(self, stage: str) -> None:
        with self._lock:
            percent, text = self._next.pop(stage)
        try:
            if stage in self._bars:
                update_progress_artifact(self._bars[stage], percent, text)
            else:
                key = re.sub("[^a-z0-9]+", "-", stage.lower())  # the characters that Prefect allows
                self._bars[stage] = create_progress_artifact(percent, key, text)  # type: ignore[assignment]
        except Exception as error:  # noqa: BLE001 - the display must not fail the work
            get_run_logger().warning(f"{stage}: no progress bar ({type(error).__name__}: {error})")


watcher: ContextVar[Watcher] = ContextVar("watcher")
