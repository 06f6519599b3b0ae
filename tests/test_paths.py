"""Codes, interpolations and snapshots, for data whose perfect denoiser is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ddpm import SPACINGS, Denoiser, NoiseSchedule, blend, encode, interpolate, sample, snapshots
from ddpm.noise import gaussian
from ddpm.paths import FLOWS, pixel_error, slerp
from ddpm.samplers import noise_levels
from ddpm.timesteps import network_times

VARIANCE = 0.25


def perfect(schedule: NoiseSchedule, clip: bool | float = False) -> Denoiser:
    """E[x_0 | x_t] for x_0 ~ N(0, VARIANCE)."""

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = schedule.log_alpha_bar_at(t.double()).exp().view(-1, *[1] * (x.ndim - 1))
        return (alpha_bar.sqrt() * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar)).to(x.dtype) * x

    return Denoiser(net, schedule, "x0", clip)


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_code_of_gaussian_data_in_closed_form(name: str, spacing: str) -> None:
    """In xi = x / a and sigma = s / a an encoding step of Euler's method multiplies xi by 1 + dsigma sigma / (v + sigma^2)."""
    schedule = NoiseSchedule.named(name, 1000)
    for steps in (1, 2, 7, 50):
        alpha_bar = schedule.log_alpha_bar_at(network_times(schedule, steps, spacing)).exp().flip(0).tolist()
        sigmas = [math.sqrt(1 / level - 1) for level in alpha_bar]
        # eps of the clean image at the network's first time, where its noise is a sqrt(1 - a^2) apart from none.
        first = float(schedule.alpha_bar[1])
        gain = 1 + sigmas[0] * math.sqrt(1 - first) / (first * VARIANCE + 1 - first)
        for now, to in pairwise(sigmas):
            gain *= 1 + (to - now) * now / (VARIANCE + now**2)
        gain *= math.sqrt(alpha_bar[-1])
        x_0 = torch.tensor([[0.7], [-0.2]], dtype=torch.float64)
        found = encode(perfect(schedule), x_0, steps=steps, spacing=spacing) / x_0
        assert found.flatten().tolist() == pytest.approx([gain, gain], rel=1e-5), (
            steps
        )  # times reach the network as float32


def test_codes_of_gaussian_data_are_standard_normal_in_the_limit() -> None:
    schedule = NoiseSchedule.named("linear", 1000)
    gains = [float(encode(perfect(schedule), torch.ones(1, 1).double(), steps=steps)) for steps in (50, 100, 1000)]
    errors = [abs(gain * math.sqrt(VARIANCE) - 1) for gain in gains]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_encode_then_decode_comes_back_at_the_samplers_order(sampler: str, order: int) -> None:
    """Between two given levels, so that only the steps between them change with their number."""
    schedule = NoiseSchedule.named("cosine", 1000)
    x_0 = torch.tensor([[0.9], [-0.4]], dtype=torch.float64)
    counts, errors = [25, 50, 100, 200], []
    for steps in counts:
        settings = {"sampler": sampler, "steps": steps, "spacing": "logsnr"}
        code = encode(perfect(schedule), x_0, **settings)
        errors.append(float((sample(perfect(schedule), code, **settings) - x_0).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    print(sampler, slope, errors)
    assert slope == pytest.approx(order, abs=0.3), errors
