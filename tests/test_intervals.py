"""Do the intervals cover what they claim? Gaussian features, whose FID is known, many times over.

`PYTHONPATH=. python tests/test_intervals.py` prints the table of docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import binom

from ddpm.fidelity import Statistics, jackknife
from ddpm.intervals import Estimate, difference, quantile, standard_error


@dataclass(frozen=True)
class Case:
    """Two models, N(shift_1, scale_1^2 D) and N(shift_2, scale_2^2 D), whose images share a part of their noise.

    D: variances falling from 1 to 0.1. The reference is N(0, D). shared: the correlation of the noise of the two.
    """

    images: int
    dimensions: int
    models: tuple[tuple[float, float], tuple[float, float]]  # shift, scale
    shared: float

    @property
    def variances(self) -> np.ndarray:
        return np.geomspace(1.0, 0.1, self.dimensions)

    def fid(self, model: int) -> float:
        """Of infinitely many images: commuting covariances, so |shift|^2 + (scale - 1)^2 tr D."""
        shift, scale = self.models[model]
        return self.dimensions * shift**2 + (scale - 1) ** 2 * float(self.variances.sum())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small matrices only lose by more, and badly so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NARROW = ((0.3, 1.2), (0.25, 1.15))
CASES = [
    Case(300, 1, NARROW, 0.9),
    Case(300, 4, NARROW, 0.9),
    Case(300, 4, NARROW, 0.0),
    Case(300, 4, ((0.3, 1.2), (0.3, 1.2)), 0.5),  # no difference at all
    Case(300, 16, NARROW, 0.9),
    Case(12, 32, NARROW, 0.9),  # fewer images than features
]


@dataclass(frozen=True)
class Coverage:
    """How often, of `repetitions`, an interval held the truth."""

    repetitions: int
    at_this_size: int  # FID's interval, and the mean of FID over all repetitions
    infinity: int  # the same interval about fid_infinity, and the FID of infinitely many images
    paired: int  # the difference of two models, and its mean over all repetitions
    independent: int  # the same, as if the images had nothing in common
    narrower: float  # the mean width of the paired interval, in widths of the other


def cover(case: Case, repetitions: int, confidence: float = 0.95, seed: int = 0) -> Coverage:
    generator = np.random.default_rng(seed)
    reference = Statistics(np.zeros(case.dimensions), np.diag(case.variances))
    reach, first, unbiased, pairs, apart = quantile(confidence), [], [], [], []
    for _ in range(repetitions):
        common, *own = generator.normal(size=(3, case.images, case.dimensions))
        estimates = []
        for (shift, scale), noise in zip(case.models, own, strict=True):
            mixed = np.sqrt(case.shared) * common + np.sqrt(1 - case.shared) * noise
            found = jackknife(mixed * scale * np.sqrt(case.variances) + shift, reference)
            estimates.append(Estimate(found.fid, standard_error(found.influence), found.influence))
            if len(estimates) == 1:
                first.append(estimates[0])
                unbiased.append(found.fid - found.bias)
        pairs.append(difference(*estimates))
        apart.append(difference(*(Estimate(one.value, one.error) for one in estimates)))

    def hits(found: list[Estimate], truth: float) -> int:
        return sum(abs(one.value - truth) <= reach * one.error for one in found)

    return Coverage(
        repetitions,
        hits(first, float(np.mean([one.value for one in first]))),
        sum(abs(value - case.fid(0)) <= reach * one.error for value, one in zip(unbiased, first, strict=True)),
        hits(pairs, float(np.mean([one.value for one in pairs]))),
        hits(apart, float(np.mean([one.value for one in apart]))),
        float(np.mean([one.error for one in pairs]) / np.mean([one.error for one in apart])),
    )


def plausible(hits: int, repetitions: int, confidence: float, slack: float = 0.015) -> bool:
    """Whether so many hits go with a coverage of `confidence`, give or take `slack`: FID of few images is skewed."""
    return bool(
        binom.ppf(0.001, repetitions, confidence - slack) <= hits <= binom.ppf(0.999, repetitions, confidence + slack)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.images}x{case.dimensions}-{case.shared}")
def test_intervals_cover_what_they_claim(case: Case) -> None:
    found = cover(case, 300)
    assert plausible(found.at_this_size, 300, 0.95)
    assert plausible(found.paired, 300, 0.95, slack=0.0)
    if case.images > case.dimensions:
        assert plausible(found.infinity, 300, 0.95)
    if case.shared == 0.9:
        assert found.narrower < 0.6
        assert found.independent >= 298  # needlessly wide
    if case.shared == 0:
        assert found.narrower == pytest.approx(1, abs=0.02)


def test_intervals_cover_at_another_confidence() -> None:
    case = CASES[1]
    found = cover(case, 300, confidence=0.6)
    assert plausible(found.at_this_size, 300, 0.6, slack=0.03)
    assert plausible(found.paired, 300, 0.6, slack=0.03)


def test_the_difference_in_pairs_is_that_of_the_influence_values() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    one, other = (Estimate(value, standard_error(luck), luck) for value, luck in ((3.0, a), (1.0, b)))
    gap = difference(one, other)
    assert gap.value == 2.0 and gap.paired
    assert gap.error == pytest.approx(np.std(a.astype(float) - b, ddof=1) / np.sqrt(50), rel=1e-6)
    assert difference(one, one).error == 0
    for stranger in (Estimate(1.0, other.error), Estimate(1.0, other.error, b[:40])):
        apart = difference(one, stranger)
        assert not apart.paired
        assert apart.error == pytest.approx(np.hypot(one.error, other.error))


def test_the_error_of_a_mean_is_the_textbooks() -> None:
    """The influence of an image on a mean is its distance from it."""
    x = np.random.default_rng(0).normal(size=30)
    without = (x.sum() - x) / 29
    influence = 29 * (without.mean() - without)
    np.testing.assert_allclose(influence, x - x.mean(), atol=1e-12)
    assert standard_error(influence) == pytest.approx(np.std(x, ddof=1) / np.sqrt(30))


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_an_interval_reaches_as_far_as_the_normal_says(confidence: float) -> None:
    low, high = Estimate(5.0, 2.0).interval(confidence)
    normal = NormalDist(5.0, 2.0)
    assert normal.cdf(high) - normal.cdf(low) == pytest.approx(confidence)
    assert (low + high) / 2 == pytest.approx(5.0)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_that_cannot_be(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        quantile(confidence)


def test_one_value_has_no_error() -> None:
    with pytest.raises(ValueError, match="two influence values"):
        standard_error(np.zeros(1))


def table(repetitions: int = 1000) -> str:
    """The coverage of 95 % intervals as Markdown."""
    lines = [
        "| images | features | noise in common | FID at N | FID at infinity | difference, paired | as if independent | width |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found = cover(case, repetitions)
        shares: list[int | None] = [found.at_this_size, found.infinity, found.paired, found.independent]
        if case.images <= case.dimensions:
            shares[1] = None
        cells = ["" if share is None else f"{share / repetitions:.1%}" for share in shares]
        cells = [str(case.images), str(case.dimensions), f"{case.shared:.0%}", *cells, f"{found.narrower:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
