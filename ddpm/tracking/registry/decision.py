"""Decides from scores whether a challenger replaces the champion. registry.py calls it and records the result.

A challenger wins if its score is significantly better than the champion's: the interval of the difference excludes 0. A
challenger that takes `promotion.fewer_evaluations` times fewer network evaluations than the champion also wins if it is nearly as
good as the best champion so far: its score is at most the share `promotion.margin` worse, even at the unfavourable end of the
interval. The comparison with the best champion prevents many cheaper challengers from lowering the score bit by bit.

A challenger nevertheless loses if, by one of `promotion.judges`, it may be worse than the champion by more than the margin.

The challenger was picked as the best of several points, so its score is partly chance. The intervals therefore hold for all these
points together (Dunnett 1955). The scores are paired if the images of both start from the same noise.
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
from ddpm.scores.intervals import Estimate, against_one, difference, quantile
from ddpm.scores.metrics import METRICS, RANKING

AGAIN = "evaluate the point again (dvc repro)"


@dataclass(frozen=True)
class Protocol:
    """The conditions that comparable scores share: the dataset version, and how the scores were computed."""

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
        """Describes the changes from `other` to this protocol, such as "layer 64 -> 2048"."""
        mine, theirs = asdict(self), asdict(other)
        hashes = {"dataset": "dataset version", "extractor_sha256": "feature extractor"}
        changed = [name for name in mine if mine[name] != theirs[name]]
        return ", ".join(
            hashes[name] if name in hashes else f"{name} {theirs[name]} -> {mine[name]}".replace("_", " ")
            for name in changed
        )


@dataclass(frozen=True)
class Judged:
    """A judge's score. extractor_sha256: the hash of the file (or other data) that decides the judge's features."""

    estimate: Estimate
    extractor_sha256: str


@dataclass(frozen=True)
class Score:
    """A point's headline score under a protocol.

    Args:
        estimate: the score.
        evaluations: network evaluations per image.
        protocol: how the score was computed.
        seed: the seed of the noise from which the images start, if known.
        judges: the scores of other judges by name, in the order of their influence values.
    """

    estimate: Estimate
    evaluations: int
    protocol: Protocol
    seed: int | None = None
    judges: Mapping[str, Judged] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Scores, influence: NDArray[np.floating] | None = None, seed: int | None = None) -> Score:
        """Builds the score of a point.

        Args:
            scores: the content of metrics/POINT.json.
            influence: [N], or [1 + J, N] with J judges.
            seed: see the class.

        Raises:
            InputError: there are not as many influence values as images and scores.
        """
        rows: list[NDArray[np.floating] | None] = [None] * (1 + len(scores.judges))
        if influence is not None:
            found = np.atleast_2d(influence)
            if found.shape[1] != scores.images:
                raise InputError(f"{found.shape[1]} influence values for {scores.images} images: {AGAIN}")
            if len(found) != len(rows):
                raise InputError(f"influence values of {len(found)} scores instead of {len(rows)}: {AGAIN}")
            rows = list(found)
        judges = {
            name: Judged(scores.estimate(row, name), str(about["extractor_sha256"]))
            for (name, about), row in zip(scores.judges.items(), rows[1:], strict=True)
        }
        return cls(scores.estimate(rows[0]), scores.evaluations, Protocol.of(scores), seed, judges)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Score:
        """Reads the entries of metrics/POINT.json that a comparison needs. Raises InputError."""
        try:
            return cls.of(Scores.from_json(found, needed=COMPARED))
        except ValueError as error:
            raise InputError(f"scores {error} cannot be compared: {AGAIN}") from None

    @property
    def value(self) -> float:
        return self.estimate.value

    @property
    def influence(self) -> NDArray[np.floating] | None:
        """The influence values [1 + J, N] of the score and its J judges, or None if some are unknown."""
        rows = [each.influence for each in (self.estimate, *(judged.estimate for judged in self.judges.values()))]
        known = [row for row in rows if row is not None]
        return np.stack(known) if len(known) == len(rows) else None

    def with_influence(self, influence: NDArray[np.floating], seed: int | None) -> Score:
        """Returns the score with influence values [1 + J, N] of images that start from the noise of `seed`."""
        judges = {
            name: replace(judged, estimate=replace(judged.estimate, influence=row))
            for (name, judged), row in zip(self.judges.items(), influence[1:], strict=True)
        }
        return replace(self, estimate=replace(self.estimate, influence=influence[0]), seed=seed, judges=judges)

    def lacks(self, judges: Sequence[str], other: Score) -> list[str]:
        """Returns the names in `judges` by which this score cannot be compared with `other`.

        Such a judge has not scored this point, or used another feature extractor. `other` has scores by all judges.
        """
        return [
            name
            for name in judges
            if name not in self.judges or self.judges[name].extractor_sha256 != other.judges[name].extractor_sha256
        ]


@dataclass(frozen=True)
class Decision:
    """The result of `promote` or `rollback`.

    Args:
        promoted: whether the challenger became champion.
        version: the version that is champion now; None without a champion.
        reason: the reason in one line.
        point: the point that was compared or restored.
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
    """Whether the challenger replaces the champion. reason: the end of a sentence.

    evidence: difference (challenger - champion), low, high, confidence, paired, points. If the evaluations could decide, also
    behind_best and margin. Under each judge's name, the same for the judge's score. Empty if nothing was compared.
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
        best: the score of the best champion so far; None if that is the present champion.

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
    evidence = {**gap.evidence, "confidence": rule.confidence, "points": len(looked_at)}
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
    if gap.side > 0:
        return _judged(Verdict(True, reason, evidence), challenger, champion, rule)
    if challenger.evaluations * rule.fewer_evaluations > champion.evaluations:
        return Verdict(False, reason, evidence)
    most, allowed = _gap(challenger, best, rule, looked_at).most_behind, rule.margin * abs(best.value)
    evidence |= {"behind_best": most, "margin": allowed}
    whose = f"the champion's {theirs}" if best is champion else f"the best champion's {RANKING.text(best.value)}"
    behind = f"{most:.3g} worse than {whose} (the margin is {allowed:.3g})"
    evaluations = f"{challenger.evaluations:,} evaluations instead of {champion.evaluations:,}"
    if most > allowed:
        return Verdict(False, f"{reason}, and may be {behind}, so {evaluations} do not decide", evidence)
    won = Verdict(True, f"{RANKING.title} {mine} is at most {behind}, with {evaluations}", evidence)
    return _judged(won, challenger, champion, rule)


def _judged(won: Verdict, challenger: Score, champion: Score, rule: Promotion) -> Verdict:
    """Returns a verdict with the scores of the judges added. The challenger still wins only if it passes every judge.

    It passes unless the interval of the difference reaches further on the worse side than the margin.
    """
    wins, said, evidence = True, [won.reason], dict(won.evidence)
    for name in rule.judges:
        mine, theirs, row = challenger.judges[name].estimate, champion.judges[name].estimate, METRICS[name]
        if challenger.seed != champion.seed:
            theirs = replace(theirs, influence=None)
        gap = _Gap.of(mine, theirs, quantile(rule.confidence), row.direction)
        allowed = rule.margin * abs(theirs.value)
        near = gap.most_behind <= allowed
        wins = wins and near
        evidence[name] = {**gap.evidence, "margin": allowed}
        said.append(
            f"{'' if near else 'but '}{row.title} {row.text(mine.value)} is {'at most' if near else 'perhaps'}"
            f" {gap.most_behind:.3g} worse than {row.text(theirs.value)} (the margin is {allowed:.3g})"
        )
    return Verdict(wins, ", ".join(said), evidence)


@dataclass(frozen=True)
class _Gap:
    """The challenger's score minus another score, with an interval. direction: -1 if lower is better, 1 if higher is better."""

    difference: float
    low: float
    high: float
    paired: bool
    direction: int

    @classmethod
    def of(cls, challenger: Estimate, other: Estimate, reach: float, direction: int) -> _Gap:
        """Compares two scores. reach: half the width of the interval, in standard errors."""
        gap = difference(challenger, other)
        half = reach * gap.error
        return cls(gap.value, gap.value - half, gap.value + half, gap.paired, direction)

    @property
    def evidence(self) -> dict[str, Any]:
        return {"difference": self.difference, "low": self.low, "high": self.high, "paired": self.paired}

    @property
    def side(self) -> int:
        """1 if the challenger is significantly better, -1 if it is significantly worse, else 0."""
        return self.direction if self.low > 0 else -self.direction if self.high < 0 else 0

    @property
    def most_behind(self) -> float:
        """The upper bound on how much worse the challenger is."""
        return self.high if self.direction < 0 else -self.low


def _gap(challenger: Score, other: Score, rule: Promotion, looked_at: Sequence[Estimate]) -> _Gap:
    """Compares the headline scores, with an interval that holds for all points looked at."""
    theirs = other.estimate if challenger.seed == other.seed else replace(other.estimate, influence=None)
    return _Gap.of(challenger.estimate, theirs, against_one(theirs, looked_at, rule.confidence), RANKING.direction)
