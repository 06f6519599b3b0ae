"""How sure a score is: intervals of a score and of the difference of two, from one influence value per image.

The influence of image i on a score s of N images is l_i = (N - 1) (mean_j s_(-j) - s_(-i)), with s_(-i) the score without it
(Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 3). The variance of s is then about
sum_i l_i^2 / (N (N - 1)). Two scores whose i-th images belong together, such as two samplers that start from the same noise,
differ by something whose influence values are the differences: what both share by luck cancels.

Who looks at many scores finds a good one by luck. Two answers, both from the joint normal distribution of the scores' errors,
whose covariance is that of the influence values; its quantiles are those of DRAWS drawn errors e:

- which scores may be the best (multiple comparisons with the best: Hsu 1981, Simultaneous confidence intervals for all distances
  from the "best"; with a critical value for each score, as Edwards and Hsu 1983 have it): score i stays if it lies no more than
  d_i standard errors of the difference behind any other, with d_i the quantile of max_j (e_i - e_j)/sigma_ij. For the score that
  is truly best this fails no more often than one time in 20 at a confidence of 0.95, however many others there are.
- intervals of all differences at once (Tukey 1953): as many standard errors to each side as the quantile of
  max_ij |e_i - e_j|/sigma_ij. They hold for differences that were picked because they are large, too.

Without torch: who compares scores needn't wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 10_000  # leaves 0.02 standard errors of doubt about a quantile


def quantile(confidence: float = CONFIDENCE) -> float:
    """How many standard errors a two-sided interval reaches to each side: 1.96 for 0.95. Raises ValueError outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} must lie between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def standard_error(influence: NDArray[np.floating]) -> float:
    """Of a score, from the influence values [N] of its images. Raises ValueError for fewer than two."""
    if len(influence) < 2:
        raise ValueError(f"an error takes two influence values or more, found {len(influence)}")
    return float(np.std(influence, ddof=1, dtype=np.float64) / np.sqrt(len(influence)))


@dataclass(frozen=True)
class Estimate:
    """A score, its standard error, and the influence values [N] of its images where they are known."""

    value: float
    error: float
    influence: NDArray[np.floating] | None = field(default=None, compare=False, repr=False)

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """-> low, high."""
        reach = quantile(confidence) * self.error
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class Difference(Estimate):
    """a - b. paired: whether its error comes from the images in pairs."""

    paired: bool = False


def difference(a: Estimate, b: Estimate) -> Difference:
    """a - b: in pairs where both know their influence values and have as many, else as if drawn independently."""
    value = a.value - b.value
    if a.influence is None or b.influence is None or len(a.influence) != len(b.influence):
        return Difference(value, float(np.hypot(a.error, b.error)))
    between = a.influence.astype(np.float64) - b.influence
    return Difference(value, standard_error(between), between, paired=True)


def may_be_best(scores: Sequence[Estimate], direction: int, confidence: float = CONFIDENCE) -> list[bool]:
    """For each score, whether it may be the best of all. direction: -1 where lower is better, 1 where higher is.

    The best in truth is among them with that confidence. Raises ValueError for a confidence outside (0, 1).
    """
    quantile(confidence)
    values = -direction * np.array([score.value for score in scores])
    errors, luck = _joint(scores)
    kept = []
    for i, error in enumerate(errors):
        behind = values[i] - values
        known = error > 0
        if (behind[~known] > 0).any():
            kept.append(False)
        elif not known.any():
            kept.append(True)
        else:
            drawn = ((luck[:, [i]] - luck[:, known]) / error[known]).max(1)
            kept.append(bool((behind[known] / error[known]).max() <= np.quantile(drawn, confidence)))
    return kept


def simultaneous(scores: Sequence[Estimate], confidence: float = CONFIDENCE) -> float:
    """How many standard errors the intervals of the differences of any two of these scores must reach to each side to hold all
    at once. Raises ValueError for a confidence outside (0, 1).
    """
    alone = quantile(confidence)
    errors, luck = _joint(scores)
    largest = np.zeros(len(luck))
    for i, error in enumerate(errors):
        known = error > 0
        if known.any():
            np.maximum(largest, (abs(luck[:, [i]] - luck[:, known]) / error[known]).max(1), out=largest)
    return max(alone, float(np.quantile(largest, confidence)))


def _joint(scores: Sequence[Estimate]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """-> the standard errors of all differences [K, K], 0 where two scores have the same luck, and drawn errors [DRAWS, K]."""
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
    return errors, np.random.RandomState(0).standard_normal(
        (DRAWS, len(scores))
    ) @ root  # a stream that numpy promises to keep
