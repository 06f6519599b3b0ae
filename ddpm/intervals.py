"""How sure a score is: intervals of a score and of the difference of two, from one influence value per image.

The influence of image i on a score s of N images is l_i = (N - 1) (mean_j s_(-j) - s_(-i)), with s_(-i) the score without it
(Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 3). The variance of s is then about
sum_i l_i^2 / (N (N - 1)). Two scores whose i-th images belong together, such as two samplers that start from the same noise,
differ by something whose influence values are the differences: what both share by luck cancels.

Without torch: who compares scores needn't wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


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
