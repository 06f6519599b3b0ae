"""Shows the points of a sweep as aligned text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of points.csv as aligned text, FID falling: the lowest is the last line."""
    falling = sorted(rows, key=lambda row: (-float(row["fid"]), -int(row["evaluations"])))
    interval = f"{float(rows[0]['confidence']):.0%} interval"
    cells = [("point", "evaluations", "FID", interval, "KID", interval), *(_cells(row) for row in falling)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["point"],
        f"{int(row['evaluations']):,}",
        f"{float(row['fid']):.4g}",
        f"{float(row['fid_low']):.4g} to {float(row['fid_high']):.4g}",
        f"{float(row['kid']):.2g}",
        f"{float(row['kid_low']):.2g} to {float(row['kid_high']):.2g}",
    )
