"""Compares the present report with the previous one, of which this module keeps a copy.

DVC removes the outputs of a stage before the stage runs, so the previous report is gone. git has only the dvc.lock of the last
commit, which may be many runs old. So this module copies the small files that a comparison needs to `.cache/reports`: those of
the present report and those of the previous report. No output and no hash of DVC depends on that folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files import atomic, dataset, paths, records
from ddpm.files.params import Params
from ddpm.files.samples import read_samples_record
from ddpm.files.scores import PICTURE, Row, Scores, read_point_influence, read_report, read_scores
from ddpm.parameters import Point
from ddpm.provenance.runs import read_run
from ddpm.reporting import identity
from ddpm.reporting.compared import Compared, Gap, Measured, changes, differences, gaps
from ddpm.scores.intervals import simultaneous

PRESENT, PREVIOUS = "present", "previous"
RECORD = Path("kept.json")


@dataclass(frozen=True)
class Kept:
    """The record of a report whose files were copied.

    Args:
        key: identifies the report; the page contains the same key.
        parameters: the parameters that the page shows.
        seeds: the seed of the noise from which the images of each point start, by point; None if unknown.
        dataset: the version, shape, classes and numbers of images of the dataset.
    """

    key: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, Any] = field(default_factory=dict)
    dataset: Mapping[str, Any] = field(default_factory=dict)


def keep(params: Params, root: Path = Path()) -> None:
    """Copies the files of the present report that a comparison needs. The last copied report becomes the previous report.

    Does nothing if the present report was copied before, or if params.yaml was edited after the report was written. Raises
    InputError.
    """
    rows, data = read_report(root)[1], dataset.read_dataset_record(root)
    key, folder = identity.key(params, rows, data), root / paths.CACHE / "reports"
    if key != _key_of_page(root) or key == _kept(folder / PRESENT).key:
        return
    seeds = {row.point: _seed(root, row) for row in rows}
    about = Kept(key, identity.parameters(params), seeds, _about(data))
    if (folder / PRESENT).exists():
        with atomic.replacing_dir(folder / PREVIOUS) as before:
            shutil.copytree(folder / PRESENT, before, dirs_exist_ok=True)
    with atomic.replacing_dir(folder / PRESENT) as now:
        for path in _files(rows):
            if (root / path).exists():
                (now / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / path, now / path)
        records.write_record(now / RECORD, asdict(about))


def compare(root: Path = Path()) -> Compared | None:
    """Compares the present report with the previous report.

    Returns None without a previous report, or if the present report was not copied. If a copy is damaged or of an unknown
    version, removes all copies and raises InputError: no stage could write these files again.
    """
    try:
        return _compare(root)
    except InputError as error:
        shutil.rmtree(root / paths.CACHE / "reports", ignore_errors=True)
        raise InputError(
            f"{error}; the copies in {paths.CACHE / 'reports'} were removed, and later runs are compared again"
        ) from None


def gap_of_best(root: Path = Path()) -> Gap | None:
    """Compares the best score of the present report with the best score of the previous report.

    Returns None without a previous report, or if the scores cannot be compared. Raises InputError as `compare` does.
    """
    found, best = compare(root), read_report(root)[0].row.point
    return next((gap for gap in found.gaps if gap.now.point == best), None) if found else None


def _compare(root: Path) -> Compared | None:
    present, previous = (root / paths.CACHE / "reports" / name for name in (PRESENT, PREVIOUS))
    now, before = _kept(present), _kept(previous)
    if not before.key or now.key != _key_of_page(root):
        return None
    changed = changes(*({"dataset": each.dataset, **each.parameters} for each in (before, now)))
    new, old = _measured(present, now), _measured(previous, before)
    both = [name for name in new if name in old]
    alike = [name for name in both if not differences(new[name][0], old[name][0])]
    about = _when(previous)
    if not changed:
        about.append("Parameters and data are the same.")
    if both and not alike:
        why = " and ".join(differences(new[both[0]][0], old[both[0]][0]))
        about.append(f"The scores cannot be compared, since {why} changed.")
    about += [
        f"{words}: {', '.join(names)}."
        for words, names in (
            ("New points", [name for name in new if name not in old]),
            ("Removed points", [name for name in old if name not in new]),
        )
        if names
    ]
    found = gaps([(new[name][1], old[name][1]) for name in alike])
    return Compared("The previous run", " ".join(about), changed, [*_best(present, previous, new, old), *found])


def _best(
    present: Path, previous: Path, new: dict[str, tuple[Scores, Measured]], old: dict[str, tuple[Scores, Measured]]
) -> list[Gap]:
    """Compares the best points of both reports, if the scores can be compared.

    Returns a list of one difference with its interval, or [] if both reports have the same best point or their scores
    cannot be compared. Each best point was picked for its score, which may be good by chance. The interval is wide enough to
    allow for that.

    Args:
        present, previous: the folders that hold copies of the new and the old report.
        new, old: the scores of both reports by point.
    """
    now, before = (read_report(folder)[0].row.point for folder in (present, previous))
    if now == before or differences(new[now][0], old[before][0]):
        return []
    everything = [measured.estimate for scored in (new, old) for _, measured in scored.values()]
    return [Gap.of(new[now][1], old[before][1], simultaneous(everything))]


def _key_of_page(root: Path) -> str:
    path = root / paths.report_dir() / "index.html"
    return identity.key_of(path.read_text(encoding="utf-8")) if path.exists() else ""


def _kept(folder: Path) -> Kept:
    """Reads the record of a copied report; returns an empty record without one. Removes a damaged copy and raises InputError."""
    if not (folder / RECORD).exists():
        return Kept()
    try:
        return records.read_typed(folder / RECORD, Kept)
    except InputError:
        shutil.rmtree(folder)
        raise


def _seed(root: Path, row: Row) -> int | None:
    """Returns the seed of the noise from which the images of a point start."""
    return read_samples_record(root / paths.samples_file(Point.parse(row.point))).settings.get("seed")


def _about(data: dataset.DatasetRecord) -> dict[str, Any]:
    return {"version": data.sha256[:16], "images": data.counts, "shape": data.shape, "classes": data.classes}


def _files(rows: list[Row]) -> list[Path]:
    points = [Point.parse(row.point) for row in rows]
    report = paths.report_dir()
    names = ("best.json", "front.json", "index.html", "points.csv", "samples.png", PICTURE)
    scores = [path for point in points for path in (paths.metrics_file(point), paths.influence_file(point))]
    return [*(report / name for name in names), paths.run_file(report), *scores]


def _measured(folder: Path, about: Kept) -> dict[str, tuple[Scores, Measured]]:
    """Reads the scores of a copied report, by the name of the point. Raises InputError."""
    found = {}
    for row in read_report(folder)[1]:
        point = Point.parse(row.point)
        scores = read_scores(folder, point)
        estimate = scores.estimate(read_point_influence(folder, point, scores))
        found[row.point] = scores, Measured(row.point, estimate, about.seeds.get(row.point))
    return found


def _when(folder: Path) -> list[str]:
    """Returns a sentence that says when and from which commit a copied report was made; [] if that is unknown."""
    run = read_run(folder, paths.report_dir())
    if run is None:
        return []
    commit = f", commit {run.git_commit[:10]}{' with edits' if run.git_dirty else ''}" if run.git_commit else ""
    return [f"That run ended at {datetime.fromtimestamp(run.ended / 1000, UTC):%Y-%m-%d %H:%M} UTC{commit}."]
