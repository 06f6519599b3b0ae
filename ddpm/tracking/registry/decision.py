"""Decides from scores whether a challenger replaces the champion. registry.py calls it and records the result.

A challenger wins if its score is better: the interval of the difference from the champion's score lies wholly on its side. A
challenger that takes `promotion.fewer_evaluations` times fewer network evaluations than the champion wins, too, if it is
nearly as good as the best champion there was: its score is worse by the share `promotion.margin` at most. That is tested by
the far end of the interval, and against the best champion, so that many cheaper challengers cannot lower the score bit by bit.

The challenger was picked as the best of several points, so partly by chance. The intervals therefore hold for all these
points together (Dunnett 1955). They are paired for points whose images start from the champion's noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files.scores import COMPARED, Scores
from ddpm.parameters import Promotion
from ddpm.scores.intervals import Estimate, against_one, difference
from ddpm.scores.metrics import RANKING

AGAIN = "evaluate the point again (dvc repro)"


@dataclass(frozen=True)
class Protocol:
    """What two scores must share to be comparable: the dataset version, and how the scores were computed."""

    dataset: str  # sha256
    layer: int
    images: int
    reference_images: int
    extractor_sha256: str

    @classmethod
    def of(cls, scores: Scores) -> Protocol:
        return cls(scores.reference, scores.layer, scores.images, scores.reference_images, scores.extractor_sha256)

    @property
    def id(self) -> str:
        """The name of the protocol in tags: 12 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: Protocol) -> str:
        """Says in words what changed from `other` to this protocol, such as "layer 64 -> 2048"."""
        mine, theirs = asdict(self), asdict(other)
        hashes = {"dataset": "dataset version", "extractor_sha256": "feature extractor"}
        changed = [name for name in mine if mine[name] != theirs[name]]
        return ", ".join(
            hashes[name] if name in hashes else f"{name} {theirs[name]} -> {mine[name]}".replace("_", " ")
            for name in changed
        )


@dataclass(frozen=True)
class Score:
    """A point's headline score under a protocol. seed: seed of the noise that its images start from, if known."""

    estimate: Estimate
    evaluations: int
    protocol: Protocol
    seed: int | None = None

    @classmethod
    def of(cls, scores: Scores, influence: NDArray[np.floating] | None = None, seed: int | None = None) -> Score:
        """Builds the score of a point. Raises InputError if the number of influence values differs from the number of images."""
        if influence is not None and len(influence) != scores.images:
            raise InputError(f"{len(influence)} influence values for {scores.images} images: {AGAIN}")
        return cls(scores.estimate(influence), scores.evaluations, Protocol.of(scores), seed)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Score:
        """Reads the content of metrics/POINT.json, as far as a comparison needs it. Raises InputError."""
        try:
            return cls.of(Scores.from_json(found, needed=COMPARED))
        except ValueError as error:
            raise InputError(f"scores {error} cannot be compared: {AGAIN}") from None

    @property
    def value(self) -> float:
        return self.estimate.value


@dataclass(frozen=True)
class Decision:
    """The result of `promote` or `rollback`.

    Args:
        promoted: whether the challenger became champion.
        version: the version that is champion now; None without a champion.
        reason: why, in one line.
        point: the point that was compared, or that came back.
        previous: the version that was champion before.
        champion: the point of the present champion.
    """

    promoted: bool
    version: str | None
    reason: str
    point: str
    previous: str | None = None
    champion: str | None = None

    @property
    def line(self) -> str:
        """The champion and the reason, in one line."""
        return f"champion: version {self.version} ({self.champion}): {self.reason}" if self.version else self.reason


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger replaces the champion. reason: why, as the end of a sentence.

    evidence: difference (challenger - champion), low, high, confidence, paired, points; behind_best and margin if the evaluations
    could decide; empty if nothing was compared.
    """

    wins: bool
    reason: str
    evidence: dict[str, Any] = field(default_factory=dict)


def decide(
    challenger: Score,
    champion: Score | None,
    rule: Promotion,
    force: bool = False,
    looked_at: Sequence[Estimate] = (),
    best: Score | None = None,
) -> Verdict:
    """Decides whether the challenger replaces the champion.

    Args:
        challenger: the challenger's score.
        champion: the champion's score; None if it is unknown, which only `force` allows.
        rule: the section `promotion`.
        force: let the challenger win whatever the scores say.
        looked_at: the scores of all points from which the challenger was picked, under its protocol and with its seed;
            by default the challenger's score alone.
        best: the score of the best champion there was; None if that is the present champion.

    Raises:
        ValueError: without `force`, if the scores belong to different protocols.
    """
    best = best or champion
    comparable = champion is not None and challenger.protocol == champion.protocol
    # protects: tests/tracking/test_promote.py::test_scores_under_different_protocols_are_never_compared
    if not (comparable and best is not None and best.protocol == challenger.protocol) and not force:
        raise ValueError("scores under different protocols cannot be compared")
    if champion is None or best is None or not comparable:
        return Verdict(True, "--replace was given")
    looked_at = looked_at or [challenger.estimate]
    gap = _gap(challenger, champion, rule, looked_at)
    evidence = {**asdict(gap), "confidence": rule.confidence, "points": len(looked_at)}
    if force:
        return Verdict(True, "--replace was given", evidence)
    points = f" of {len(looked_at)} points" if len(looked_at) > 1 else ""
    interval = (
        f"{100 * rule.confidence:g}% interval{points} {gap.low:.3g} to {gap.high:.3g},"
        f" {'paired' if gap.paired else 'independent'}"
    )
    mine, theirs = (RANKING.text(score.value) for score in (challenger, champion))
    words = {1: "is better than", 0: "is not significantly better than", -1: "is worse than"}[gap.side]
    reason = f"{RANKING.title} {mine} {words} {theirs} (difference {gap.difference:.3g}, {interval})"
    if gap.side > 0 or challenger.evaluations * rule.fewer_evaluations > champion.evaluations:
        return Verdict(gap.side > 0, reason, evidence)
    most, allowed = _gap(challenger, best, rule, looked_at).most_behind, rule.margin * abs(best.value)
    near = most <= allowed
    evidence |= {"behind_best": most, "margin": allowed}
    whose = f"the champion's {theirs}" if best is champion else f"the best champion's {RANKING.text(best.value)}"
    words = f"{'at most' if near else 'perhaps'} {most:.3g} worse than {whose} (the margin is {allowed:.3g})"
    evaluations = f"{challenger.evaluations:,} evaluations instead of {champion.evaluations:,}"
    if near:
        return Verdict(True, f"{RANKING.title} {mine} is {words}, with {evaluations}", evidence)
    return Verdict(False, f"{reason}, and {words}, so {evaluations} do not decide", evidence)


@dataclass(frozen=True)
class _Gap:
    """The challenger's score minus another one, and an interval that holds for all points looked at.

    side: 1 if the challenger is better for sure, -1 if it is worse, else 0.
    """

    difference: float
    low: float
    high: float
    paired: bool

    @property
    def side(self) -> int:
        return RANKING.direction if self.low > 0 else -RANKING.direction if self.high < 0 else 0

    @property
    def most_behind(self) -> float:
        """How much worse the challenger is at most."""
        return self.high if RANKING.direction < 0 else -self.low


def _gap(challenger: Score, other: Score, rule: Promotion, looked_at: Sequence[Estimate]) -> _Gap:
    theirs = other.estimate if challenger.seed == other.seed else replace(other.estimate, influence=None)
    gap = difference(challenger.estimate, theirs)
    reach = against_one(theirs, looked_at, rule.confidence) * gap.error
    return _Gap(gap.value, gap.value - reach, gap.value + reach, gap.paired)
