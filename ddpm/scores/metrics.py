"""What the scores of a point are called and which way they are better (the only place that says so), and which point is best."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import store
from ddpm.files.params import Point
from ddpm.scores.intervals import CONFIDENCE, Difference, Estimate, difference, may_be_best, quantile


@dataclass(frozen=True)
class Metric:
    """direction: -1 where lower is better, 1 where higher is."""

    title: str
    direction: int

    @property
    def words(self) -> str:
        return "higher is better" if self.direction > 0 else "lower is better"

    def rank(self, value: float) -> float:
        """The better, the lower: a key to sort by."""
        return -self.direction * value

    def compare(self, a: Estimate, b: Estimate, confidence: float = CONFIDENCE) -> tuple[int, Difference]:
        """-> 1 where a is significantly better than b, -1 where it is worse, 0 where that is not known; and a - b."""
        gap = difference(a, b)
        low, high = gap.interval(confidence)
        return (self.direction if low > 0 else -self.direction if high < 0 else 0), gap


METRICS = {
    "fid": Metric("FID", -1),
    "kid": Metric("KID", -1),
    "precision": Metric("precision", 1),
    "recall": Metric("recall", 1),
    "inception_score": Metric("Inception Score", 1),
}
HEADLINE = "fid"  # what points are ranked and promoted by: the one with influence values
RANKING = METRICS[HEADLINE]

# The entries of metrics/POINT.json.
COUNTS = ("evaluations", "images", "reference_images", "layer")
SCORES: tuple[str, ...] = (
    "evaluations",
    "fid",
    "fid_low",
    "fid_high",
    "confidence",
    "kid",
    "kid_low",
    "kid_high",
    "kid_std",
    "precision",
    "recall",
    *COUNTS[1:],
)
OPTIONAL = ("fid_infinity", "inception_score", "copying", "copying_z")  # not every protocol allows them
PROTOCOL = ("reference", "extractor_sha256", "layer", "images", "reference_images")
HASHES = (*PROTOCOL[:2], "samples", "model")
ANY = (-1e9, 1e9)  # far from where squares overflow
RANGES = {
    **dict.fromkeys(COUNTS, (1, 2**31 - 1)),
    **dict.fromkeys(("fid", "fid_low", "fid_high", "kid_std"), (0, ANY[1])),
    **dict.fromkeys(("precision", "recall"), (0, 1)),
    "confidence": (0.01, 0.9999),
}


def read_scores(root: Path, point: Point) -> dict[str, Any]:
    """Reads metrics/POINT.json. Raises InputError for the scores of another point, a missing entry, or an impossible value."""
    path = root / store.metrics_file(point)
    scores = store.read_record(path)
    if scores.get("point") != point.name:
        raise InputError(f"{path}: holds the scores of {scores.get('point')}; run `ddpm evaluate {point.name}` again")
    needed = dict.fromkeys((*SCORES, *HASHES))
    if absent := [key for key in needed if key not in scores]:
        raise InputError(f"{path}: without {', '.join(absent)}; run `ddpm evaluate {point.name}` again")
    if wrong := unsound(scores, [*needed, *(key for key in OPTIONAL if key in scores)]):
        raise InputError(f"{path}: no sound value of {', '.join(wrong)}; run `ddpm evaluate {point.name}` again")
    return scores


def unsound(scores: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """Returns those of the keys whose values no evaluation gives: of another type, out of range, or outside their interval."""
    wrong = [key for key in keys if not _in_range(key, scores.get(key))]
    for key in ("fid", "kid"):
        bounds = [scores[name] for name in (f"{key}_low", key, f"{key}_high") if name in keys and name not in wrong]
        if bounds != sorted(bounds):
            wrong.append(key)
    return wrong


def _in_range(key: str, value: Any) -> bool:
    if key in HASHES:
        return isinstance(value, str)
    low, high = RANGES.get(key, ANY)
    return type(value) in ((int,) if key in COUNTS else (int, float)) and low <= value <= high


def estimate_of(scores: Mapping[str, Any], influence: NDArray[np.floating] | None = None) -> Estimate:
    """The headline score of metrics/POINT.json with its error."""
    value = scores[HEADLINE]
    return Estimate(value, (scores[f"{HEADLINE}_high"] - value) / quantile(scores["confidence"]), influence)


@dataclass(frozen=True)
class Candidate:
    """A point, as far as choosing goes."""

    name: str
    evaluations: int
    estimate: Estimate

    @property
    def order(self) -> tuple[float, int, str]:
        return RANKING.rank(self.estimate.value), self.evaluations, self.name


@dataclass(frozen=True)
class Choice:
    """leader: the point of the best score. tied: the names of all that may be the best in truth. best: of these, the one of the
    fewest evaluations."""

    best: Candidate
    leader: Candidate
    tied: tuple[str, ...]


def choose(candidates: Sequence[Candidate]) -> Choice:
    """Raises ValueError when there are none."""
    leader = min(candidates, key=lambda point: point.order)
    kept = may_be_best([point.estimate for point in candidates], RANKING.direction)
    tied = [point for point, may_be in zip(candidates, kept, strict=True) if may_be]
    best = min(tied, key=lambda point: (point.evaluations, *point.order))
    return Choice(best, leader, tuple(point.name for point in tied))


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The points that no point with as few evaluations beats, by evaluations."""
    kept: list[Candidate] = []
    for point in sorted(candidates, key=lambda point: (point.evaluations, *point.order)):
        if not kept or RANKING.rank(point.estimate.value) < RANKING.rank(kept[-1].estimate.value):
            kept.append(point)
    return kept


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
