"""Defines Metric, a row of the table METRICS: the names, direction, possible values and computation of a metric.

The table is in metrics.py, so that a metric with its own module can import the classes from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddpm.scores.intervals import Estimate

if TYPE_CHECKING:
    from ddpm.scores.fidelity import Sets

LARGEST = 1e9  # the default for a metric's largest value; its square is far from overflow


@dataclass(frozen=True)
class Entry:
    """A number in metrics/POINT.json, and the column of the same name in points.csv.

    Args:
        name: the key in metrics/POINT.json and the name of the column.
        title: the heading of the column on the report's page. Without a title, the page has no such column.
        measure: computes the number, or returns None if the sets of images do not allow it.
        low: the smallest possible value.
        high: the largest possible value.
        optional: whether scores are complete without this entry.
        interval: whether `measure` returns an Estimate. The interval then becomes the entries NAME_low and NAME_high.
    """

    name: str
    title: str
    measure: Callable[[Sets], Estimate | float | None]
    low: float = -LARGEST
    high: float = LARGEST
    optional: bool = False
    interval: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this entry's numbers: NAME, or NAME_low, NAME and NAME_high if the entry has an interval."""
        return (f"{self.name}_low", self.name, f"{self.name}_high") if self.interval else (self.name,)


@dataclass(frozen=True)
class Metric(Entry):
    """A metric, which is a row of METRICS.

    Args:
        direction: -1 if lower is better, 1 if higher is better. 0 for a diagnosis, which MLflow and the model card omit.
        judge: whether the metric uses the extractor module whose JUDGES contains the metric's name. Such a metric is computed
            only if evaluation.judges contains its name. Other metrics use evaluation.extractor.
        more: further entries. By convention, NAME_std is the spread between parts of the images.
        digits: significant digits in tables and sentences.
        hub: the metric's name on model hubs, if it differs from `name`.
    """

    direction: int = 0
    judge: bool = False
    more: tuple[Entry, ...] = ()
    digits: int = 3
    hub: str = ""

    @property
    def words(self) -> str:
        """The words that say whether lower or higher is better, for a metric with a direction."""
        return "higher is better" if self.direction > 0 else "lower is better"

    @property
    def entries(self) -> dict[str, Entry]:
        """All entries by name, in the order of their columns."""
        return {name: entry for entry in (self, *self.more) for name in sorted(entry.names, key=entry.name.__ne__)}

    def text(self, value: float) -> str:
        """Formats the value for tables and sentences."""
        return f"{value:.{self.digits}g}"

    def values(self, sets: Sets) -> dict[str, float]:
        """Computes the entries. Leaves out an entry that cannot be computed from these sets of images."""
        values: dict[str, float] = {}
        for entry in (self, *self.more):
            value = entry.measure(sets)
            if isinstance(value, Estimate):
                low, high = value.interval()
                values |= {f"{entry.name}_low": max(entry.low, low), f"{entry.name}_high": min(entry.high, high)}
                value = value.value
            if value is not None:
                values[entry.name] = value
        return values

    def rank(self, value: float) -> float:
        """Returns a key to sort by. The best value has the lowest key."""
        return -self.direction * value
