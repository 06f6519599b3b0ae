"""Progress reports: a stage calls a function, so it runs unchanged in a test, a notebook, DVC or Prefect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """One report from a running stage.

    done, total: the finished work and all work, in `unit`s ("steps", "images", ...).
    values: numbers to watch, by name (loss, learning_rate, ...); empty for most reports.
    message: a line for the log, or "".
    model: during a training, a callable that returns the current EMA denoiser, to draw previews; else None.
    """

    done: int
    total: int
    unit: str
    values: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    model: Callable[[], Any] | None = None


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Ignores a progress report."""
