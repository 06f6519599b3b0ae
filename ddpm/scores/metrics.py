"""The metrics that judge samples: their titles, and which way they are better."""

from __future__ import annotations

from dataclasses import dataclass

from ddpm.scores.intervals import CONFIDENCE, Difference, Estimate, difference


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
