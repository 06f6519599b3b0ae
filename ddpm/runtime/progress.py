"""How a stage says what it is doing: one small callable, so that it runs unchanged in a test, a notebook, DVC or Prefect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """One report from a running stage.

    done, total: how much of the work is finished, in `unit`s ("steps", "images", ...).
    values: numbers worth watching, by name (loss, learning_rate, ...); empty for most reports.
    message: a plain line worth keeping in a log, or "".
    model: while training, a callable that gives the current EMA denoiser to whoever wants to draw samples; else None.
    """

    done: int
    total: int
    unit: str
    values: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    model: Callable[[], Any] | None = None


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Watches nothing."""
