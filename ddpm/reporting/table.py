"""Shows the points of a sweep as aligned text."""

from __future__ import annotations

from collections.abc import Sequence

from ddpm.files.scores import Row
from ddpm.scores.metric import Metric
from ddpm.scores.metrics import METRICS, RANKING


def table(rows: Sequence[Row]) -> str:
    """Returns a table of the scores that have an interval, as aligned text with the best point in the last line."""
    worst_first = sorted(rows, key=lambda row: (-RANKING.rank(row.value), -row.evaluations))
    shown = [m for m in METRICS.values() if m.interval and any(m.name in row.values for row in rows)]
    titles = [text for metric in shown for text in (metric.title, f"{rows[0].confidence:.0%} interval")]
    cells = [("point", "evaluations", *titles), *(_cells(row, shown) for row in worst_first)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    )


def _cells(row: Row, shown: Sequence[Metric]) -> tuple[str, ...]:
    cells = [row.point, f"{row.evaluations:,}"]
    for metric in shown:
        low, value, high = (metric.text(row.values[name]) if name in row.values else "" for name in metric.names)
        cells += [value, f"{low} to {high}" if value else ""]
    return tuple(cells)
