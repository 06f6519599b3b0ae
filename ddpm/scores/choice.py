"""Chooses among points by their scores: the cheapest point that cannot be told apart from the best one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddpm.scores.intervals import Estimate, may_be_best
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
        best: the tied point with the fewest evaluations.
        leader: the point with the best score.
        tied: names of the points that cannot be told apart from the truly best one (see `may_be_best`).
    """

    best: Candidate
    leader: Candidate
    tied: tuple[str, ...]


def choose(candidates: Sequence[Candidate]) -> Choice:
    """Chooses the best point. Raises ValueError if there are no candidates."""
    leader = min(candidates, key=lambda point: point.order)
    kept = may_be_best([point.estimate for point in candidates], RANKING.direction)
    tied = [point for point, may_be in zip(candidates, kept, strict=True) if may_be]
    best = min(tied, key=lambda point: (point.evaluations, *point.order))
    return Choice(best, leader, tuple(point.name for point in tied))


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the points with a better score than all points of as few or fewer evaluations, sorted by evaluations."""
    kept: list[Candidate] = []
    for point in sorted(candidates, key=lambda point: (point.evaluations, *point.order)):
        if not kept or RANKING.rank(point.estimate.value) < RANKING.rank(kept[-1].estimate.value):
            kept.append(point)
    return kept
