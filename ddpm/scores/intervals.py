"""Estimates how certain a score is: intervals of scores and of differences, from one influence value per image.

The influence of image i on a score s of N images is l_i = (N - 1) (mean_j s_(-j) - s_(-i)), with s_(-i) the score
without it (Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 3). The variance of s is then
about sum_i l_i^2 / (N (N - 1)). Images of two scores may be paired, as for two samplers that start from the same noise.
The influence values of the difference are then the differences of the influence values, and errors that both scores
share cancel.

Among many scores, the best looks good partly by chance. Two methods account for that. Both use the joint normal
distribution of the scores' errors, whose covariance is that of the influence values. Its quantiles are those of DRAWS
random errors e:

- `may_be_best`: multiple comparisons with the best (Hsu 1981, Simultaneous confidence intervals for all distances from
  the "best"), with a critical value for each score (Edwards and Hsu 1983). Score i may be the best if no other score j is
  better by more than d_i sigma_ij. Here sigma_ij is the standard error of the difference of scores i and j, and d_i the
  quantile of max_j (e_i - e_j)/sigma_ij. At a confidence of 0.95 the truly best score is excluded at most one time in
  20, however many scores there are.
- `simultaneous`: intervals that hold for all differences together (Tukey 1953). They reach to each side as many
  standard errors as the quantile of max_ij |e_i - e_j|/sigma_ij. So they hold for differences that were picked for
  their size, too.

This module needs no torch, so comparing scores does not import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 10_000  # a quantile is then known to 0.02 standard errors


def quantile(confidence: float = CONFIDENCE) -> float:
    """Returns the half width of an interval in standard errors: 1.96 for 0.95. Raises ValueError outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} must lie between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def standard_error(influence: NDArray[np.floating]) -> float:
    """Returns the standard error of a score from the influence values [N] of its images. Raises ValueError if N < 2."""
    if len(influence) < 2:
        raise ValueError(f"an error takes two influence values or more, found {len(influence)}")
    return float(np.std(influence, ddof=1, dtype=np.float64) / np.sqrt(len(influence)))


@dataclass(frozen=True)
class Estimate:
    """A score, its standard error, and the influence values [N] of its images if they are known."""

    value: float
    error: float
    influence: NDArray[np.floating] | None = field(default=None, compare=False, repr=False)

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Returns (low, high)."""
        reach = quantile(confidence) * self.error
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class Difference(Estimate):
    """The difference a - b of two scores. paired: whether the error was computed from paired images."""

    paired: bool = False


def difference(a: Estimate, b: Estimate) -> Difference:
    """Returns a - b. The error is paired if both scores have as many influence values, and else that of independent scores."""
    value = a.value - b.value
    if a.influence is None or b.influence is None or len(a.influence) != len(b.influence):
        return Difference(value, float(np.hypot(a.error, b.error)))
    between = a.influence.astype(np.float64) - b.influence
    return Difference(value, standard_error(between), between, paired=True)


def may_be_best(scores: Sequence[Estimate], direction: int, confidence: float = CONFIDENCE) -> list[bool]:
    """Returns for each score whether it may be the best. The truly best score is among those with the given confidence.

    Args:
        scores: scores under the same metric.
        direction: -1 if lower is better, 1 if higher is.
        confidence: in (0, 1).

    Raises:
        ValueError: the confidence is outside (0, 1).
    """
    quantile(confidence)
    values = -direction * np.array([score.value for score in scores])
    errors, draws = _joint(scores)
    kept = []
    for i, error in enumerate(errors):
        behind = values[i] - values
        known = error > 0
        if (behind[~known] > 0).any():
            kept.append(False)
        elif not known.any():
            kept.append(True)
        else:
            largest = ((draws[:, [i]] - draws[:, known]) / error[known]).max(1)
            kept.append(bool((behind[known] / error[known]).max() <= np.quantile(largest, confidence)))
    return kept


def simultaneous(scores: Sequence[Estimate], confidence: float = CONFIDENCE) -> float:
    """Returns the half width, in standard errors, at which the intervals of all differences of two scores hold together.

    Raises ValueError for a confidence outside (0, 1).
    """
    alone = quantile(confidence)
    errors, draws = _joint(scores)
    largest = np.zeros(len(draws))
    for i, error in enumerate(errors):
        known = error > 0
        if known.any():
            np.maximum(largest, (abs(draws[:, [i]] - draws[:, known]) / error[known]).max(1), out=largest)
    return max(alone, float(np.quantile(largest, confidence)))


def _joint(scores: Sequence[Estimate]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns standard errors of all differences [K, K], 0 if both errors are equal, and random errors [DRAWS, K]."""
    covariance = np.diag([score.error**2 for score in scores])
    groups: dict[int, list[int]] = {}
    for index, score in enumerate(scores):
        if score.influence is not None:
            groups.setdefault(len(score.influence), []).append(index)
    for count, group in groups.items():
        rows = np.array([scores[index].influence for index in group], np.float64)
        covariance[np.ix_(group, group)] = np.cov(rows) / count
    alone = np.diag(covariance)
    variance = np.add.outer(alone, alone) - 2 * covariance
    errors = np.sqrt(np.where(variance > 1e-12 * np.add.outer(alone, alone), variance, 0))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    standard = np.random.RandomState(0).standard_normal((DRAWS, len(scores)))  # numpy guarantees this stream
    return errors, standard @ root
