"""Decides from two scores whether a challenger replaces the champion. registry.py calls it and records the result.

A challenger wins if the interval of the difference of the two scores lies wholly on its side. A challenger that is not
significantly worse wins too if it takes `promotion.fewer_evaluations` times fewer network evaluations. Otherwise the champion
stays. The interval is paired if both scores have influence values of images that start from the same noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files.scores import COMPARED, Scores
from ddpm.parameters import Promotion
from ddpm.scores.intervals import Estimate
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

    evidence: difference (challenger - champion), low, high, confidence, paired; empty if nothing was compared.
    """

    wins: bool
    reason: str
    evidence: dict[str, Any] = field(default_factory=dict)


def decide(challenger: Score, champion: Score | None, rule: Promotion, force: bool = False) -> Verdict:
    """Decides whether the challenger replaces the champion.

    Args:
        challenger: the challenger's score.
        champion: the champion's score; None if it is unknown, which only `force` allows.
        rule: the confidence of the interval, and how many times fewer evaluations decide a tie.
        force: let the challenger win whatever the scores say.

    Raises:
        ValueError: without `force`, if the scores belong to different protocols.
    """
    comparable = champion is not None and challenger.protocol == champion.protocol
    # protects: tests/tracking/test_promote.py::test_scores_under_different_protocols_are_never_compared
    if not comparable and not force:
        raise ValueError("scores under different protocols cannot be compared")
    if champion is None or not comparable:
        return Verdict(True, "--replace was given")
    mine, theirs = challenger.estimate, champion.estimate
    if challenger.seed != champion.seed:
        theirs = replace(theirs, influence=None)
    side, gap = RANKING.compare(mine, theirs, rule.confidence)
    low, high = gap.interval(rule.confidence)
    evidence = {
        "difference": gap.value,
        "low": low,
        "high": high,
        "confidence": rule.confidence,
        "paired": gap.paired,
    }
    if force:
        return Verdict(True, "--replace was given", evidence)
    interval = (
        f"{100 * rule.confidence:g}% interval {low:.3g} to {high:.3g}, {'paired' if gap.paired else 'independent'}"
    )
    cheaper = challenger.evaluations * rule.fewer_evaluations <= champion.evaluations
    wins = side > 0 or (side == 0 and cheaper)
    if side == 0 and cheaper:
        words = f"is as good, with {challenger.evaluations:,} evaluations instead of {champion.evaluations:,}, as"
    else:
        words = {1: "is better than", 0: "is not significantly better than", -1: "is worse than"}[side]
    scores = f"{RANKING.title} {RANKING.text(mine.value)} {words} {RANKING.text(theirs.value)}"
    reason = f"{scores} (difference {gap.value:.3g}, {interval})"
    return Verdict(wins, reason, evidence)
