"""Chooses among points by their scores: the cheapest point that is nearly as good as the best one.

"Nearly" is a margin, a share of the best score. A point with a worse score must prove that it lies within the margin, so the
choice of few images is the point with the best score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddpm.scores.intervals import Estimate, may_be_best, most_behind
from ddpm.scores.metrics import RANKING


@dataclass(frozen=True)
class Candidate:
    """A point to choose from.

    Args:
        name: the name of the point.
        evaluations: network evaluations per image.
        estimate: the headline score with its standard error.
    """

    name: str
    evaluations: int
    estimate: Estimate

    @property
    def order(self) -> tuple[float, int, str]:
        """A key to sort by: best score first, then fewest evaluations."""
        return RANKING.rank(self.estimate.value), self.evaluations, self.name


@dataclass(frozen=True)
class Choice:
    """The result of `choose`.

    Args:
        best: the point with the fewest evaluations of those that are worse than the truly best one by the margin at most.
        leader: the point with the best score.
        tied: names of the points that cannot be told apart from the truly best one (see `may_be_best`).
    """

    best: Candidate
    leader: Candidate
    tied: tuple[str, ...]


def choose(candidates: Sequence[Candidate], margin: float) -> Choice:
    """Chooses the best point.

    Args:
        candidates: the points, at least one.
        margin: how much worse than the truly best point the choice may be, as a share of the best score.

    Raises:
        ValueError: there are no candidates.
    """
    leader = min(candidates, key=lambda point: point.order)
    estimates = [point.estimate for point in candidates]
    kept = may_be_best(estimates, RANKING.direction)
    allowed = margin * abs(leader.estimate.value)
    near = [
        point
        for point, behind in zip(candidates, most_behind(estimates, RANKING.direction), strict=True)
        if behind <= allowed
    ]
    best = min([leader, *near], key=lambda point: (point.evaluations, *point.order))
    return Choice(best, leader, tuple(point.name for point, may_be in zip(candidates, kept, strict=True) if may_be))


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the points with a better score than all points of as few or fewer evaluations, sorted by evaluations."""
    kept: list[Candidate] = []
    for point in sorted(candidates, key=lambda point: (point.evaluations, *point.order)):
        if not kept or RANKING.rank(point.estimate.value) < RANKING.rank(kept[-1].estimate.value):
            kept.append(point)
    return kept
