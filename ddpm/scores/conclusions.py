"""Draws conclusions from a sweep's scores: the best point, the Pareto front, and differences of schedules over several seeds.

The best point takes the fewest evaluations of all points whose score is nearly as good as the best score. "Nearly" means within
a margin, a share of the best score. A point with a worse score must prove that it lies within the margin. If this proof fails,
for example with few images, the point with the best score is chosen.

The interval of a score describes one model. Trainings of one schedule with other seeds give models whose true scores scatter
with a standard deviation b, the spread. The scores s_r of R trainings have the variance b^2 + e^2. The sampling error e follows
from the standard errors of all differences s_r - s_q: their mean square is 2 e^2. A sampling error that all trainings share
cancels in these differences. So neither b nor e contains the shared error.

With normal scores, (R - 1) S^2 / (b^2 + e^2) has a chi-squared distribution with R - 1 degrees of freedom, where S^2 is the
variance of the s_r. The interval of b follows from this distribution. The mean over trainings has Student's t distribution,
apart from the shared sampling error, which is normal. The difference of two schedules' means approximately has Student's t
distribution, since the shared error cancels (Welch 1947, The generalization of Student's problem).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ddpm.scores.intervals import CONFIDENCE, Estimate, compared_with_best, difference, quantile
from ddpm.scores.metrics import RANKING


@dataclass(frozen=True)
class Candidate:
    """A point (schedule, sampler and steps) that `choose` may name as the best.

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
        """The key to sort by: best score first, then fewest evaluations."""
        return RANKING.rank(self.estimate.value), self.evaluations, self.name


@dataclass(frozen=True)
class Choice:
    """The result of `choose`.

    Args:
        best: the point with the fewest evaluations, of `leader` and all points that are surely within the margin.
        leader: the point with the best score.
        tied: the names of the points that cannot be told apart from the truly best point (see `may_be_best`).
        reach: the half width, in standard errors, of intervals that hold for the differences of all pairs of points at once.
    """

    best: Candidate
    leader: Candidate
    tied: tuple[str, ...]
    reach: float


def choose(candidates: Sequence[Candidate], margin: float) -> Choice:
    """Chooses the best point: the fewest evaluations among the points that are surely within the margin.

    The point with the best score always counts as within the margin.

    Args:
        candidates: the points, at least one.
        margin: how much worse than the truly best point the chosen point may be, as a share of the best score.

    Raises:
        ValueError: there are no candidates.
    """
    leader = min(candidates, key=lambda point: point.order)
    estimates = [point.estimate for point in candidates]
    may_be_best, gaps, reach = compared_with_best(estimates, RANKING.direction)
    allowed = margin * abs(leader.estimate.value)
    near = [point for point, gap in zip(candidates, gaps, strict=True) if gap <= allowed]
    best = min([leader, *near], key=lambda point: (point.evaluations, *point.order))
    tied = tuple(point.name for point, possible in zip(candidates, may_be_best, strict=True) if possible)
    return Choice(best, leader, tied, reach)


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the Pareto front, sorted by evaluations.

    A point is on the front if its score is better than the score of every other point that takes no more evaluations.
    """
    kept: list[Candidate] = []
    for point in sorted(candidates, key=lambda point: (point.evaluations, *point.order)):
        if not kept or RANKING.rank(point.estimate.value) < RANKING.rank(kept[-1].estimate.value):
            kept.append(point)
    return kept


@dataclass(frozen=True)
class Spread:
    """The spread between trainings of one schedule, a standard deviation.

    Args:
        value: the standard deviation of the models' true scores; 0 if sampling alone explains the differences.
        low, high: the interval of `value`.
        sampling: the standard error of one score from sampling alone, without the part that all trainings share.
    """

    value: float
    low: float
    high: float
    sampling: float


@dataclass(frozen=True)
class Trainings:
    """A summary of the scores of one schedule's trainings, with one sampler and number of steps.

    Args:
        schedule: the name of the first row of `schedules` in params.yaml that has this schedule.
        count: the number of trainings.
        mean: the mean of the trainings' scores.
        variance: the variance of the trainings' scores; 0 with one training.
        low, high: the interval of the mean over all possible trainings; None with one training.
        spread: the spread between the trainings; None with one training.
    """

    schedule: str
    count: int
    mean: float
    variance: float = 0.0
    low: float | None = None
    high: float | None = None
    spread: Spread | None = None


def trainings(schedule: str, scores: Sequence[Estimate], confidence: float = CONFIDENCE) -> Trainings:
    """Summarises the scores of trainings of one schedule that differ only in the seed.

    Args:
        schedule: the name of the first row of `schedules` in params.yaml that has this schedule.
        scores: one score for each training.
        confidence: the confidence of the intervals.
    """
    values = np.array([score.value for score in scores])
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Trainings(schedule, count, mean)
    from scipy.stats import chi2, t  # imported late: the import takes a second, and one training needs no quantile

    variance, tail = float(values.var(ddof=1)), (1 - confidence) / 2
    sampling = float(np.mean([difference(a, b).error ** 2 for a, b in combinations(scores, 2)])) / 2
    shared = max(0.0, float(np.mean([score.error**2 for score in scores])) - sampling)
    reach = math.hypot(
        t.ppf(1 - tail, count - 1) * math.sqrt(variance / count), quantile(confidence) * math.sqrt(shared)
    )
    factors = (1.0, *((count - 1) / chi2.ppf((1 - tail, tail), count - 1)))
    value, low, high = (math.sqrt(max(0.0, variance * factor - sampling)) for factor in factors)
    return Trainings(
        schedule, count, mean, variance, mean - reach, mean + reach, Spread(value, low, high, math.sqrt(sampling))
    )


def between_schedules(a: Trainings, b: Trainings, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Returns the interval of the difference a - b of two schedules' means, or None if a schedule has only one training."""
    shares = [each.variance / each.count for each in (a, b)]
    if min(a.count, b.count) < 2:
        return None
    from scipy.stats import t

    total = sum(shares)
    squares = sum(share**2 / (each.count - 1) for share, each in zip(shares, (a, b), strict=True))
    freedom = total**2 / squares if squares else math.inf
    reach = float(t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(total)
    return a.mean - b.mean - reach, a.mean - b.mean + reach


def from_the_best(trained: Sequence[Trainings]) -> list[tuple[float, float] | None]:
    """Returns the interval of the difference between each schedule's mean and the first schedule's mean.

    The first schedule was picked as the best. So the confidence covers all pairs of schedules together (Bonferroni). See
    `between_schedules`.
    """
    pairs = math.comb(sum(schedule.count > 1 for schedule in trained), 2)
    confidence = 1 - (1 - CONFIDENCE) / max(1, pairs)
    return [between_schedules(schedule, trained[0], confidence) for schedule in trained]
