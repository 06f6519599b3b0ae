"""Checks the effect of schedules on an image against numbers computed by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm import SCHEDULES, NoiseSchedule
from ddpm.diffusion.forward import noised, shares, summary


def test_two_steps_by_hand() -> None:
    """alpha_bar = 0.5 and 0.01 have the SNRs 1 and 1/99. An SNR on the edge of a band belongs to the band above the edge."""
    row = summary(NoiseSchedule(torch.tensor([0.5, 0.98], dtype=torch.float64)), mean_square=1.0)
    assert row.alpha_bar == pytest.approx(0.01) and row.snr == pytest.approx(1 / 99)
    assert row.shares == (0, 0, 0.5, 0.5, 0)
    assert row.prior == pytest.approx(0.5 * 0.0145, rel=1e-3)  # -log2(0.99) / 2


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 2000))
def test_shares_sum_to_one(name: str, steps: int) -> None:
    assert sum(shares(NoiseSchedule.named(name, steps))) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "steps", "warns"),
    [
        *[(name, 1000, "") for name in ("linear", "scaled_linear", "cosine", "sigmoid")],
        ("sqrt", 1000, "80% of the steps"),
        ("linear", 4000, "gone early"),
        ("linear", 250, "x_T is not noise: alpha_bar_T = 0.08"),
        ("scaled_linear", 10, "alpha_bar_T = 0.93, L_T = 1.4 bits/dim"),
        ("cosine", 10, ""),
        ("rectified", 1000, ""),
    ],
)
def test_warnings(name: str, steps: int, warns: str) -> None:
    found = summary(NoiseSchedule.named(name, steps)).warnings
    assert len(found) == bool(warns) and warns in " ".join(found)


def test_the_first_step_without_signal_by_hand() -> None:
    """alpha_bar is 0.5 at t = 1, 0.005 at t = 2 and 5e-5 at t = 3, the first value below 1e-4."""
    betas = torch.tensor([0.5, 0.99, 0.99, 0.99, 0.99, 0.99], dtype=torch.float64)
    (warning,) = summary(NoiseSchedule(betas)).warnings
    assert "from t = 3 on, so 67% of the steps" in warning


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_is_left_with_zero_terminal_snr(name: str) -> None:
    row = summary(NoiseSchedule.named(name, 10, zero_terminal_snr=True))
    assert (row.alpha_bar, row.snr, row.prior) == (0, 0, 0) and not [w for w in row.warnings if "not noise" in w]


def test_an_image_along_the_way() -> None:
    """x_0 comes first, and the later images mix x_0 and noise in the right proportion."""
    schedule, x_0, eps = NoiseSchedule.named("cosine", 20), torch.ones(3, 2), torch.full((3, 2), -2.0)
    x = noised(schedule, x_0, torch.tensor([0, 10, 20]), eps)
    assert torch.equal(x[0], x_0)
    alpha_bar = float(schedule.alpha_bar[10])
    assert float(x[1, 2, 1]) == pytest.approx(alpha_bar**0.5 - 2 * (1 - alpha_bar) ** 0.5)
    assert torch.allclose(x[2], eps, atol=0.02)
