"""Makes the report page's untracked parts: commit, machine and speed of each stage, and the comparison with the previous report.

These parts differ between runs with the same parameters, so report/index.html must not contain them. The page loads them from
`report/run.js`, which DVC does not hash. run.js holds the key of its report, and the page ignores a run.js with another key. The
copy of the page in MLflow contains these parts. No DVC stage imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files import atomic, models, paths, records
from ddpm.files.params import Params
from ddpm.files.scores import Row, read_report
from ddpm.parameters import Point
from ddpm.provenance import code, project
from ddpm.provenance.runs import RunRecord, read_run
from ddpm.reporting import compared, previous
from ddpm.reporting.compared import Compared
from ddpm.reporting.identity import key_of
from ddpm.reporting.page import NARROW
from ddpm.reporting.plots import COLOURS, MARKERS, draw_scores, pictures
from ddpm.reporting.templates import render
from ddpm.scores.metrics import RANKING


def write_local(params: Params, root: Path = Path(), say: Callable[[str], None] = print) -> None:
    """Writes report/run.js without asking MLflow: times, machines, and the comparison with the previous report.

    An error becomes a warning, since the report is already on disk.
    """
    try:
        rows = read_report(root)[1]
        lineage = published(rows, run_records(root, rows), {}, root=root)
        write_script(root, {"published": lineage, "compared": compared.html(with_previous(params, root, say))})
    except (InputError, OSError) as error:
        say(f"warning: cannot write {paths.REPORT_SCRIPT}: {error}")


def with_previous(params: Params, root: Path, say: Callable[[str], None]) -> list[Compared]:
    """Copies the present report for later comparisons, and compares the report with the previous one.

    An error becomes a warning.
    """
    try:
        previous.keep(params, root)
        found = previous.compare(root)
    except (InputError, OSError) as error:
        say(f"warning: the report is not compared with the previous one: {error}")
        return []
    return [found] if found else []


def write_script(root: Path, parts: Mapping[str, str]) -> None:
    """Writes report/run.js, which fills in parts of the page. Does nothing if an older version of ddpm wrote the page."""
    page = root / paths.report_dir() / "index.html"
    if key := key_of(page.read_text(encoding="utf-8")) if page.exists() else "":
        atomic.write_text(root / paths.REPORT_SCRIPT, f"run({json.dumps(key)}, {json.dumps(parts, indent=1)});\n")


def run_records(root: Path, rows: Sequence[Row]) -> dict[str, RunRecord]:
    """Returns the run records of the stages behind a report, by the name of the stage, for example sample@linear-ddim-50.

    Raises InputError if a run file is unusable.
    """
    schedules = list(dict.fromkeys(row.schedule for row in rows))
    outputs = {"prepare": paths.dataset_dir()}
    outputs |= {f"train@{name}": paths.model_dir(name) for name in schedules}
    for row in rows:
        point = Point.parse(row.point)
        outputs |= {
            f"sample@{point.name}": paths.samples_file(point),
            f"evaluate@{point.name}": paths.metrics_file(point),
        }
    outputs |= {f"likelihood@{name}": paths.likelihood_file(name) for name in schedules}
    outputs["report"] = paths.report_dir()
    return {stage: record for stage, output in outputs.items() if (record := read_run(root, output))}


def published(
    rows: Sequence[Row],
    records: Mapping[str, RunRecord],
    runs: Mapping[str, tuple[str, str]],
    place: str = "",
    chart: str = "",
    root: Path | None = None,
) -> str:
    """Returns the lineage section of the page, as HTML.

    Args:
        rows: the rows of points.csv.
        records: the run files by stage, such as sample@linear-ddim-50.
        runs: the name and the address of the MLflow run of each stage, by stage. The address is "" if there is no server.
        place: the address of MLflow, as shown to the reader; "" without MLflow.
        chart: the address of MLflow's chart of all points; "" without a server.
        root: the checkout whose cache stores the plot; None to store no plot.
    """
    sampled = {row.point: record for row in rows if (record := records.get(f"sample@{row.point}"))}
    timed = [
        replace(row, seconds=1 / record.per_second)
        for row in rows
        if (record := sampled.get(row.point)) and record.per_second
    ]
    machines = list(dict.fromkeys(_machine(sampled[row.point]) for row in timed))
    plot = None
    if timed and len(machines) == 1:
        plot = _cached_plot(timed, root) if root else _plot(timed)
    return render(
        "published.html.jinja",
        place=place,
        chart=chart,
        metric=RANKING,
        plot=plot,
        previews=_previews_plot(preview_fids(root, rows)) if root else None,
        timed=bool(timed),
        machines=machines,
        rows=[_row(stage, record, *runs.get(stage, ("", ""))) for stage, record in records.items()],
    )


def preview_fids(root: Path, rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Returns the FIDs of the images that were drawn while the present models trained, by schedule and step.

    Leaves out a schedule if its FIDs are from another training than its present model.
    """
    found: dict[str, dict[int, float]] = {}
    for schedule in dict.fromkeys(row.schedule for row in rows):
        with suppress(InputError):  # there is no such file, or it is damaged
            kept = records.read_record(root / paths.preview_fids_file(schedule))
            if kept["training"] == models.read_trained(root, schedule).training.content:
                found[schedule] = {int(step): float(fid) for step, fid in kept["fids"].items()}
    return found


def _previews_plot(found: Mapping[str, Mapping[int, float]]) -> dict[str, str] | None:
    """Draws FID against optimiser steps, a line per schedule; None if there are no FIDs."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for index, (schedule, fids) in enumerate(found.items()):
            style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            axes.plot(list(fids), list(fids.values()), label=schedule, **style)
        axes.set(xlabel="optimiser step", ylabel=f"{RANKING.title} of the previews")
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
        figure.set_layout_engine("tight")

    return pictures(draw, 900, 400, NARROW) if found else None


def _plot(timed: Sequence[Row]) -> dict[str, str]:
    front = fastest(timed)
    return pictures(lambda figure: draw_scores(figure, timed, "seconds", "seconds per image", front), 900, 560, NARROW)


def _cached_plot(timed: Sequence[Row], root: Path) -> dict[str, str]:
    """Returns the plot of these rows from the cache. If the cache does not hold the plot, draws and stores it.

    The stage `report`, the publisher and `ddpm promote` show the same plot. Drawing the plot takes two seconds, including the
    import of matplotlib.
    """
    drawn_by = [project.package_digest(code.AT_IMPORT), version("matplotlib")]
    key = records.record_digest({"rows": [asdict(row) for row in timed], "drawn by": drawn_by})
    with suppress(InputError):  # the cache holds no plot, or a damaged one
        kept = records.read_record(root / paths.SPEED_PLOT)
        if kept.get("key") == key:
            return dict(kept["plot"])
    plot = _plot(timed)
    with suppress(InputError, OSError):
        records.write_record(root / paths.SPEED_PLOT, {"key": key, "plot": plot})
    return plot


def fastest(rows: Sequence[Row]) -> list[str]:
    """Returns the names of the points with a better score than all equally fast or faster points, the fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.seconds, RANKING.rank(row.value))):
        if not front or RANKING.rank(row.value) < RANKING.rank(front[-1].value):
            front.append(row)
    return [row.point for row in front]


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
