"""Decides from scores whether a challenger replaces the champion. The module `registry` calls `decide` and records the result.

A challenger wins in two cases:

- The challenger is better: the interval of the difference between the two scores excludes 0, in favour of the challenger.
- The challenger is much cheaper, and not inferior to the best champion so far. Much cheaper: the champion takes at least
  `promotion.fewer_evaluations` times as many network evaluations. Not inferior: even at the unfavourable end of the interval,
  the challenger is worse by at most the non-inferiority margin, the share `promotion.margin` of the best champion's score.

The second case takes the score of the best champion, not of the present one. Otherwise, a series of cheaper challengers could
worsen the score bit by bit.

Each judge, a further score named in `promotion.judges`, can refuse a challenger that would win. The judge refuses if the
challenger, at the unfavourable end of the interval, is worse than the present champion by more than the margin. Here the margin
is a share of that champion's score by the judge.

The challenger was picked from several points by the headline score, so this score looks good partly by chance. The
intervals of the headline score's differences therefore hold for all these points together (Dunnett 1955). If both models start
their images from the same noise, the comparison is paired, image by image.
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
    """The conditions under which a score was computed. Only scores with equal protocols can be compared.

    Args:
        dataset: the sha256 of the dataset.
        layer: the layer of the extractor.
        images: the number of samples.
        reference_images: the number of training images.
        extractor_sha256: the hash of the extractor's weights.
    """

    dataset: str
    layer: int
    images: int
    reference_images: int
    extractor_sha256: str

    @classmethod
    def of(cls, scores: Scores) -> Protocol:
        return cls(scores.reference, scores.layer, scores.images, scores.reference_images, scores.extractor_sha256)

    @property
    def id(self) -> str:
        """A short hash that names the protocol in tags: 12 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: Protocol) -> str:
        """Describes the differences from `other` to this protocol, such as "layer 64 -> 2048"."""
        mine, theirs = asdict(self), asdict(other)
        hashes = {"dataset": "dataset version", "extractor_sha256": "feature extractor"}
        changed = [name for name in mine if mine[name] != theirs[name]]
        return ", ".join(
            hashes[name] if name in hashes else f"{name} {theirs[name]} -> {mine[name]}".replace("_", " ")
            for name in changed
        )


@dataclass(frozen=True)
class Judged:
    """A point's score by a judge: a metric named in evaluation.judges, with another extractor or layer than the headline score.

    extractor_sha256: the hash of the weights of the judge's extractor.
    """

    estimate: Estimate
    extractor_sha256: str


@dataclass(frozen=True)
class Score:
    """A point's headline score under a protocol.

    Args:
        estimate: the score, with its standard error and influence values.
        evaluations: network evaluations per image.
        protocol: how the score was computed.
        seed: the seed of the noise from which the images start; None if unknown.
        judges: the score by each judge, under the judge's name. Row 1 + j of the influence values belongs to judge j.
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
            influence: the influence values of N images on the headline score, [N], or on it and J judges' scores, [1 + J, N].
            seed: the seed of the noise from which the images start.

        Raises:
            InputError: the shape of `influence` does not fit the scores.
        """
        rows: list[NDArray[np.floating] | None] = [None] * (1 + len(scores.judges))
        if influence is not None:
            found = np.atleast_2d(influence)
            if found.shape[1] != scores.images:
                raise InputError(f"{found.shape[1]} influence values for {scores.images} images; {AGAIN}")
            if len(found) != len(rows):
                raise InputError(
                    f"the metrics file has {len(rows)} scores, but the influence values cover {len(found)} scores; {AGAIN}"
                )
            rows = list(found)
        judges = {
            name: Judged(scores.estimate(row, name), str(about["extractor_sha256"]))
            for (name, about), row in zip(scores.judges.items(), rows[1:], strict=True)
        }
        return cls(scores.estimate(rows[0]), scores.evaluations, Protocol.of(scores), seed, judges)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Score:
        """Builds the score from the content of metrics/POINT.json. Raises InputError."""
        try:
            return cls.of(Scores.from_json(found, needed=COMPARED))
        except ValueError as error:
            raise InputError(f"the scores cannot be compared: {error}; {AGAIN}") from None

    @property
    def value(self) -> float:
        return self.estimate.value

    @property
    def influence(self) -> NDArray[np.floating] | None:
        """The influence values [1 + J, N] of the score and of J judges, or None if some are unknown."""
        rows = [each.influence for each in (self.estimate, *(judged.estimate for judged in self.judges.values()))]
        known = [row for row in rows if row is not None]
        return np.stack(known) if len(known) == len(rows) else None

    def with_influence(self, influence: NDArray[np.floating], seed: int | None) -> Score:
        """Returns a copy with these influence values, [1 + J, N]. seed: the seed of the noise from which the images start."""
        judges = {
            name: replace(judged, estimate=replace(judged.estimate, influence=row))
            for (name, judged), row in zip(self.judges.items(), influence[1:], strict=True)
        }
        return replace(self, estimate=replace(self.estimate, influence=influence[0]), seed=seed, judges=judges)

    def lacks(self, judges: Sequence[str], other: Score) -> list[str]:
        """Returns the judges that have not scored this point, or scored it with other extractor weights than `other`.

        All judges must have scored `other`.
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
        reason: the reason, in one line.
        point: the point that was compared with the champion, or restored by a rollback.
        previous: the version that was champion before; None without one.
        champion: the point of the version that is champion now.
    """

    promoted: bool
    version: str | None
    reason: str
    point: str
    previous: str | None = None
    champion: str | None = None

    @property
    def line(self) -> str:
        """The present champion and the reason, in one line."""
        return f"champion: version {self.version} ({self.champion}): {self.reason}" if self.version else self.reason


@dataclass(frozen=True)
class Verdict:
    """The result of `decide`.

    Args:
        wins: whether the challenger replaces the champion.
        reason: the reason, in one line.
        evidence: the numbers behind the decision; {} if nothing was compared. The keys:
            difference, low, high: challenger - champion, and the ends of the interval.
            confidence, paired: the interval's confidence, and whether the scores were compared in pairs of images.
            points: the number of points from which the challenger was picked.
            behind_best: for a much cheaper challenger, how much worse than the best champion it may be (upper bound).
            margin: the largest value of behind_best with which such a challenger wins.
            the name of each judge: the difference, low, high, paired and margin of the judge's scores.
    """

    wins: bool
    reason: str
    evidence: dict[str, Any] = field(default_factory=dict)


def decide(
    challenger: Score,
    champion: Score | None,
    rule: Promotion,
    force: bool = False,
    picked_from: Sequence[Estimate] = (),
    best: Score | None = None,
) -> Verdict:
    """Decides whether the challenger replaces the champion.

    Args:
        challenger: the challenger's score.
        champion: the champion's score; None if the score is unknown, which requires `force`.
        rule: the section `promotion` of params.yaml.
        force: whether the challenger wins whatever the scores say.
        picked_from: the scores of all points from which the challenger was picked. They have the same protocol and the same
            seed as the challenger's. By default, only the challenger's score.
        best: the score of the best champion so far; None if that is the present champion.

    Raises:
        ValueError: the scores belong to different protocols, and `force` is not set.
    """
    best = best or champion
    comparable = champion is not None and challenger.protocol == champion.protocol
    # protects: tests/tracking/test_promote.py::test_scores_under_different_protocols_are_never_compared
    if not (comparable and best is not None and best.protocol == challenger.protocol) and not force:
        raise ValueError("scores under different protocols cannot be compared")
    if champion is None or best is None or not comparable:
        return Verdict(True, "--replace was given")
    picked_from = picked_from or [challenger.estimate]
    gap = _gap(challenger, champion, rule, picked_from)
    evidence = {**gap.evidence, "confidence": rule.confidence, "points": len(picked_from)}
    if force:
        return Verdict(True, "--replace was given", evidence)
    points = f" of {len(picked_from)} points" if len(picked_from) > 1 else ""
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
    most, allowed = _gap(challenger, best, rule, picked_from).most_behind, rule.margin * abs(best.value)
    evidence |= {"behind_best": most, "margin": allowed}
    whose = f"the champion's {theirs}" if best is champion else f"the best champion's {RANKING.text(best.value)}"
    behind = f"{most:.3g} worse than {whose} (the margin is {allowed:.3g})"
    evaluations = f"{challenger.evaluations:,} evaluations instead of {champion.evaluations:,}"
    if most > allowed:
        return Verdict(False, f"{reason}, and may be {behind}, so {evaluations} do not decide", evidence)
    won = Verdict(True, f"{RANKING.title} {mine} is at most {behind}, with {evaluations}", evidence)
    return _judged(won, challenger, champion, rule)


def _judged(won: Verdict, challenger: Score, champion: Score, rule: Promotion) -> Verdict:
    """Returns the verdict after the judges, who may refuse a challenger that wins by the headline score.

    A judge refuses if the challenger is worse than the champion by more than the margin at the unfavourable end of the interval.
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
    """The challenger's score minus another score, with the interval from `low` to `high`.

    paired: whether the scores were compared in pairs of images. direction: -1 if lower is better, 1 if higher is better.
    """

    difference: float
    low: float
    high: float
    paired: bool
    direction: int

    @classmethod
    def of(cls, challenger: Estimate, other: Estimate, reach: float, direction: int) -> _Gap:
        """Computes the difference. reach: half the width of the interval, in standard errors."""
        gap = difference(challenger, other)
        half = reach * gap.error
        return cls(gap.value, gap.value - half, gap.value + half, gap.paired, direction)

    @property
    def evidence(self) -> dict[str, Any]:
        return {"difference": self.difference, "low": self.low, "high": self.high, "paired": self.paired}

    @property
    def side(self) -> int:
        """1 if the challenger is significantly better, -1 if significantly worse, else 0."""
        return self.direction if self.low > 0 else -self.direction if self.high < 0 else 0

    @property
    def most_behind(self) -> float:
        """The upper bound on how much worse the challenger is."""
        return self.high if self.direction < 0 else -self.low


def _gap(challenger: Score, other: Score, rule: Promotion, picked_from: Sequence[Estimate]) -> _Gap:
    """Compares the headline scores, with an interval that holds for all points of `picked_from` together."""
    theirs = other.estimate if challenger.seed == other.seed else replace(other.estimate, influence=None)
    return _Gap.of(challenger.estimate, theirs, against_one(theirs, picked_from, rule.confidence), RANKING.direction)
