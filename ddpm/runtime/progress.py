"""Progress reports. A stage reports by calling a function, so it runs unchanged in a test, a notebook, DVC or Prefect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """A report from a running stage.

    Args:
        done: the finished work, in `unit`s.
        total: all work, in `unit`s.
        unit: "steps", "images", ...
        values: numbers to watch, by name (loss, learning_rate, ...). Most reports have none.
        message: a line for the log, or "".
        model: during a training, a callable that returns the current EMA denoiser, to draw previews. Otherwise None.
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
