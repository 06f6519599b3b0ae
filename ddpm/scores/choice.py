"""Chooses among points by their scores: the cheapest one that cannot be told apart from the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddpm.scores.intervals import Estimate, may_be_best
from ddpm.scores.metrics import RANKING


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
