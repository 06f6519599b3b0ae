"""METRICS: a row for each metric that judges samples.

Score files, tables, plots, the report, MLflow and the registry take their metrics from this table.
A row computes its metric from the features of two sets of images (`fidelity.Sets`). This module imports no torch, since processes
that only show scores use it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ddpm.scores.intervals import Estimate, standard_error
from ddpm.scores.metric import LARGEST, Entry, Metric

if TYPE_CHECKING:
    from ddpm.scores.fidelity import Sets


def _fid(sets: Sets) -> Estimate:
    """Returns FID. Rounds influence values to float32, as metrics/POINT.influence.npy does, so both give the same interval."""
    influence = sets.jackknife.influence.astype(np.float32)
    return Estimate(sets.jackknife.fid, standard_error(influence), influence)


def _cmmd(sets: Sets) -> Estimate:
    """Returns CMMD. Rounds influence values to float32, as metrics/POINT.influence.npy does, so both give the same interval."""
    influence = sets.cmmd[1].astype(np.float32)
    return Estimate(sets.cmmd[0], standard_error(influence), influence)


def _density_coverage(sets: Sets, part: int) -> float | None:
    return sets.density_coverage and sets.density_coverage[part]


def _inception_score(sets: Sets, part: int) -> float | None:
    return sets.inception_score and sets.inception_score[part]


ROWS = (
    Metric(
        "fid",
        "FID",
        _fid,
        low=0,
        direction=-1,
        interval=True,
        digits=4,
        more=(
            Entry(
                "fid_infinity",
                "FID, infinite N",
                lambda sets: sets.jackknife.infinity(sets.fake.shape[1]),
                low=0,
                optional=True,
                interval=True,
            ),
        ),
    ),
    Metric(
        "kid",
        "KID",
        lambda sets: Estimate(sets.kid[0], sets.kid_error),
        direction=-1,
        interval=True,
        digits=2,
        more=(Entry("kid_std", "", lambda sets: sets.kid[1], low=0),),
    ),
    Metric("precision", "precision", lambda sets: sets.precision_recall[0], low=0, high=1, direction=1),
    Metric("recall", "recall", lambda sets: sets.precision_recall[1], low=0, high=1, direction=1),
    Metric("density", "density", lambda sets: _density_coverage(sets, 0), low=0, optional=True, direction=1),
    Metric("coverage", "coverage", lambda sets: _density_coverage(sets, 1), low=0, high=1, optional=True, direction=1),
    Metric(
        "inception_score",
        "Inception Score",
        lambda sets: _inception_score(sets, 0),
        optional=True,
        direction=1,
        hub="is",
        more=(Entry("inception_score_std", "", lambda sets: _inception_score(sets, 1), optional=True),),
    ),
    Metric(
        "copying",
        "copying",
        lambda sets: sets.copying.closer,
        optional=True,
        more=(Entry("copying_z", "", lambda sets: sets.copying.z, optional=True),),
    ),
)
# The judges: metrics with their own extractors, which are computed if evaluation.judges names them.
JUDGES = tuple(
    Metric(name, title, measure, low=low, direction=-1, interval=True, digits=digits, optional=True, judge=True)
    for name, title, measure, low, digits in (
        ("fd_dinov2", "FD (DINOv2)", _fid, 0, 4),
        ("cmmd", "CMMD", _cmmd, -LARGEST, 3),
        ("sfid", "sFID", _fid, 0, 4),
    )
)
METRICS = {row.name: row for row in (*ROWS, *JUDGES)}
HEADLINE = "fid"  # the metric that ranks and promotes points; it must have an interval and influence values
RANKING = METRICS[HEADLINE]
COPYING = METRICS["copying"]  # the metric in the report's section on memorising


def entries() -> dict[str, Entry]:
    """Returns the Entry of each number, such as fid_low, by name, in the order of the columns of points.csv."""
    return {name: entry for metric in METRICS.values() for name, entry in metric.entries.items()}
