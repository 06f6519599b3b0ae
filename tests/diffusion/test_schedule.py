"""Checks schedules against closed forms and against values computed with 60 digits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm import SCHEDULES, SPACINGS, Denoiser, NoiseSchedule, sample
from ddpm.diffusion.denoiser import coefficients
from ddpm.diffusion.samplers import noise_levels
from ddpm.diffusion.schedule import ALIASES
from ddpm.diffusion.timesteps import network_times
from ddpm.training.objective import Objective

# Computed with 60 digits at T = 1000, then rounded.
TABLE = {
    "scaled_linear": {
        "first": 1e-4, "last": 0.02, "sum": 7.174285997747,
        1: 0.9999, 250: 0.8215213423020, 500: 0.3331877673563, 750: 0.03860551176353, 1000: 7.334124595808e-4,
        "prior": 1.324554138967e-4,
    },
    "cosine": {
        "first": 4.128422482178e-5, "last": 0.999, "sum": 12.44149641706,
        1: 0.9999587157752, 250: 0.8470121613269, 500: 0.4938435904406, 750: 0.1442721023857, 1000: 2.428766907034e-9,
        "prior": 4.379962486593e-10,
    },
    "linear": {
        "first": 1e-4, "last": 0.02, "sum": 10.05,
        1: 0.9999, 250: 0.5240853738254, 500: 0.07858724288178, 750: 0.003350550438937, 1000: 4.035829765376e-5,
        "prior": 7.278676963885e-6,
    },
    "sqrt": {
        "first": 0.01, "last": 0.1414213562373, "sum": 94.70208911996,
        1: 0.99, 250: 4.165461994755e-6, 500: 6.119132095327e-16, 750: 8.164426658268e-29, 1000: 3.223280879377e-44,
        "prior": 5.8e-45,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_tables(name: str) -> None:
    schedule, truth = NoiseSchedule.named(name, 1000), TABLE[name]
    assert schedule.T == 1000
    assert schedule.betas.dtype == schedule.alpha_bar.dtype == torch.float64
    assert float(schedule.betas[0]) == pytest.approx(truth["first"], rel=1e-11)
    assert float(schedule.betas[-1]) == pytest.approx(truth["last"], rel=1e-11)
    assert float(schedule.betas.sum()) == pytest.approx(truth["sum"], rel=1e-11)
    assert float(schedule.alpha_bar[0]) == 1.0
    for t in (1, 250, 500, 750, 1000):
        assert float(schedule.alpha_bar[t]) == pytest.approx(truth[t], rel=1e-10), t


def test_scaled_linear_with_ten_steps() -> None:
    schedule = NoiseSchedule.named("scaled_linear", 10)
    alphas = [0.9999, 0.9994, 0.9985, 0.9971, 0.9953, 0.9931, 0.9905, 0.9874, 0.9839, 0.9800]
    assert (1 - schedule.betas).tolist() == pytest.approx(alphas, abs=5e-5)
    assert float(schedule.alpha_bar[10]) == pytest.approx(0.92736, abs=5e-6)
    assert float(NoiseSchedule.named("cosine", 10).alpha_bar[10]) == pytest.approx(2.4e-5, rel=0.02)
    assert float(NoiseSchedule.named("linear", 250).alpha_bar[250]) == pytest.approx(0.08, abs=0.005)


def test_diffusers_agrees() -> None:
    diffusers = pytest.importorskip("diffusers")
    for ours, theirs in (
        ("linear", "linear"),
        ("scaled_linear", "scaled_linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("sigmoid", "sigmoid"),
    ):
        scheduler = diffusers.DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule=theirs)
        schedule = NoiseSchedule.named(ours, 1000)
        assert torch.allclose(schedule.betas, scheduler.betas.double(), rtol=2e-4, atol=0)
        assert torch.allclose(schedule.alpha_bar[1:], scheduler.alphas_cumprod.double(), rtol=2e-3, atol=0)


def test_rectified_flow() -> None:
    """x_t is the straight path (1 - t/T) x_0 + t/T eps, divided by its deviation.

    The target is the path's velocity eps - x_0.
    """
    schedule = NoiseSchedule.named("rectified", 10)
    x_0, eps = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.tensor([1.5, 0.4], dtype=torch.float64)
    times = torch.arange(10)
    a, s, c_skip, c_out = coefficients(schedule, "flow", times)
    share = (times.double() + 1) / 10
    norm = ((1 - share) ** 2 + share**2).sqrt()
    for i in times.tolist():
        x_t = ((1 - share[i]) * x_0 + share[i] * eps) / norm[i]
        assert torch.allclose(a[i] * x_0 + s[i] * eps, x_t, rtol=1e-9)
        assert torch.allclose(c_skip[i] * x_t + c_out[i] * (eps - x_0), x_0, rtol=1e-9)
    assert float(schedule.alpha_bar[10]) == 0
    _, target = Objective.of(schedule, "flow").pair(x_0.float().expand(10, 2), times, eps.float().expand(10, 2))
    assert torch.allclose(target, (eps - x_0).float().expand(10, 2), rtol=1e-5)


def test_rectified_flow_of_one_image_is_straight() -> None:
    """With the exact velocity towards one image, one DDIM step from x_T reaches the image, since the path is a line."""
    schedule, x_0 = NoiseSchedule.named("rectified", 1000), torch.tensor([[0.3, -0.7]], dtype=torch.float64)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        log_alpha_bar = schedule.log_alpha_bar_at(t)
        a, s = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
        return (x - a[:, None] * x_0) / s[:, None] - x_0

    x_T = torch.tensor([[1.2, -0.4]], dtype=torch.float64)
    for steps in (1, 7):
        found = sample(Denoiser(velocity, schedule, target="flow"), x_T, sampler="ddim", steps=steps)
        assert torch.allclose(found, x_0, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_zero_terminal_snr(name: str) -> None:
    schedule = NoiseSchedule.named(name, 1000)
    rescaled = schedule.zero_terminal_snr()
    assert float(rescaled.alpha_bar[-1]) == 0 and float(rescaled.snr[-1]) == 0
    assert float(rescaled.alpha_bar[1]) == pytest.approx(float(schedule.alpha_bar[1]), rel=1e-12)
    ratio = rescaled.alpha_bar[1:].sqrt().diff() / schedule.alpha_bar[1:].sqrt().diff()
    assert torch.allclose(ratio, ratio[0].expand(999), rtol=1e-6)  # alpha_bar's root is only shifted and scaled
    assert float(rescaled.log_alpha_bar_at(998.0)) == pytest.approx(float(rescaled.log_alpha_bar[999]))
    assert float(rescaled.log_alpha_bar_at(999.0)) == -math.inf
    assert float(rescaled.time_at(torch.tensor(-math.inf))) == 999
    for spacing in SPACINGS:
        times = network_times(rescaled, 7, spacing)
        assert bool(times.isfinite().all()) and (spacing in ("leading", "quadratic") or float(times[0]) == 999)


def test_diffusers_rescales_alike() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, beta_start=1e-4, beta_end=2e-2, rescale_betas_zero_snr=True)
    ours = NoiseSchedule.named("linear", 1000).zero_terminal_snr().alpha_bar[1:]
    assert torch.allclose(ours, scheduler.alphas_cumprod.double(), rtol=2e-3, atol=1e-7)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 2000))
def test_alpha_bar_falls_from_one(name: str, steps: int) -> None:
    alpha_bar = NoiseSchedule.named(name, steps).alpha_bar
    assert float(alpha_bar[0]) == 1 and bool((alpha_bar.diff() < 0).all())
    assert (float(alpha_bar[-1]) == 0) == (name == "rectified")


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(-1, 999))
def test_times_and_levels_are_inverse(name: str, t: float) -> None:
    schedule = NoiseSchedule.named(name, 1000)
    level = schedule.log_alpha_bar_at(t)
    assert float(schedule.time_at(level)) == pytest.approx(t, abs=1e-6)
    below, above = math.floor(t), math.ceil(t)
    between = np.interp(t, [below, above], schedule.log_alpha_bar[[below + 1, above + 1]].numpy())
    assert float(level) == pytest.approx(float(between), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule.named("exponential"), "no schedule"),
        (lambda: NoiseSchedule.named("linear", 0), "at least 1"),
        (lambda: NoiseSchedule.named("linear", 10, s=0.1), "takes no s; it takes start, end"),
        (lambda: NoiseSchedule.named("linear", 10, start=0.0), "must lie in"),
        (lambda: NoiseSchedule.named("linear", 10, end=1.5), "must lie in"),
        (lambda: NoiseSchedule(torch.tensor([0.1, math.nan])), "must lie in"),
        (lambda: NoiseSchedule(torch.zeros(2, 2)), "vector"),
        (lambda: NoiseSchedule.named("linear").log_alpha_bar_at(1000.0), "must lie in"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_spacings_by_hand() -> None:
    schedule = NoiseSchedule.named("linear", 1000)
    times = {spacing: network_times(schedule, 4, spacing).tolist() for spacing in SPACINGS}
    assert times["leading"] == [750, 500, 250, 0]
    assert times["trailing"] == [999, 749, 499, 249]
    assert times["linspace"] == [999, 666, 333, 0]
    root = math.sqrt(800)
    assert times["quadratic"] == pytest.approx([800, (2 * root / 3) ** 2, (root / 3) ** 2, 0])
    # If S does not divide T, there are still S times. Trailing rounds half to even.
    assert network_times(schedule, 3, "leading").tolist() == [666, 333, 0]
    assert network_times(NoiseSchedule.named("linear", 5), 2, "trailing").tolist() == [4, 1]  # round(2.5) = 2


def test_noise_level_spacings() -> None:
    schedule = NoiseSchedule.named("cosine", 1000)
    levels = schedule.log_alpha_bar_at(network_times(schedule, 9, "logsnr"))
    log_snr = levels - torch.log(-torch.expm1(levels))
    assert torch.allclose(log_snr.diff(), log_snr.diff().mean().expand(8), rtol=1e-6)
    levels = schedule.log_alpha_bar_at(network_times(schedule, 9, "karras"))
    ramp = (torch.exp(-levels) - 1).sqrt() ** (1 / 7)
    assert torch.allclose(ramp.diff(), ramp.diff().mean().expand(8), rtol=1e-6)
    for spacing in ("logsnr", "karras"):
        ends = network_times(schedule, 9, spacing)[[0, -1]]
        assert ends.tolist() == pytest.approx([999, 0], abs=1e-9)


@given(st.sampled_from(sorted(SPACINGS)), st.sampled_from(sorted(SCHEDULES)), st.integers(1, 300))
def test_times_fall_within_range(spacing: str, name: str, steps: int) -> None:
    times = network_times(NoiseSchedule.named(name, 1000), steps, spacing)
    assert len(times) == steps and bool((times.diff() < 0).all())
    assert float(times[-1]) >= 0 and float(times[0]) <= 999
    if steps == 1:
        assert times.tolist() == [999]


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
def test_times_of_short_chains_fall_within_range(spacing: str) -> None:
    for T in (2, 3, 4, 5):
        for steps in range(1, T):
            times = network_times(NoiseSchedule.named("linear", T), steps, spacing)
            assert len(times) == steps and float(times[-1]) >= 0 and float(times[0]) <= T - 1, (T, steps)


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="times repeat"):
        network_times(NoiseSchedule.named("linear", 10), 11, "leading")
    # There may be more than T fractional times. But with zero terminal SNR, there is no signal between the last two of the
    # T times.
    noise_levels(NoiseSchedule.named("linear", 10), 40, "linspace")
    with pytest.raises(ValueError, match="40 different noise levels"):
        noise_levels(NoiseSchedule.named("linear", 10).zero_terminal_snr(), 40, "linspace")


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_is_the_same_table(alias: str, name: str) -> None:
    assert alias not in SCHEDULES
    assert torch.equal(NoiseSchedule.named(alias, 50).betas, NoiseSchedule.named(name, 50).betas)


def test_latent_diffusions_linear_is_no_alias() -> None:
    """Latent diffusion's `linear` is our scaled_linear. An alias would give users another schedule than they meant."""
    assert "linear" not in ALIASES and "sqrt" not in ALIASES
    assert float(NoiseSchedule.named("linear", 1000).betas[499]) == pytest.approx(1e-4 + 499 / 999 * (2e-2 - 1e-4))


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_by_name(name: str) -> None:
    """The last level becomes pure noise, the first level stays, and the order of the levels is kept."""
    plain, rescaled = NoiseSchedule.named(name, 100), NoiseSchedule.named(name, 100, zero_terminal_snr=True)
    assert float(rescaled.alpha_bar[-1]) == 0
    assert float(rescaled.alpha_bar[1]) == pytest.approx(float(plain.alpha_bar[1]), rel=1e-12)
    assert bool((rescaled.alpha_bar.diff() < 0).all())


def test_zero_terminal_snr_of_a_single_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^schedule 'cosine': zero_terminal_snr takes two steps or more, not 1$"):
        NoiseSchedule.named("cosine", 1, zero_terminal_snr=True)
