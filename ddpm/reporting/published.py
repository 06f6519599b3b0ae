"""The lineage section of the published report: commit, machine and speed of each run. No DVC stage imports this module."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from ddpm.files.runs import RunRecord
from ddpm.files.scores import Row
from ddpm.reporting.page import render
from ddpm.reporting.plots import draw_scores, svg
from ddpm.scores.metrics import RANKING


def published(
    rows: Sequence[Row],
    records: Mapping[str, RunRecord],
    runs: Mapping[str, tuple[str, str]],
    place: str,
    chart: str = "",
) -> str:
    """Returns the lineage section of the page, as HTML.

    Args:
        rows: the rows of points.csv.
        records: run files by stage, such as sample@linear-ddim-50.
        runs: the name and the address of each stage's MLflow run, by stage; "" where there is no address.
        place: the address of MLflow, for the reader.
        chart: the address of MLflow's chart of all points; "" for none.
    """
    sampled = {row.point: record for row in rows if (record := records.get(f"sample@{row.point}"))}
    timed = [
        replace(row, seconds=1 / record.per_second)
        for row in rows
        if (record := sampled.get(row.point)) and record.per_second
    ]
    machines = list(dict.fromkeys(_machine(sampled[row.point]) for row in timed))
    plot = ""
    if timed and len(machines) == 1:
        picture = svg(
            900, 560, lambda figure: draw_scores(figure, timed, "seconds", "seconds per image", fastest(timed))
        )
        plot = "data:image/svg+xml;base64," + base64.b64encode(picture).decode()
    return render(
        "published.html.jinja",
        place=place,
        chart=chart,
        metric=RANKING,
        plot=plot,
        timed=bool(timed),
        machines=machines,
        rows=[_row(stage, record, *runs.get(stage, ("", ""))) for stage, record in records.items()],
    )


def fastest(rows: Sequence[Row]) -> list[str]:
    """Returns the points that no point as fast beats, the fastest first."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.seconds, RANKING.rank(row.value))):
        if not kept or RANKING.rank(row.value) < RANKING.rank(kept[-1].value):
            kept.append(row)
    return [row.point for row in kept]


def _machine(record: RunRecord) -> str:
    name = record.hardware.get("gpu") or record.hardware.get("cpu", "an unknown machine")
    return f"{name} ({record.device})"


def _pace(record: RunRecord) -> str:
    if not (pace := record.per_second):
        return ""
    return f"{pace:,.0f} {record.unit}/s" if pace >= 100 else f"{pace:.3g} {record.unit}/s"


def _row(stage: str, record: RunRecord, run: str, link: str) -> dict[str, Any]:
    memory, commit = record.gpu_peak_memory_bytes or record.peak_memory_bytes, record.git_commit
    started = datetime.fromtimestamp(record.started / 1000, UTC)
    return {
        "stage": stage,
        "seconds": record.seconds,
        "pace": _pace(record),
        "memory": f"{memory / 1e6:,.0f} MB" if memory else "",
        "started": f"{started:%Y-%m-%d %H:%M}",
        "machine": _machine(record),
        "commit": (commit[:10] + (", edited" if record.git_dirty else "")) if commit else "unknown",
        "run": run,
        "link": link,
    }
