"""Checks how timesteps are drawn: the probabilities by hand, and that weights keep the expected loss."""

import math

import pytest
import torch

from ddpm import NoiseSchedule
from ddpm.training.times import DEVIATION, KEPT, MEAN, UNIFORM, LogNormal, LossAware, Times


def frequencies(times: Times, count: int) -> torch.Tensor:
    drawn = times.draw(count, torch.Generator().manual_seed(0))
    return torch.bincount(drawn, minlength=times.T) / count


def observed(times: LossAware, losses: torch.Tensor, rounds: int) -> None:
    for _ in range(rounds):
        times.observe(torch.arange(times.T), losses)


def test_times_of_high_loss_are_drawn_more_often_and_weigh_less() -> None:
    """After ten losses per time, the probability is proportional to the root mean square loss.

    Fewer than 1 of 10,000 seeds would fail by chance.
    """
    times, losses = LossAware(NoiseSchedule.named("cosine", 4)), torch.tensor([1.0, 2.0, 3.0, 10.0])
    observed(times, losses, KEPT - 1)
    assert torch.equal(times.probabilities(), torch.full((4,), 0.25)) and torch.equal(
        times.weights(torch.arange(4)), torch.ones(4)
    )
    observed(times, losses, 1)
    expected = (1 - UNIFORM) * losses / 16 + UNIFORM / 4
    torch.testing.assert_close(times.probabilities(), expected)
    count = 20_000
    deviation = (expected * (1 - expected) / count).sqrt()
    assert bool(((frequencies(times, count) - expected).abs() < 4.5 * deviation).all())
    # The expected weighted loss is the mean loss over uniform times.
    assert float((expected * times.weights(torch.arange(4)) * losses).sum()) == pytest.approx(4.0)


def test_the_newest_ten_losses_of_a_time_count() -> None:
    """Holds if a batch has more than ten losses of a time, and with losses of other times in between."""
    times = LossAware(NoiseSchedule.named("cosine", 2))
    t = torch.tensor([0] * 13 + [1] * 10)
    times.observe(t, torch.arange(23.0))
    assert sorted(times.losses[0].tolist()) == [*range(3, 13)] and sorted(times.losses[1].tolist()) == [*range(13, 23)]
    times.observe(torch.tensor([1, 0, 1]), torch.tensor([100.0, 101.0, 102.0]))
    assert sorted(times.losses[0].tolist()) == [*range(4, 13), 101]
    assert sorted(times.losses[1].tolist()) == [*range(15, 23), 100, 102]
    root = times.losses.square().mean(1).sqrt()
    torch.testing.assert_close(times.probabilities(), (1 - UNIFORM) * root / root.sum() + UNIFORM / 2)


@pytest.mark.parametrize("loss", [0.0, 1e20, math.inf, math.nan])
def test_losses_that_say_nothing_leave_times_uniform(loss: float) -> None:
    times = LossAware(NoiseSchedule.named("cosine", 3))
    observed(times, torch.full((3,), loss), KEPT)
    assert torch.equal(times.probabilities(), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("name", ["cosine", "linear", "rectified"])
def test_the_log_snr_is_normal(name: str) -> None:
    """Compares the cumulated table of times with the normal distribution of log SNR, cut to the range of the schedule.

    Every time may be drawn.
    """
    schedule = NoiseSchedule.named(name, 1000)
    times = LogNormal(schedule)
    assert times.weights(torch.arange(5)) is None
    unbiased = LogNormal(schedule, unbiased=True)
    losses = torch.linspace(0, 1, 1000)
    assert float((unbiased.table * unbiased.weights(torch.arange(1000)) * losses).sum()) == pytest.approx(0.5)
    assert float(times.table.sum()) == pytest.approx(1) and float(times.table.min()) >= UNIFORM / 1000 * (1 - 1e-6)
    log_snr = schedule.snr[1:].log()
    finite = log_snr[log_snr.isfinite()]

    def normal(value: float) -> float:
        return (1 + math.erf((value - MEAN) / DEVIATION / 2**0.5)) / 2

    low, high = normal(float(finite[-1])), normal(float(finite[0]))
    for t in (100, 400, 700, 900):
        below = float(times.table[t:].sum())  # the probability of a smaller log SNR
        expected = (normal(float(log_snr[t])) - low) / (high - low)
        assert below == pytest.approx(expected, abs=5e-3)
    assert (
        float((frequencies(times, 50_000) - times.table).abs().max()) < 4.5 * (float(times.table.max()) / 50_000) ** 0.5
    )


def test_a_schedule_without_a_range_of_log_snr_is_refused() -> None:
    with pytest.raises(ValueError, match="log_normal needs two or more times of finite log SNR"):
        LogNormal(NoiseSchedule.named("cosine", 2, zero_terminal_snr=True))
    nearly_clean = NoiseSchedule.named("linear", 50, start=1e-12, end=1e-12)
    with pytest.raises(
        ValueError, match=r"log_normal draws log SNR near 2\.4, but this schedule has 23\.7 \.\.\. 27\.6"
    ):
        LogNormal(nearly_clean)
