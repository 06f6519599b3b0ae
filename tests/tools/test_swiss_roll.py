"""Checks the library on points of the plane: by a two-sample statistic, samples are distributed like the Swiss roll."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpm import Denoiser
from ddpm.errors import InputError
from ddpm.tools.swiss_roll import POINTS, T, drift, reverse, roll, swiss_roll, train_on_roll

COUNT, MADE = 2000, 5000


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def denoiser(one_thread: None) -> Denoiser:
    return train_on_roll(steps=1000)


@pytest.fixture(scope="module")
def made(denoiser: Denoiser) -> dict[int, Tensor]:
    return reverse(denoiser, MADE)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Computes 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely & Rizzo), unbiased: 0 on average for samples of one distribution."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def exact_drift(denoiser: Denoiser, x_t: Tensor, t: int) -> Tensor:
    """Computes the exact drift of the training points: x0_hat is their mean, weighted by how likely x_t came from each point."""
    data = roll(POINTS, 0)[0].double()
    a2 = denoiser.schedule.alpha_bar[t]
    weights = (-(torch.cdist(x_t.double(), a2.sqrt() * data) ** 2) / (2 * (1 - a2))).softmax(1)
    return drift(Denoiser(lambda x, _: (weights @ data).to(x), denoiser.schedule, "x0"), x_t, t)


def test_what_comes_out_is_distributed_like_the_data(made: dict[int, Tensor]) -> None:
    """With other seeds, the test would fail by chance in about 1 of 100 runs.

    This follows from the noise of 16 runs of 2,000 points, scaled to 5,000 points.
    """
    assert sorted(made) == list(range(T + 1))
    held_out = roll(MADE, 1)[0]
    # A Gaussian with the data's mean and covariance is as near as possible without learning the shape.
    centred = held_out - held_out.mean(0)
    gaussian = made[T] @ torch.linalg.cholesky(centred.T @ centred / MADE).T + held_out.mean(0)
    baseline = energy_distance(gaussian, held_out)
    level = max(abs(energy_distance(roll(MADE, seed)[0], held_out)) for seed in (2, 3, 4))
    distance = energy_distance(made[0], held_out)
    assert level < baseline / 10  # so the statistic can detect the difference
    assert distance < baseline / 8


def test_the_drift_is_that_of_the_perfect_network(denoiser: Denoiser) -> None:
    """With other seeds, the test would fail by chance in fewer than 1 of 100 runs.

    In four trainings, the nearest bound was 6 deviations away.
    """
    data = roll(COUNT, 1)[0]
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    to_the_mean = Denoiser(lambda x, _: data.mean(0).expand_as(x), denoiser.schedule, "x0")
    for t in (30, 60, 110):
        a2 = float(denoiser.schedule.alpha_bar[t])
        x_t = a2**0.5 * data + (1 - a2) ** 0.5 * noise
        exact = exact_drift(denoiser, x_t, t)
        error, naive = (float((drift(d, x_t, t) - exact).norm() / exact.norm()) for d in (denoiser, to_the_mean))
        assert error < min(0.5, naive / 10), t


def test_another_name_than_png_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.png"):
        swiss_roll(tmp_path / "roll.jpg")
