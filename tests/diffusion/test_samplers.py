"""Checks samplers with a perfect network, for which mean and variance are known exactly at every number of steps.

For x_0 ~ N(m, v) the perfect denoiser is linear in x_t, so each step of a sampler maps a Gaussian to a Gaussian. The factors
are computed here from the papers' equations, independently of the code under test.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import SAMPLERS, SCHEDULES, SPACINGS, TARGETS, Denoiser, NoiseSchedule, encode, sample, trajectory
from ddpm.diffusion.denoiser import coefficients, split_variance
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.samplers import Level, ddim, ddpm, evaluations
from ddpm.diffusion.timesteps import network_times
from ddpm.training.objective import Objective

MEAN, VARIANCE = 0.4, 0.25


def perfect(schedule: NoiseSchedule, target: str = "eps", clip: bool = False) -> Denoiser:
    """Returns a denoiser that computes E[x_0 | x_t] for x_0 ~ N(MEAN, VARIANCE), with a network for `target`."""

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times = t.double().view(-1, *[1] * (x.ndim - 1))
        a, s, c_skip, c_out = coefficients(schedule, target, times)
        gain = a * VARIANCE / (a**2 * VARIANCE + s**2)
        x0_hat = MEAN + gain * (x.double() - a * MEAN)
        return ((x0_hat - c_skip * x.double()) / c_out).to(x.dtype)

    return Denoiser(net, schedule, target, clip)


def propagate(
    schedule: NoiseSchedule, times: list[float], kind: str, variance: str = "", eta: float = 0.0
) -> tuple[float, float]:
    """Returns mean and variance after all steps, from the textbook form of each update."""
    alpha_bar = [*schedule.log_alpha_bar_at(torch.tensor(times)).exp().tolist(), 1.0]
    mean, var = 0.0, 1.0
    for now, to in itertools.pairwise(alpha_bar):
        # x0_hat = g x + h
        g = math.sqrt(now) * VARIANCE / (now * VARIANCE + 1 - now)
        h = MEAN - g * math.sqrt(now) * MEAN
        if kind == "ddpm":  # eq. 7 of Ho et al. with beta of the respaced chain
            alpha = now / to
            on_x0 = math.sqrt(to) * (1 - alpha) / (1 - now)
            on_x = math.sqrt(alpha) * (1 - to) / (1 - now)
            added = (1 - alpha) * (1 if variance == "fixed_large" else (1 - to) / (1 - now)) if to < 1 else 0.0
        else:  # eq. 12 of Song et al.: sqrt(to) x0 + sqrt(1 - to - sigma^2) eps + sigma z
            added = eta**2 * (1 - to) / (1 - now) * (1 - now / to)
            on_eps = math.sqrt(max(1 - to - added, 0)) / math.sqrt(1 - now)
            on_x0, on_x = math.sqrt(to) - on_eps * math.sqrt(now), on_eps
        mean = (on_x0 * g + on_x) * mean + on_x0 * h
        var = (on_x0 * g + on_x) ** 2 * var + added
    return mean, var


ROWS = [
    ("ddpm", {"variance": "fixed_large"}),
    ("ddpm", {"variance": "fixed_small"}),
    ("ddim", {"eta": 0.0}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
]


def exact_moments(denoiser: Denoiser, spacing: str, steps: int, sampler: str, options: dict) -> tuple[float, float]:
    """Returns the sampler's own mean and variance without Monte Carlo: the sampler's response to each noise is linear."""
    draws = steps + 1
    # Row 0 has no noise (the mean), row 1 a unit x_T, and row 2 + k a unit k-th draw.
    x_T = torch.zeros(draws + 1, 1, dtype=torch.float64)
    x_T[1] = 1

    def noise(k: int) -> torch.Tensor:
        z = torch.zeros_like(x_T)
        z[2 + k] = 1
        return z

    out = sample(denoiser, x_T, sampler=sampler, steps=steps, spacing=spacing, noise=noise, **options)[:, 0]
    return float(out[0]), float((out[1:] - out[0]).square().sum())


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(("sampler", "options"), ROWS)
def test_moments_for_gaussian_data(sampler: str, options: dict, name: str, spacing: str) -> None:
    schedule = NoiseSchedule.named(name, 1000)
    for steps in (1, 2, 7, 50):
        times = network_times(schedule, steps, spacing).tolist()
        expected = propagate(schedule, times, sampler, **options)
        # Target eps would divide by a, which is nearly 0 at high noise. All computation is in float64.
        assert exact_moments(perfect(schedule, "x0"), spacing, steps, sampler, options) == pytest.approx(
            expected, rel=1e-6
        ), steps


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_target_gives_the_same_images(target: str) -> None:
    schedule = NoiseSchedule.named("linear", 1000)
    x_T = gaussian(0, range(64), 0, (3,)).double()
    straight = sample(perfect(schedule, "x0"), x_T, steps=20, spacing="trailing")
    assert torch.allclose(sample(perfect(schedule, target), x_T, steps=20, spacing="trailing"), straight, atol=1e-4)


def test_the_bias_of_ddim_at_full_length() -> None:
    """The last step to alpha_bar = 1, and a start that is not quite pure noise, lose 0.6% of the variance."""
    schedule = NoiseSchedule.named("linear", 1000)
    _, var = exact_moments(perfect(schedule, "x0"), "leading", 1000, "ddim", {"eta": 0.0})
    _, truth = propagate(schedule, network_times(schedule, 1000, "leading").tolist(), "ddim")
    assert var == pytest.approx(truth, rel=1e-9)
    assert var / VARIANCE == pytest.approx(0.994, abs=1e-3)


def test_full_ancestral_chain_reaches_the_data() -> None:
    """The data's variance lies between the results of the lower and the upper variance bound of Ho et al."""
    schedule = NoiseSchedule.named("linear", 1000)
    small = exact_moments(perfect(schedule, "x0"), "leading", 1000, "ddpm", {"variance": "fixed_small"})
    large = exact_moments(perfect(schedule, "x0"), "leading", 1000, "ddpm", {"variance": "fixed_large"})
    assert small[0] == pytest.approx(MEAN, rel=1e-3) and large[0] == pytest.approx(MEAN, rel=1e-3)
    assert small[1] < VARIANCE < large[1]
    assert small[1] == pytest.approx(VARIANCE, rel=0.02) and large[1] == pytest.approx(VARIANCE, rel=0.02)


@settings(max_examples=30)
@given(st.sets(st.integers(0, 999), min_size=1, max_size=30), st.sampled_from(sorted(SCHEDULES)), st.integers(0, 1000))
def test_ddim_with_eta_one_is_ddpm_with_fixed_small(times: set[int], name: str, seed: int) -> None:
    """Holds on any sub-sequence of the chain, starting from any of its levels."""
    schedule = NoiseSchedule.named(name, 1000)
    denoiser = perfect(schedule, "x0")
    levels = [Level(t, float(schedule.alpha_bar[t + 1])) for t in sorted(times, reverse=True)] + [Level(-1.0, 1.0)]
    x_T = gaussian(seed, range(4), 0, (5,)).double()

    def noise(k: int) -> torch.Tensor:
        return gaussian(seed, range(4), k + 1, (5,)).double()

    ours = ddim(denoiser, x_T, levels, noise, eta=1.0)
    theirs = ddpm(denoiser, x_T, levels, noise, variance="fixed_small")
    for (x, _), (y, _) in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_diffusers_agrees() -> None:
    """Compares with diffusers' DDPM and DDIM schedulers where they are right: leading spacing, S divides T, eps, no clipping."""
    diffusers = pytest.importorskip("diffusers")
    schedule = NoiseSchedule.named("linear", 1000)
    denoiser = perfect(schedule, "eps")
    x_T = gaussian(1, range(8), 0, (3,))
    common = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "clip_sample": False}

    def run(scheduler, **options) -> torch.Tensor:
        scheduler.set_timesteps(50)
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser.net(x, t.expand(len(x))), t, x, **options).prev_sample
        return x

    theirs = run(diffusers.DDIMScheduler(**common, set_alpha_to_one=True), eta=0.0)
    assert torch.allclose(sample(denoiser, x_T, "ddim", 50), theirs, atol=2e-3)
    drawn: list[torch.Tensor] = []
    original = torch.randn
    for variance in ("fixed_small", "fixed_large"):
        drawn.clear()
        scheduler = diffusers.DDPMScheduler(**common, variance_type=variance)
        scheduler.set_timesteps(50)
        generator = torch.Generator().manual_seed(5)
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser.net(x, t.expand(len(x))), t, x, generator=generator).prev_sample
        again = torch.Generator().manual_seed(5)
        ours = sample(
            denoiser, x_T, "ddpm", 50, noise=lambda k, g=again: original(x_T.shape, generator=g), variance=variance
        )
        assert torch.allclose(ours, x, atol=2e-3), variance


def test_clipping_acts_on_x0_and_eps_is_derived_again() -> None:
    schedule = NoiseSchedule.named("linear", 1000)
    denoiser = Denoiser(lambda x, t: torch.zeros_like(x), schedule, "eps", clip=True)  # x0_hat = x / a, clipped
    x_T = torch.tensor([[3.0]], dtype=torch.float64)
    (first, *_) = trajectory(denoiser, x_T, "ddim", 10, "trailing")
    now, to = (float(schedule.alpha_bar[t + 1]) for t in (999, 899))
    eps = (3.0 - math.sqrt(now) * 1.0) / math.sqrt(1 - now)
    assert float(first.x) == pytest.approx(math.sqrt(to) * 1.0 + math.sqrt(1 - to) * eps)
    assert float(first.x0_hat) == 1.0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_time_is_that_time_for_every_image(target: str, dtype: torch.dtype) -> None:
    """The results are bit-identical, and the network receives one time per image."""
    x_t = torch.randn(5, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(
        memory_format=torch.channels_last
    )
    told = []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told.append(t)
        return x * t.view(-1, 1, 1, 1).sin().to(dtype)

    denoiser = Denoiser(net, NoiseSchedule.named("linear", 50), target)
    for t in (0, 7.3, 49):
        given = [t, torch.tensor(t, dtype=torch.float64), torch.tensor([t], dtype=torch.float64)]
        expected = denoiser(x_t, torch.full((5,), t, dtype=torch.float64))
        for found in (denoiser(x_t, one) for one in given):
            assert torch.equal(found, expected) and found.stride() == expected.stride()
        assert all(
            torch.equal(times, torch.full((5,), float(t))) and times.dtype == torch.float32 for times in told[-4:]
        )


def test_dynamic_thresholding() -> None:
    """Checked by hand: of |x0_hat| = 0, 1, 2, 3, 4 the quantile 0.75 is 3. The quantile 0.6 is 0.4 of the way from 2 to 3."""
    schedule = NoiseSchedule.named("linear", 10)
    x0_hat = torch.tensor([[[0.0, -1, 2, -3, 4]], [[0.0, 0.1, -0.9, 1, 0.5]]])

    def thresholded(x: torch.Tensor, clip: float) -> torch.Tensor:
        return Denoiser(lambda x, t: x, schedule, "x0", clip)(x, 0)

    assert torch.allclose(thresholded(x0_hat, 0.75)[0], torch.tensor([[0, -1 / 3, 2 / 3, -1, 1]]))
    assert torch.allclose(thresholded(x0_hat, 0.6)[0], torch.tensor([[0, -1 / 2.4, 2 / 2.4, -1, 1]]))
    # each image has its own threshold, and nothing changes within [-1, 1]
    assert torch.equal(thresholded(x0_hat, 0.75)[1], x0_hat[1])
    for wrong in (0, 1, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="clip"):
            Denoiser(lambda x, t: x, schedule, "x0", clip=wrong)


@given(st.integers(0, 2**32), st.floats(0.01, 0.99), st.floats(0.1, 10))
def test_thresholding_is_idempotent_and_keeps_the_order_of_pixels(seed: int, clip: float, scale: float) -> None:
    denoiser = Denoiser(lambda x, t: x, NoiseSchedule.named("linear", 10), "x0", clip)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) * scale
    once = denoiser(x, 0)
    assert float(once.abs().max()) <= 1 and torch.equal(denoiser(once, 0), once)
    order = x.flatten(1).argsort(dim=1)
    assert bool((once.flatten(1).gather(1, order).diff(dim=1) >= 0).all())
    assert torch.equal(denoiser(x[1:2], 0), once[1:2])


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_takes_the_evaluations_that_its_samplers_row_says(sampler: str, pure: bool) -> None:
    """pure: the chain starts without signal. In that case Heun's first step is not corrected."""
    schedule = NoiseSchedule.named("linear", 1000)
    schedule = schedule.zero_terminal_snr() if pure else schedule
    other = NoiseSchedule.named("cosine", 1000)
    asked = 0

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += 1
        return torch.zeros_like(x)

    settings = [{"steps": steps, "spacing": "trailing"} for steps in (1, 2, 3, 9, 50)]
    for each in [*settings, {"steps": 12, "spacing": "logsnr", "along": other}]:
        asked, said = 0, evaluations(schedule, sampler, **each)
        states = list(trajectory(Denoiser(net, schedule, "v"), torch.zeros(1, 1), sampler, **each))
        assert asked == states[-1].evaluations == said > 0, each
        if not SAMPLERS[sampler].draws_noise():
            asked = 0
            encode(Denoiser(net, schedule, "v"), torch.zeros(1, 1), sampler, **each)
            assert asked == said, each
    assert evaluations(schedule, sampler, 9, "trailing") == (17 - pure if sampler == "heun" else 9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_draws_noise_where_its_row_says_so(sampler: str) -> None:
    drawn = 0

    def noise(k: int) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return torch.zeros(1, 1)

    for options in ({}, {"eta": 0.0}, {"eta": 0.5}, {"variance": "fixed_small"}, {"order": 2}):
        if options.keys() <= SAMPLERS[sampler].options.keys():
            drawn = 0
            sample(perfect(NoiseSchedule.named("linear", 1000)), torch.ones(1, 1), sampler, 5, noise=noise, **options)
            assert (drawn > 0) == SAMPLERS[sampler].draws_noise(**options), options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler_maruyama"}, "no sampler"),
        ({"sampler": "ddim", "spacing": "cubic"}, "no spacing"),
        ({"sampler": "ddim", "variance": "fixed_large"}, "takes no variance"),
        ({"sampler": "ddpm", "eta": 0.5}, "takes no eta"),
        ({"sampler": "ddpm", "variance": "upper"}, "no variance"),
        ({"sampler": "ddpm", "variance": "learned"}, "has learned no variance"),
        ({"sampler": "ddim", "eta": 1.5}, "must lie in"),
        ({"sampler": "ddim", "steps": 0}, "at least 1"),
    ],
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(perfect(NoiseSchedule.named("linear", 1000)), torch.zeros(1, 1), **options)


@given(st.sampled_from(sorted(TARGETS)), st.sampled_from(sorted(SCHEDULES)), st.integers(0, 2**32))
@settings(deadline=None)
def test_x0_to_x_t_to_target_to_x0(target: str, name: str, seed: int) -> None:
    schedule = NoiseSchedule.named(name, 100)
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.rand(4, 1, 2, 2, generator=generator) * 2 - 1
    eps = torch.randn(4, 1, 2, 2, generator=generator)
    t = torch.randint(100, (4,), generator=generator)
    if float(schedule.alpha_bar[-1]) == 0 and target == "eps":
        return  # this case is refused: see the next test
    x_t, wanted = Objective.of(schedule, target).pair(x_0, t, eps)
    _, _, _, c_out = coefficients(schedule, target, t)
    back = Denoiser(lambda x, times: wanted, schedule, target)(x_t, t)
    assert float((back - x_0).abs().max() / c_out.abs().clamp(min=1).max()) < 1e-5  # the target is accurate to 1e-7


@pytest.mark.parametrize("name", ["linear", "cosine", "rectified"])
def test_targets_by_their_definitions(name: str) -> None:
    """The right outputs are eps, x_0, a eps - s x_0, eps - x_0, and the posterior mean of eq. 7 of Ho et al. 2020."""
    schedule = NoiseSchedule.named(name, 100)
    x_0, eps, t = torch.tensor([[0.3], [-0.8]]).double(), torch.tensor([[-1.2], [0.5]]).double(), 60
    alpha_bar, before = float(schedule.alpha_bar[t + 1]), float(schedule.alpha_bar[t])
    a, s, beta = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), 1 - alpha_bar / before
    x_t = a * x_0 + s * eps
    mean = math.sqrt(before) * beta / s**2 * x_0 + math.sqrt(1 - beta) * (1 - before) / s**2 * x_t
    outputs = {"eps": eps, "x0": x_0, "v": a * eps - s * x_0, "flow": eps - x_0, "mu": mean}
    assert outputs.keys() == TARGETS.keys()
    for target, output in outputs.items():
        found = Denoiser(lambda x, times, output=output: output, schedule, target)(x_t, t)
        assert torch.allclose(found, x_0, rtol=1e-6), target


def test_eps_is_refused_where_nothing_of_the_image_is_left() -> None:
    schedule = NoiseSchedule(torch.full((2000,), 0.9))  # alpha_bar underflows to zero
    with pytest.raises(ValueError, match="does not determine x_0"):
        Denoiser(lambda x, t: x, schedule, "eps")(torch.zeros(1, 1), 1999.0)


def test_a_learned_variance_is_the_second_half_from_0_to_1() -> None:
    """Output -1 is fixed_small and output 1 is fixed_large: eq. 15 of Nichol & Dhariwal 2021, with v = (output + 1) / 2."""
    x = torch.zeros(2, 3, 4, 4)
    outputs = torch.stack([torch.full((4, 4), value) for value in (-1.0, 0.0, 3.0)]).expand(2, 3, 4, 4)
    prediction, v = split_variance(torch.cat([x + 5, outputs], dim=1), x)
    assert v is not None and torch.equal(prediction, x + 5)
    assert v[0, :, 0, 0].tolist() == [0.0, 0.5, 2.0]  # values are not clamped
    for channels in (3, 9):
        assert split_variance(torch.zeros(2, channels, 4, 4), x)[1] is None
