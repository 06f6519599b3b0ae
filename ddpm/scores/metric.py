"""The type of a row of METRICS: names, which way is better, possible values, and how the metric is computed.

The class lies apart from the table, so that a metric with a module of its own can import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddpm.scores.intervals import CONFIDENCE, Difference, Estimate, difference

if TYPE_CHECKING:
    from ddpm.scores.fidelity import Sets

LARGEST = 1e9  # far from where squares overflow


@dataclass(frozen=True)
class Entry:
    """One number of metrics/POINT.json, and the column of points.csv of the same name.

    Args:
        name: the key and the column.
        title: what people call it: the heading of its column on the report's page. Without one it has no column there.
        measure: computes it; None where these sets of images do not allow it.
        low: the least possible value.
        high: the largest possible value.
        optional: whether scores without it are complete.
    """

    name: str
    title: str
    measure: Callable[[Sets], Estimate | float | None]
    low: float = -LARGEST
    high: float = LARGEST
    optional: bool = False


@dataclass(frozen=True)
class Metric(Entry):
    """A row of METRICS.

    Args:
        direction: -1 where lower is better, 1 where higher is; 0 for a diagnosis, which MLflow and the model card leave out.
        interval: whether `measure` gives an Estimate, whose interval becomes the entries NAME_low and NAME_high.
        more: further entries. By convention NAME_std is the spread between parts of the images.
        digits: significant digits in tables and sentences.
        hub: what model hubs call it, where that differs from its name.
    """

    direction: int = 0
    interval: bool = False
    more: tuple[Entry, ...] = ()
    digits: int = 3
    hub: str = ""

    @property
    def words(self) -> str:
        return "higher is better" if self.direction > 0 else "lower is better"

    @property
    def names(self) -> tuple[str, ...]:
        """The score, and its interval if it has one, in the order of their values."""
        return (f"{self.name}_low", self.name, f"{self.name}_high") if self.interval else (self.name,)

    @property
    def entries(self) -> dict[str, Entry]:
        """All entries by name, in the order of their columns."""
        own = (self.name, *(name for name in self.names if name != self.name))
        return {**dict.fromkeys(own, self), **{entry.name: entry for entry in self.more}}

    def text(self, value: float) -> str:
        """The value as tables and sentences show it."""
        return f"{value:.{self.digits}g}"

    def values(self, sets: Sets) -> dict[str, float]:
        """Computes the entries; those that these sets do not allow are missing."""
        values: dict[str, float] = {}
        for entry in (self, *self.more):
            found = entry.measure(sets)
            if isinstance(found, Estimate):
                low, high = found.interval()
                values |= {f"{entry.name}_low": max(entry.low, low), f"{entry.name}_high": min(entry.high, high)}
                found = found.value
            if found is not None:
                values[entry.name] = found
        return values

    def rank(self, value: float) -> float:
        """The better, the lower: a key to sort by."""
        return -self.direction * value

    def compare(self, a: Estimate, b: Estimate, confidence: float = CONFIDENCE) -> tuple[int, Difference]:
        """-> 1 where a is significantly better than b, -1 where it is worse, 0 where that is not known; and a - b."""
        gap = difference(a, b)
        low, high = gap.interval(confidence)
        return (self.direction if low > 0 else -self.direction if high < 0 else 0), gap
