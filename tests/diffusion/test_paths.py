"""Checks codes, interpolations and snapshots on data whose perfect denoiser is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ddpm import SAMPLERS, SPACINGS, Denoiser, NoiseSchedule, blend, encode, interpolate, sample, snapshots
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.paths import pixel_error, slerp
from ddpm.diffusion.timesteps import network_times

FLOWS = [name for name, row in SAMPLERS.items() if not row.draws_noise()]
VARIANCE = 0.25


def perfect(schedule: NoiseSchedule, clip: bool | float = False) -> Denoiser:
    """Returns a denoiser that computes E[x_0 | x_t] for x_0 ~ N(0, VARIANCE)."""

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = schedule.log_alpha_bar_at(t.double()).exp().view(-1, *[1] * (x.ndim - 1))
        return (alpha_bar.sqrt() * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar)).to(x.dtype) * x

    return Denoiser(net, schedule, "x0", clip)


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_code_of_gaussian_data_in_closed_form(name: str, spacing: str) -> None:
    """An Euler step of encoding multiplies xi by 1 + dsigma sigma / (v + sigma^2), where xi = x / a and sigma = s / a."""
    schedule = NoiseSchedule.named(name, 1000)
    for steps in (1, 2, 7, 50):
        alpha_bar = schedule.log_alpha_bar_at(network_times(schedule, steps, spacing)).exp().flip(0).tolist()
        sigmas = [math.sqrt(1 / level - 1) for level in alpha_bar]
        # The first step computes eps of the clean image at the network's first time.
        first = float(schedule.alpha_bar[1])
        gain = 1 + sigmas[0] * math.sqrt(1 - first) / (first * VARIANCE + 1 - first)
        for now, to in pairwise(sigmas):
            gain *= 1 + (to - now) * now / (VARIANCE + now**2)
        gain *= math.sqrt(alpha_bar[-1])
        x_0 = torch.tensor([[0.7], [-0.2]], dtype=torch.float64)
        found = encode(perfect(schedule), x_0, steps=steps, spacing=spacing) / x_0
        assert found.flatten().tolist() == pytest.approx([gain, gain], rel=1e-5), (
            steps
        )  # the network receives times as float32


def test_codes_of_gaussian_data_are_standard_normal_in_the_limit() -> None:
    schedule = NoiseSchedule.named("linear", 1000)
    gains = [float(encode(perfect(schedule), torch.ones(1, 1).double(), steps=steps)) for steps in (50, 100, 1000)]
    errors = [abs(gain * math.sqrt(VARIANCE) - 1) for gain in gains]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 3)])
def test_encode_then_decode_comes_back(sampler: str, order: int) -> None:
    """DDIM's error is of first order. Heun's leading error is odd in the step, so decoding cancels the error of encoding."""
    denoiser = perfect(NoiseSchedule.named("linear", 1000))
    x_0 = torch.tensor([[0.9], [-0.4]], dtype=torch.float64)
    counts, errors = [25, 50, 100, 200], []
    for steps in counts:
        settings = {"sampler": sampler, "steps": steps, "spacing": "logsnr"}
        again = sample(denoiser, encode(denoiser, x_0, **settings), **settings)
        errors.append(float((again - x_0).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1), errors


@pytest.mark.parametrize("sampler", FLOWS)
def test_every_flow_encodes(sampler: str) -> None:
    """With many steps, every deterministic sampler encodes x as x / sqrt(v), the same quantile of N(0, 1)."""
    denoiser = perfect(NoiseSchedule.named("cosine", 1000))
    x_0 = torch.tensor([[0.9], [-0.4]], dtype=torch.float64)
    settings = {"sampler": sampler, "steps": 400, "spacing": "logsnr"}
    code = encode(denoiser, x_0, **settings)
    assert torch.allclose(code, x_0 / math.sqrt(VARIANCE), rtol=0.02)
    assert torch.allclose(sample(denoiser, code, **settings), x_0, rtol=0.03)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "logsnr", "karras"])
@pytest.mark.parametrize("sampler", FLOWS)
def test_encoding_up_to_pure_noise(sampler: str, spacing: str) -> None:
    """If the chain ends without signal, the code of x is still x / sqrt(v), and decodes to x."""
    denoiser = perfect(NoiseSchedule.named("linear", 1000).zero_terminal_snr())
    x_0 = torch.tensor([[0.9], [-0.4]], dtype=torch.float64)
    settings = {"sampler": sampler, "steps": 400, "spacing": spacing}
    code = encode(denoiser, x_0, **settings)
    assert torch.allclose(code, x_0 / math.sqrt(VARIANCE), rtol=0.02)
    assert torch.allclose(sample(denoiser, code, **settings), x_0, rtol=0.04)


@pytest.mark.parametrize("steps", [2, 3, 10])
def test_the_last_step_to_pure_noise_in_closed_form(steps: int) -> None:
    """The step to alpha_bar = 0 multiplies by the share of eps in x at the level before, whose variance is a^2 v + s^2."""
    schedule = NoiseSchedule.named("linear", 1000).zero_terminal_snr()
    *levels, top = schedule.log_alpha_bar_at(network_times(schedule, steps, "trailing")).exp().flip(0).tolist()
    first = float(schedule.alpha_bar[1])
    sigmas = [math.sqrt(1 / level - 1) for level in levels]
    gain = 1 + sigmas[0] * math.sqrt(1 - first) / (first * VARIANCE + 1 - first)
    for now, to in pairwise(sigmas):
        gain *= 1 + (to - now) * now / (VARIANCE + now**2)
    a_squared = levels[-1]
    gain *= math.sqrt(a_squared * (1 - a_squared)) / (a_squared * VARIANCE + 1 - a_squared)
    x_0 = torch.tensor([[0.7], [-0.2]], dtype=torch.float64)
    found = encode(perfect(schedule), x_0, steps=steps, spacing="trailing") / x_0
    assert top == 0 and found.flatten().tolist() == pytest.approx([gain, gain], rel=1e-5)


def test_samplers_with_noise_of_their_own_cannot_encode() -> None:
    denoiser = perfect(NoiseSchedule.named("linear", 1000))
    for options in ({"sampler": "ddpm"}, {"sampler": "dpmpp_2m_sde"}, {"sampler": "ddim", "eta": 0.5}):
        with pytest.raises(ValueError, match="draws noise of its own"):
            encode(denoiser, torch.zeros(1, 1), **options)
    assert {*FLOWS, "ddpm", "dpmpp_2m_sde"} == set(SAMPLERS)
    with pytest.raises(ValueError, match=r"'ddim' with eta = 0\.5 draws .* take one of ddim, euler, heun"):
        encode(denoiser, torch.zeros(1, 1), sampler="ddim", eta=0.5)
    with pytest.raises(ValueError, match="no sampler"):
        encode(denoiser, torch.zeros(1, 1), sampler="none")


def test_slerp_keeps_the_length_and_turns_evenly() -> None:
    x, y = gaussian(0, range(5), 0, (3, 8, 8)).double(), gaussian(0, range(5), 1, (3, 8, 8)).double()
    length, other = x.flatten(1).norm(dim=1), y.flatten(1).norm(dim=1)
    cosine = (x * y).flatten(1).sum(1) / (length * other)
    angle = cosine.acos()
    for weight in (0.0, 0.2, 0.5, 1.0):
        between = slerp(x, y, weight)
        of_x, of_y = ((1 - weight) * angle).sin() / angle.sin(), (weight * angle).sin() / angle.sin()
        square = (of_x * length) ** 2 + (of_y * other) ** 2 + 2 * of_x * of_y * length * other * cosine
        assert torch.allclose(between.flatten(1).norm(dim=1), square.sqrt(), rtol=1e-12)
        # Between vectors of equal length, the result has that length, and its angle is the given share of the whole angle.
        even = slerp(x, y * (length / other).view(-1, 1, 1, 1), weight)
        assert torch.allclose(even.flatten(1).norm(dim=1), length, rtol=1e-12)
        turned = ((x * even).flatten(1).sum(1) / length**2).clamp(-1, 1).acos()
        assert torch.allclose(turned, weight * angle, atol=1e-7)
    assert torch.equal(slerp(x, y, 0.0), x) and torch.allclose(slerp(x, y, 1.0), y, rtol=1e-15)
    assert torch.equal(slerp(x, x, 0.25), x)


def test_interpolation_ends_at_the_decoded_originals() -> None:
    denoiser = perfect(NoiseSchedule.named("cosine", 1000))
    x_0, y_0 = gaussian(3, range(2), 0, (1, 4, 4)).double() * VARIANCE**0.5
    settings = {"steps": 20, "spacing": "trailing"}
    first, middle, last = interpolate(denoiser, x_0, y_0, [0, 0.5, 1], **settings)
    pair = torch.stack([x_0, y_0])
    again = sample(denoiser, encode(denoiser, pair, **settings), **settings)
    assert torch.allclose(torch.stack([first, last]), again, atol=1e-12)
    # Every step of a Gaussian's flow is a multiplication, so the middle image is the slerp of the two decoded images.
    assert torch.allclose(middle, slerp(*again.split(1), 0.5)[0], atol=1e-9)


def test_a_blend_in_closed_form() -> None:
    """For Gaussian data the result is the mixed image, noised to the starting level, times the gains of the remaining steps."""
    schedule, v = NoiseSchedule.named("linear", 1000), VARIANCE
    x_0, y_0 = gaussian(3, range(2), 0, (1, 2, 2)).double()
    noise = gaussian(4, range(1), 0, (1, 2, 2)).double()[0]
    times = network_times(schedule, 8, "leading")
    for depth, first in ((1.0, 0), (0.5, 4), (0.125, 7)):
        levels = [*schedule.log_alpha_bar_at(times).exp().tolist(), 1.0][first:]
        gain = 1.0
        for now, to in pairwise(levels):  # DDIM on x0_hat = g x
            g = math.sqrt(now) * v / (now * v + 1 - now)
            gain *= math.sqrt(to) * g + math.sqrt((1 - to) / (1 - now)) * (1 - math.sqrt(now) * g)
        found = blend(perfect(schedule), x_0, y_0, [0.3], depth, lambda k: noise, "ddim", 8)
        x_t = math.sqrt(levels[0]) * (0.7 * x_0 + 0.3 * y_0) + math.sqrt(1 - levels[0]) * noise
        assert torch.allclose(found[0], gain * x_t, rtol=1e-6, atol=1e-9)
    unchanged = blend(perfect(schedule), x_0, y_0, [0, 0.5, 1], 0.0, lambda k: noise)
    assert torch.allclose(unchanged, torch.stack([x_0, (x_0 + y_0) / 2, y_0]))
    draws: list[int] = []
    blend(perfect(schedule), x_0, y_0, [0.3], 1.0, lambda k: (draws.append(k), noise)[1], "ddpm", 4)
    assert draws == [0, 1, 2, 3]  # one draw for the start, and one for each step except the last
    with pytest.raises(ValueError, match="depth"):
        blend(perfect(schedule), x_0, y_0, [0.5], 1.5, lambda k: noise)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_last_snapshot_is_the_sample(sampler: str) -> None:
    denoiser = perfect(NoiseSchedule.named("cosine", 1000), clip=True)
    x_T = gaussian(0, range(4), 0, (1, 2, 2)).double()

    def noise(k: int) -> torch.Tensor:
        return gaussian(0, range(4), k + 1, (1, 2, 2)).double()

    image = sample(denoiser, x_T, sampler, 12, noise=noise)
    states = snapshots(denoiser, x_T, 5, sampler=sampler, steps=12, noise=noise)
    assert [state.k for state in states] == [0, 3, 6, 8, 11]
    assert torch.equal(states[-1].x, image) and torch.allclose(states[-1].x0_hat, image, atol=1e-12)
    assert torch.equal(states[0].x0_hat, denoiser(x_T, network_times(denoiser.schedule, 12)[0]))
    assert [state.k for state in snapshots(denoiser, x_T, 5, sampler=sampler, steps=3)] == [0, 1, 2]
    assert [state.k for state in snapshots(denoiser, x_T, 1, sampler=sampler, steps=3)] == [2]
    assert [state.k for state in snapshots(denoiser, x_T, 2, sampler=sampler)] == [0, 49]


def test_pixel_error_is_on_the_unit_scale() -> None:
    black, white = torch.full((2, 1, 2, 2), -1.0), torch.full((2, 1, 2, 2), 1.0)
    assert pixel_error(black, white).tolist() == [1.0, 1.0]
    assert pixel_error(white, white + 3).tolist() == [0.0, 0.0]  # both are shown as white
    assert pixel_error(black, black + 2 / 255).tolist() == pytest.approx([1 / 255**2] * 2, rel=1e-4)
