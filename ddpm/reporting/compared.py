"""Compares a report with an earlier result: which parameters and data changed, and how much each score changed.

If two sample sets start from noise of the same seed, image i of one set belongs to image i of the other. Then the interval of
the change is that of a paired comparison. No DVC stage imports this module, because the output of a stage must not depend on
earlier results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddpm.files.scores import PROTOCOL, Scores
from ddpm.provenance.inputs import leaves
from ddpm.reporting.templates import render
from ddpm.scores.intervals import CONFIDENCE, Estimate, against_one, difference
from ddpm.scores.metrics import RANKING

WORDS = {
    "reference": "the dataset",
    "extractor_sha256": "the feature extractor",
    "reference_images": "the number of reference images",
    "images": "the number of samples",
}


@dataclass(frozen=True)
class Measured:
    """The headline score of a point. seed: the seed of the noise from which the images start; None if unknown."""

    point: str
    estimate: Estimate
    seed: int | None


@dataclass(frozen=True)
class Gap:
    """The difference between a present score and an earlier score.

    Args:
        now: the present score.
        before: the earlier score.
        difference: now - before.
        low, high: the interval of the difference.
        paired: whether the scores were compared in pairs of images.
    """

    now: Measured
    before: Measured
    difference: float
    low: float
    high: float
    paired: bool

    @classmethod
    def of(cls, now: Measured, before: Measured, reach: float) -> Gap:
        """Computes the difference of two scores. reach: half the width of the interval, in standard errors."""
        gap = _difference(now, before)
        half = reach * gap.error
        return cls(now, before, gap.value, gap.value - half, gap.value + half, gap.paired)

    @property
    def words(self) -> str:
        """Says whether the present score is better, worse, the same, or different by chance."""
        if self.low == self.high == 0:
            return "the same"
        sure = self.low > 0 or self.high < 0
        return ("better" if RANKING.rank(self.difference) < RANKING.rank(0) else "worse") if sure else "may be chance"


@dataclass(frozen=True)
class Compared:
    """A comparison with an earlier result, for the page.

    Args:
        title: the name of the earlier result, such as "The previous run".
        about: sentences about the earlier result.
        changes: the name, earlier value and present value of each parameter or property of the data that changed.
        gaps: the differences of the scores.
        confidence: the confidence of all intervals together.
    """

    title: str
    about: str
    changes: Sequence[tuple[str, str, str]] = ()
    gaps: Sequence[Gap] = ()
    confidence: float = CONFIDENCE


def html(found: Sequence[Compared]) -> str:
    """Returns comparisons as HTML."""
    return render("compared.html.jinja", found=found, metric=RANKING)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the dotted name, the old value and the new value of each setting that changed. A missing value is ""."""
    old, new = leaves(before), leaves(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [(name, _plain(old, name), _plain(new, name)) for name in names]


def gaps(pairs: Sequence[tuple[Measured, Measured]]) -> list[Gap]:
    """Computes the difference of each pair (now, before). The intervals hold for all pairs together."""
    if not pairs:
        return []
    reach = against_one(Estimate(0.0, 0.0), [_difference(now, before) for now, before in pairs])
    return [Gap.of(now, before, reach) for now, before in pairs]


def differences(now: Scores, before: Scores) -> list[str]:
    """Returns what was different when two scores were measured, such as "the dataset"; [] if the scores can be compared."""
    return [WORDS.get(name, f"the {name}") for name in PROTOCOL if getattr(now, name) != getattr(before, name)]


def _difference(now: Measured, before: Measured) -> Any:
    same_noise = now.seed is not None and now.seed == before.seed
    return difference(now.estimate, before.estimate if same_noise else replace(before.estimate, influence=None))


def _plain(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, "")
    return value if isinstance(value, str) else json.dumps(value)
