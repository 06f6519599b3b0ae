"""Simulates how often the report's choice and the gate promote a model that is no better, and a model that is better.

A score is the mean of one normally distributed value per image, so the true scores are known.
`PYTHONPATH=. python tests/tracking/test_gate.py` prints the table of docs/statistics.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from ddpm.parameters import Promotion
from ddpm.scores.conclusions import Candidate, choose
from ddpm.scores.intervals import Estimate, standard_error
from ddpm.scores.metrics import METRICS
from ddpm.tracking.registry.decision import Judged, Protocol, Score, decide

IMAGES, NOISE = 400, 0.3
RULE = Promotion()
PROTOCOL = Protocol("d" * 64, 64, IMAGES, 1000, "e" * 64)
ERROR = NOISE * np.sqrt(2 * 0.2 / IMAGES)  # the standard error of a paired difference of two scores
SHARED = 0.8  # the share of the images' variance that models with the same starting noise have in common


def scores(truths: list[float], generator: np.random.Generator, luck: np.ndarray | None = None) -> list[Estimate]:
    """Returns scores of models whose true scores are `truths`. luck: the shared part of images with the same noise [IMAGES]."""
    luck = generator.normal(size=IMAGES) if luck is None else luck
    own = generator.normal(size=(len(truths), IMAGES))
    values = np.array(truths)[:, None] + NOISE * (np.sqrt(SHARED) * luck + np.sqrt(1 - SHARED) * own)
    return [Estimate(float(x.mean()), standard_error(x), (x - x.mean()).astype(np.float32)) for x in values]


def promoted(points: int, paired: bool, gain: float, repetitions: int, alone: bool = False) -> int:
    """Returns how often the report's choice among `points` points wins. All points are better than the champion by `gain`.

    alone: ignores how many points the choice was made from.
    """
    generator, wins = np.random.default_rng(points), 0
    for _ in range(repetitions):
        luck = generator.normal(size=IMAGES)
        (before,) = scores([1.0], generator, luck if paired else None)
        found = scores([1.0 - gain] * points, generator, luck)
        chosen = choose([Candidate(str(i), 50, each) for i, each in enumerate(found)], margin=0.05).best
        challenger = Score(chosen.estimate, 50, PROTOCOL, 0)
        champion = Score(before, 50, PROTOCOL, 0 if paired else 1)
        wins += decide(challenger, champion, RULE, picked_from=[chosen.estimate] if alone else found).wins
    return wins


@pytest.mark.parametrize(("points", "paired"), [(1, True), (4, False), (12, True)])
def test_luck_is_promoted_no_more_often_than_promised(points: int, paired: bool) -> None:
    """The limit is 2.5 % of decisions, however many points the challenger was picked from.

    With another seed, the test would fail by chance in about 1 of 150 runs at this limit, since no win at all also fails.
    """
    wins = promoted(points, paired, 0.0, 200)
    assert 0 < wins <= binom.ppf(0.9995, 200, 0.025)


def test_a_pair_alone_promotes_luck_far_more_often() -> None:
    """If the number of points is ignored, 12 points promote luck in about 15 % of decisions."""
    assert promoted(12, True, 0.0, 150, alone=True) > binom.ppf(0.9995, 150, 0.05)


@pytest.mark.parametrize("points", [1, 12])
def test_what_is_better_by_four_standard_errors_is_promoted(points: int) -> None:
    assert promoted(points, True, 4 * ERROR, 60) > 50


def halved(margin: float, step: float, repetitions: int, halvings: int = 5) -> list[int]:
    """Returns how often a champion of 1,024 evaluations is replaced by 0, 1, 2 ... challengers in a row.

    Each challenger takes half the evaluations of the last champion, and its true score is worse by `step` standard errors.
    """
    generator, counts = np.random.default_rng(0), [0] * (halvings + 1)
    rule = replace(RULE, margin=margin)
    for _ in range(repetitions):
        luck = generator.normal(size=IMAGES)
        truths = [1 + step * ERROR * k for k in range(halvings + 1)]
        found = [Score(each, 1024 >> k, PROTOCOL, 0) for k, each in enumerate(scores(truths, generator, luck))]
        champion = best = found[0]
        wins = 0
        for challenger in found[1:]:
            if not decide(challenger, champion, rule, best=best).wins:
                break
            champion, wins = challenger, wins + 1
            best = min(best, challenger, key=lambda score: score.value)
        counts[wins] += 1
    return counts


def test_cheaper_challengers_cannot_lower_the_score_bit_by_bit() -> None:
    """The margin is 2.5 standard errors. The third halving exceeds the margin, so it wins in at most 2.5 % of the runs.

    With another seed, the test would fail by chance in at most 1 of 2,000 runs.
    """
    counts = halved(2.5 * ERROR, 1.0, 400)
    assert sum(counts[3:]) <= binom.ppf(0.9995, 400, 0.025)
    assert counts[1] > 40  # the first halving is worse by less than the margin, so it does win sometimes


def test_a_cheaper_model_that_is_as_good_wins() -> None:
    """With a margin of 5 standard errors, an equally good model passes almost always."""
    assert halved(5 * ERROR, 0.0, 200, halvings=1)[1] > 190


def test_the_best_champion_is_remembered() -> None:
    """The champion was within the margin of the best one.

    A challenger within the margin of the champion, but not of the best one, loses.
    """
    best, champion, challenger = (
        Score(Estimate(value, 0.001), evaluations, PROTOCOL)
        for value, evaluations in ((1.0, 100), (1.04, 50), (1.07, 25))
    )
    assert decide(challenger, champion, RULE).wins
    verdict = decide(challenger, champion, RULE, best=best)
    assert not verdict.wins and "the best champion's 1 (the margin is 0.05)" in verdict.reason
    assert verdict.evidence["behind_best"] == pytest.approx(0.07 + 1.959964 * 2**0.5 * 0.001, rel=1e-6)
    assert decide(replace(challenger, estimate=Estimate(1.045, 0.001)), champion, RULE, best=best).wins


@pytest.mark.parametrize(
    ("fd", "wins", "words"),
    [
        (104.0, True, "FD (DINOv2) 104 is at most 4.28 worse than 100 (the margin is 5)"),
        (104.9, False, "but FD (DINOv2) 104.9 is perhaps 5.18 worse than 100 (the margin is 5)"),
    ],
)
def test_other_judges_can_only_refuse(fd: float, wins: bool, words: str) -> None:
    """The half-width of the second judge's interval is 1.959964 sqrt(2) 0.1 = 0.277."""
    rule = replace(RULE, judges=("fd_dinov2",))
    before, after = ({"fd_dinov2": Judged(Estimate(value, 0.1), "w")} for value in (100.0, fd))
    champion = Score(Estimate(1.0, 0.01), 50, PROTOCOL, judges=before)
    better, worse = (Score(Estimate(value, 0.01), 50, PROTOCOL, judges=after) for value in (0.9, 1.1))
    verdict = decide(better, champion, rule)
    assert verdict.wins is wins and words in verdict.reason
    assert verdict.evidence["fd_dinov2"]["margin"] == 5
    assert not decide(worse, champion, rule).wins
    cheaper = replace(better, estimate=Estimate(1.0, 0.0001), evaluations=20)
    assert decide(cheaper, replace(champion, estimate=Estimate(1.0, 0.0001)), rule).wins is wins


@pytest.mark.parametrize(("mine", "wins"), [(96.0, True), (95.0, False), (110.0, True)])
def test_a_judge_whose_higher_scores_are_better_refuses_lower_ones(
    mine: float, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half-width of the judge's interval is 1.959964 sqrt(2) 0.1 = 0.277, so 95 may be 5.277 below 100."""
    monkeypatch.setitem(METRICS, "fd_dinov2", replace(METRICS["fd_dinov2"], direction=1))
    champion, better = (
        Score(Estimate(value, 0.01), 50, PROTOCOL, judges={"fd_dinov2": Judged(Estimate(judged, 0.1), "w")})
        for value, judged in ((1.0, 100.0), (0.9, mine))
    )
    assert decide(better, champion, replace(RULE, judges=("fd_dinov2",))).wins is wins


def test_influence_values_are_those_of_the_score_and_then_of_its_judges() -> None:
    rows = np.arange(12.0).reshape(3, 4)
    judges = {name: Judged(Estimate(1.0, 0.1), "w") for name in ("fd_dinov2", "cmmd")}
    score = Score(Estimate(2.0, 0.1), 50, PROTOCOL, judges=judges).with_influence(rows, seed=3)
    assert score.seed == 3 and np.array_equal(score.influence, rows)
    known = [score.estimate, score.judges["fd_dinov2"].estimate, score.judges["cmmd"].estimate]
    assert [estimate.influence.tolist() for estimate in known if estimate.influence is not None] == rows.tolist()
    with pytest.raises(ValueError, match="zip"):
        score.with_influence(rows[:2], seed=3)


def test_a_reason_names_both_scores_and_the_interval() -> None:
    better, worse = (Score(Estimate(value, error), 50, PROTOCOL) for value, error in ((9.0, 0.2), (10.0, 0.3)))
    expected = "FID 9 is better than 10 (difference -1, 95% interval -1.71 to -0.293, independent)"
    assert decide(better, worse, RULE).reason == expected


@pytest.mark.proof
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("points", [1, 4, 12])
def test_luck_is_promoted_no_more_often_than_promised_in_many_decisions(points: int, paired: bool) -> None:
    wins = promoted(points, paired, 0.0, 4000)
    assert binom.ppf(0.0005, 4000, 0.018) <= wins <= binom.ppf(0.9995, 4000, 0.025)


if __name__ == "__main__":
    print("| points | luck promoted | the same, not in pairs | points forgotten | 2 errors better | 4 errors better |")
    print("|---|---|---|---|---|---|")
    for points in (1, 4, 12):
        cells = [
            promoted(points, True, 0.0, 2000),
            promoted(points, False, 0.0, 2000),
            promoted(points, True, 0.0, 2000, alone=True),
            promoted(points, True, 2 * ERROR, 2000),
            promoted(points, True, 4 * ERROR, 2000),
        ]
        print(f"| {points} | " + " | ".join(f"{100 * wins / 2000:.1f} %" for wins in cells) + " |", flush=True)
    for margin in (0.0, 2.5, 5.0):
        print(f"margin {margin} errors, each halving worse by 1 error: {halved(margin * ERROR, 1.0, 2000)}")
