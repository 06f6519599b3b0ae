"""Estimates how certain a score is: intervals of scores and of differences, from one influence value per image.

The influence of image i on a score s of N images is l_i = (N - 1) (mean_j s_(-j) - s_(-i)). Here s_(-i) is the score without
image i (Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 3). The variance of s is then about
sum_i l_i^2 / (N (N - 1)). Images of two scores may be paired, for example if two samplers start from the same noise. Then the
influence values of the difference are the differences of the influence values, and errors that both scores share cancel.

Among many scores, the best looks good partly by chance. Three functions account for that. All use the joint normal
distribution of the scores' errors, whose covariance follows from the influence values. The quantiles come from DRAWS
random errors e.

`compared_with_best` makes multiple comparisons with the best score (Hsu 1981, Simultaneous confidence intervals for all
distances from the "best"). Each score has its own critical value (Edwards and Hsu 1983). Let sigma_ij be the standard error
of the difference of scores i and j. The critical value d_i is the quantile of max_j (e_i - e_j)/sigma_ij. The function returns:

- Whether each score may be the best (also from `may_be_best`). Score i may be the best if no other score j is better by more
  than d_i sigma_ij. At a confidence of 0.95, the truly best score is excluded at most one time in 20, however many scores
  there are.
- An upper limit of how much worse each score is than the truly best score: max_j (s_i - s_j + d_j sigma_ij) for score i, if lower
  scores are better. The 95% covers all scores together.

`simultaneous` gives intervals that hold for all differences together (Tukey 1953). The half width in standard errors is the
quantile of max_ij |e_i - e_j|/sigma_ij. So the intervals also hold for differences that were picked for their size.

`against_one` gives intervals that hold at once for the differences of all scores from one reference (Dunnett 1955, A multiple
comparison procedure for comparing several treatments with a control). So the intervals also hold if one of the scores was
picked as the best.

This module does not import torch, so processes that only compare scores need no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 10_000  # random errors from which quantiles are estimated, to about 0.02 standard errors
BLOCK = 128  # draws that are processed at a time, so that they fit into a processor's cache


def quantile(confidence: float = CONFIDENCE) -> float:
    """Returns the half width of an interval in standard errors: 1.96 for 0.95. Raises ValueError for values outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} must lie between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def standard_error(influence: NDArray[np.floating]) -> float:
    """Returns the standard error of a score from the influence values [N] of its images. Raises ValueError if N < 2."""
    if len(influence) < 2:
        raise ValueError(f"a standard error takes two influence values or more, found {len(influence)}")
    return float(np.std(influence, ddof=1, dtype=np.float64) / np.sqrt(len(influence)))


@dataclass(frozen=True)
class Estimate:
    """A score, its standard error, and the influence values [N] of its images, or None if they are unknown."""

    value: float
    error: float
    influence: NDArray[np.floating] | None = field(default=None, compare=False, repr=False)

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Returns the ends (low, high) of the confidence interval."""
        reach = quantile(confidence) * self.error
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class Difference(Estimate):
    """The difference a - b of two scores. `paired` says whether the error was computed from paired images."""

    paired: bool = False


def difference(a: Estimate, b: Estimate) -> Difference:
    """Returns a - b. Images are paired if both scores have the same number of influence values. Else, errors are independent."""
    value = a.value - b.value
    if a.influence is None or b.influence is None or len(a.influence) != len(b.influence):
        return Difference(value, float(np.hypot(a.error, b.error)))
    between = a.influence.astype(np.float64) - b.influence
    return Difference(value, standard_error(between), between, paired=True)


def may_be_best(scores: Sequence[Estimate], direction: int, confidence: float = CONFIDENCE) -> list[bool]:
    """Returns for each score whether it may be the best.

    For the truly best score, this is True with a probability of `confidence` or more. See `compared_with_best`,
    which has the same arguments.
    """
    return compared_with_best(scores, direction, confidence)[0]


def compared_with_best(
    scores: Sequence[Estimate], direction: int, confidence: float = CONFIDENCE
) -> tuple[list[bool], list[float], float]:
    """Compares each score with the truly best score. The confidence covers all statements together.

    Args:
        scores: scores of the same metric.
        direction: -1 if lower is better, 1 if higher is better.
        confidence: in (0, 1).

    Returns:
        For each score, whether it may be the best. For each score, an upper limit of how much worse it is than the truly best
        score, 0 or more. The half width that `simultaneous` returns for these scores.

    Raises:
        ValueError: the confidence is outside (0, 1).
    """
    single = quantile(confidence)  # the half width for one difference
    values = -direction * np.array([score.value for score in scores])
    errors, draws = _joint(scores)
    behind = np.subtract.outer(values, values)  # how much worse score i is than score j
    largest = _largest(draws, errors)
    reach = np.quantile(largest, confidence, axis=1)[:, None] * errors
    # the largest of all differences is the largest of all absolute differences, since i - j = -(j - i)
    together = max(single, float(np.quantile(largest.max(0), confidence)))
    return (behind <= reach).all(1).tolist(), np.maximum(0, (behind + reach.T).max(1)).tolist(), together


def _largest(draws: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the largest difference between the error of score i and another score's error, in each draw: [K, DRAWS].

    Differences are in units of their standard errors.

    Args:
        draws: random errors, [DRAWS, K].
        errors: standard errors of all differences, [K, K]; 0 for scores that are not compared.
    """
    largest = np.zeros(draws.shape[::-1])
    for start in range(0, len(draws), BLOCK):
        block = draws[start : start + BLOCK]
        for i, error in enumerate(errors):
            known = error > 0
            if known.any():
                gaps = (block[:, [i]] - block[:, known]) / error[known]
                largest[i, start : start + BLOCK] = gaps.max(1)
    return largest


def against_one(reference: Estimate, scores: Sequence[Estimate], confidence: float = CONFIDENCE) -> float:
    """Returns the half width, in standard errors, of intervals that hold at once for all differences from `reference`.

    Raises ValueError for a confidence outside (0, 1).
    """
    single = quantile(confidence)  # the half width for one difference
    errors, draws = _joint([reference, *scores])
    known = errors[0] > 0
    if not known.any():
        return single
    largest = (abs(draws[:, [0]] - draws[:, known]) / errors[0][known]).max(1)
    return max(single, float(np.quantile(largest, confidence)))


def simultaneous(scores: Sequence[Estimate], confidence: float = CONFIDENCE) -> float:
    """Returns the half width, in standard errors, of intervals that hold at once for the differences of all pairs of scores.

    Raises ValueError for a confidence outside (0, 1).
    """
    return compared_with_best(scores, 1, confidence)[2]


def _joint(scores: Sequence[Estimate]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the standard errors of all differences, [K, K], and random errors of all scores, [DRAWS, K].

    The standard error is 0 for scores whose errors are always equal.
    """
    covariance = np.diag([score.error**2 for score in scores])
    groups: dict[int, list[int]] = {}
    for index, score in enumerate(scores):
        if score.influence is not None:
            groups.setdefault(len(score.influence), []).append(index)
    for count, group in groups.items():
        rows = np.array([scores[index].influence for index in group], np.float64)
        covariance[np.ix_(group, group)] = np.cov(rows) / count
    variances = np.diag(covariance)
    variance = np.add.outer(variances, variances) - 2 * covariance
    errors = np.sqrt(np.where(variance > 1e-12 * np.add.outer(variances, variances), variance, 0))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    standard = np.random.RandomState(0).standard_normal((DRAWS, len(scores)))  # numpy guarantees this stream
    return errors, standard @ root
