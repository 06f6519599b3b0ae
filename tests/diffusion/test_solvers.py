"""Checks deterministic solvers: order of convergence on a mixture of Gaussians, and closed forms for a Gaussian at every S."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from ddpm import SAMPLERS, SCHEDULES, SPACINGS, Denoiser, NoiseSchedule, sample
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.timesteps import Level, network_times, noise_levels

MEAN, VARIANCE = 0.4, 0.25
MEANS = torch.tensor([-0.8, 0.5], dtype=torch.float64)
VARIANCES = torch.tensor([0.05, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def level(lam: float) -> Level:
    return Level(lam, 1 / (1 + math.exp(-2 * lam)))


def mixture(x: torch.Tensor, lam: float) -> torch.Tensor:
    """Returns E[x_0 | x_t] of the mixture at half log-SNR lam."""
    a, s2 = level(lam).a, 1 - level(lam).alpha_bar
    variance = a**2 * VARIANCES + s2
    log_weight = WEIGHTS.log() - variance.log() / 2 - (x - a * MEANS) ** 2 / (2 * variance)
    component = MEANS + a * VARIANCES / variance * (x - a * MEANS)
    return (log_weight.softmax(-1) * component).sum(-1, keepdim=True)


def solve(sampler: str, steps: int, gentle: bool = False, **options: int) -> torch.Tensor:
    """Solves from lambda = -2 to 1 in even steps.

    gentle: the first steps are so small that a multistep solver's low-order start adds no error.
    """
    start, end = -2.0, 1.0
    grid = [start + (end - start) * i / steps for i in range(steps + 1)]
    if gentle:
        h = (end - start) / steps
        grid[1:1] = [start + h**3, start + 2 * h**3]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for state in SAMPLERS[sampler].step(mixture, x, [level(lam) for lam in grid], lambda k: None, **options):
        y, _ = state
    return y


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    return solve("unipc", 4000, order=3)


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        ("ddim", {}, 1),
        ("euler", {}, 1),
        ("heun", {}, 2),
        ("dpmpp_2m", {}, 2),
        ("dpmpp_3m", {"gentle": True}, 3),
        ("unipc", {"order": 1}, 2),
        ("unipc", {"order": 2}, 3),
        ("unipc", {"order": 3, "gentle": True}, 4),
        ("ipndm", {}, 2),
        ("deis", {"gentle": True}, 3),
    ],
)
def test_order_of_convergence(sampler: str, options: dict, order: int, truth: torch.Tensor) -> None:
    counts = np.array([24, 32, 48, 64, 96])
    errors = [float((solve(sampler, count, **options) - truth).abs().max()) for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.35), errors


@pytest.mark.parametrize("gentle", [False, True])
def test_the_published_weight_of_the_curvature_is_of_second_order(gentle: bool, truth: torch.Tensor) -> None:
    """Lu et al.'s code gives the curvature half the weight of the exact integral. `dpmpp_3m` gives it the full weight."""

    def published(steps: int) -> torch.Tensor:
        h = 3.0 / steps
        grid = [-2.0, *((-2 + h**3, -2 + 2 * h**3) if gentle else ()), *(-2 + h * (i + 1) for i in range(steps))]
        x, past = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], []
        for now, to in pairwise(grid):
            d, h = mixture(x, now), to - now
            phi_1 = math.expm1(-h)
            phi_2 = phi_1 / h + 1
            phi_3 = phi_2 / h - 0.5  # the exact integral is twice this value
            value = -phi_1 * d
            if len(past) > 1:
                (t0, d0), (t1, d1) = past[:2]
                r0, r1 = (now - t0) / h, (t0 - t1) / h
                first, second = (d - d0) / r0, (d0 - d1) / r1
                slope = first + r0 / (r0 + r1) * (first - second)
                value = value + phi_2 * slope - phi_3 * (first - second) / (r0 + r1)
            elif past:
                value = value - phi_1 / 2 * h / (now - past[0][0]) * (d - past[0][1])
            x = level(to).s / level(now).s * x + level(to).a * value
            past = [(now, d), *past]
        return x

    counts = np.array([192, 384, 768])
    errors = [float((published(count) - truth).abs().max()) for count in counts]
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(2, abs=0.2), errors


def test_ipndm_integrates_a_cubic_exactly_over_equal_steps_of_sigma() -> None:
    """A cubic is integrated exactly at fourth order. The first three steps have a lower order."""
    sigmas = np.linspace(2.0, 1.0, 11)
    cubic = np.polynomial.Polynomial([0.3, -1.0, 0.7, 0.4])
    levels = [level(-math.log(sigma)) for sigma in sigmas]
    at = {each.t: sigma for each, sigma in zip(levels, sigmas, strict=True)}

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return x / level(t).a - at[t] * float(cubic(at[t]))

    steps = SAMPLERS["ipndm"].step(denoise, torch.ones(1, 1, dtype=torch.float64), levels, lambda k: None)
    xi = [float(x) / to.a for (x, _), to in zip(steps, levels[1:], strict=True)]
    moved = [cubic.integ()(to) - cubic.integ()(now) for now, to in pairwise(sigmas)]
    assert np.diff(xi)[2:] == pytest.approx(moved[3:], rel=1e-9)
    assert np.diff(xi)[:2] != pytest.approx(moved[1:3], rel=1e-6)


REACH = 0.7


def behind(h: float, t: float, old: list[tuple[float, np.ndarray]]) -> list[tuple[float, np.ndarray]]:
    """Returns the past estimates (lambda, value) that enter a step, newest first. `old` has the newest last."""
    kept = old[::-1]
    if not kept or (h > REACH and h > 2 * (t - kept[0][0])):
        return []
    count = 1
    while h <= REACH and count < len(kept) and kept[count - 1][0] - kept[count][0] <= REACH:
        count += 1
    return kept[:count]


def affine(sampler: str, levels: list[Level]) -> np.ndarray:
    """Solves in the variance-exploding form of k-diffusion, for x0_hat = g x + h. Returns the factors of 1, x_T, z_0, z_1, ...

    The formulas use xi = x / a and sigma = s / a, unlike the code under test.
    """
    count = len(levels) - 1
    x = np.zeros(2 + count)
    x[1] = 1.0
    one = np.eye(2 + count)[0]

    def denoised(x: np.ndarray, at: Level) -> np.ndarray:
        g = at.a * VARIANCE / (at.alpha_bar * VARIANCE + 1 - at.alpha_bar)
        return g * x + (MEAN - g * at.a * MEAN) * one

    old: list[tuple[float, np.ndarray]] = []
    for k, (now, to) in enumerate(pairwise(levels)):
        d, xi, sigma, sigma_to = denoised(x, now), x / now.a, now.s / now.a, to.s / to.a
        if sigma_to == 0:
            return d
        t, t_to = -math.log(sigma), -math.log(sigma_to)
        h = t_to - t
        used = behind(h, t, old)
        d2 = d if not used else d + min(h, REACH) / 2 * (d - used[0][1]) / (t - used[0][0])
        if sampler in ("euler", "heun"):
            slope = (xi - d) / sigma
            ahead = xi + (sigma_to - sigma) * slope
            if sampler == "heun":
                d_to = denoised(to.a * ahead, to)
                if sigma <= 3 * sigma_to:
                    ahead = xi + (sigma_to - sigma) * (slope + (ahead - d_to) / sigma_to) / 2
                else:
                    ahead = ahead + d_to - d
            x = to.a * ahead
        elif sampler == "dpmpp_2m":
            x = to.a * (sigma_to / sigma * xi - math.expm1(-h) * d2)
        elif sampler == "dpmpp_2m_sde":
            z = np.eye(2 + count)[2 + k]
            xi = sigma_to / sigma * math.exp(-h) * xi - math.expm1(-2 * h) * d2
            x = to.a * (xi + sigma_to * math.sqrt(-math.expm1(-2 * h)) * z)
        elif sampler == "dpmpp_3m":
            if len(used) >= 2:
                # Integrates the quadratic through the last three x0_hats against the exponential.
                nodes = [(0.0, d), *((there - t, value) for there, value in used[:2])]
                x = to.a * (sigma_to / sigma * xi + integral(h, nodes))
            else:
                x = to.a * (sigma_to / sigma * xi - math.expm1(-h) * d2)
        old.append((t, d))
    raise AssertionError("the last level is the clean image")


def integral(h: float, nodes: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Integrates e^(u - h) times the polynomial through the nodes (u, value), from u = 0 to h, by quadrature."""
    points, weights = np.polynomial.legendre.leggauss(40)
    u = (points + 1) / 2 * h
    total = np.zeros_like(nodes[0][1])
    for here, value in nodes:
        others = [there for there, _ in nodes if there != here]
        basis = np.prod([(u - there) / (here - there) for there in others], axis=0) if others else np.ones_like(u)
        total = total + float((weights / 2 * h * np.exp(u - h) * basis).sum()) * value
    return total


def affine_unipc(order: int, levels: list[Level]) -> np.ndarray:
    """Solves with UniPC, written as exponential integration of an interpolated x0_hat.

    The predictor interpolates past values, and the corrector adds the new value. With only one node beside the start, the
    paper replaces the integral of the difference by (1 - e^-h) / 2 times the difference.
    """
    x = kept = np.array([0.0, 1.0])  # constant + gain x_T; `kept` is where the last step began
    one = np.array([1.0, 0.0])

    def denoised(x: np.ndarray, at: Level) -> np.ndarray:
        g = at.a * VARIANCE / (at.alpha_bar * VARIANCE + 1 - at.alpha_bar)
        return g * x + (MEAN - g * at.a * MEAN) * one

    def step(x: np.ndarray, now: Level, to: Level, d: np.ndarray, nodes: list[tuple[float, np.ndarray]]) -> np.ndarray:
        h = to.lam - now.lam
        if len(nodes) == 1:
            ((u, value),) = nodes
            moved = -math.expm1(-h) * (d + (value - d) * (0.5 if u > 0 else min(h, REACH) / (2 * u)))
        else:
            moved = integral(h, [(0.0, d), *nodes])
        return to.s / now.s * x + to.a * moved

    seen: list[tuple[Level, np.ndarray]] = []  # newest last
    for k, (now, to) in enumerate(pairwise(levels)):
        d = denoised(x, now)
        if k:
            (start, before), older = seen[-1], [(at.lam, y) for at, y in seen[-order:-1]]
            h = now.lam - start.lam
            older = [] if h > REACH else behind(h, start.lam, older)
            x = step(kept, start, now, before, [*((lam - start.lam, y) for lam, y in older), (h, d)])
        if to.alpha_bar == 1:
            return d
        kept, h = x, to.lam - now.lam
        used = behind(h, now.lam, [(at.lam, y) for at, y in seen[::-1][: order - 1][::-1]])
        x = step(x, now, to, d, [(lam - now.lam, y) for lam, y in used])
        seen.append((now, d))
    raise AssertionError("the last level is the clean image")


# sqrt starts at sigma = 1e22. Euler and Heun use only differences in sigma, which are meaningless in float64 at that size.
# rectified starts at an infinite sigma, as schedules with zero_terminal_snr do.
CASES = [
    (sampler, options, name)
    for name in sorted(SCHEDULES)
    for sampler in ("euler", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc")
    for options in ([{"order": order} for order in (1, 2, 3)] if sampler == "unipc" else [{}])
    if name != "rectified" and (name != "sqrt" or sampler not in ("euler", "heun"))
]


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
@pytest.mark.parametrize(("sampler", "options", "name"), CASES)
def test_moments_for_gaussian_data(sampler: str, options: dict, name: str, spacing: str) -> None:
    schedule = NoiseSchedule.named(name, 1000)

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = schedule.log_alpha_bar_at(t.double()).exp().view(-1, 1)
        gain = alpha_bar.sqrt() * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar)
        return MEAN + gain * (x - alpha_bar.sqrt() * MEAN)

    for steps in (1, 2, 3, 5, 12):
        levels = noise_levels(schedule, steps, spacing)
        expected = affine_unipc(levels=levels, **options) if sampler == "unipc" else affine(sampler, levels)
        x_T = torch.zeros(steps + 2, 1, dtype=torch.float64)
        x_T[1] = 1

        def noise(k: int, like: torch.Tensor = x_T) -> torch.Tensor:
            z = torch.zeros_like(like)
            z[2 + k] = 1
            return z

        out = sample(Denoiser(net, schedule, "x0"), x_T, sampler, steps, spacing, noise, **options)[:, 0].numpy()
        found = np.concatenate([out[:1], out[1:] - out[0]])
        # The network receives float32 times, so fractional times are rounded at 1e-7.
        assert found[: len(expected)] == pytest.approx(expected, abs=2e-4, rel=1e-3), steps


def spread(schedule: NoiseSchedule, sampler: str, steps: int, spacing: str) -> float:
    """Returns the samples' standard deviation divided by the data's, for Gaussian data and the perfect denoiser.

    The correct value is 1.
    """

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = schedule.log_alpha_bar_at(t.double()).exp().view(-1, 1)
        return alpha_bar.sqrt() * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar) * x

    x_T = torch.ones(1, 1, dtype=torch.float64)
    return float(sample(Denoiser(net, schedule, "x0"), x_T, sampler, steps, spacing)) / VARIANCE**0.5


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_no_step_is_too_long_for_a_higher_order(name: str, silent: bool) -> None:
    """Where step lengths jump, a high order is no worse than DDIM, and Heun's second slope does not blow up the image.

    Without limits, 5 steps of dpmpp_3m gave a spread of 2.8 (linear), since they extrapolated over leading's last noisy
    step. With Karras' unbounded weight, 3 steps of Heun gave 304 (cosine, trailing).
    """
    schedule = NoiseSchedule.named(name, 1000, zero_terminal_snr=silent)
    for steps in (3, 5, 10, 20):
        for spacing in ("leading", "linspace"):
            least = abs(spread(schedule, "ddim", steps, spacing) - 1) + 0.01
            for sampler in ("heun", "dpmpp_2m", "dpmpp_3m", "unipc"):
                assert abs(spread(schedule, sampler, steps, spacing) - 1) < least, (sampler, steps, spacing)
        for spacing in SPACINGS:
            assert 0 < spread(schedule, "heun", steps, spacing) < 1.3, (steps, spacing)


def test_unipc_agrees_with_its_authors_in_diffusers() -> None:
    """The steps are shorter than REACH, and diffusers' lower order in the last steps is switched off."""
    diffusers = pytest.importorskip("diffusers")
    for order in (1, 2, 3):
        scheduler = diffusers.UniPCMultistepScheduler(
            1000, 1e-4, 2e-2, solver_order=order, solver_type="bh2", prediction_type="sample",
            lower_order_final=False, final_sigmas_type="sigma_min", use_exponential_sigmas=True,
        )  # fmt: skip
        agrees("unipc", scheduler, {"order": order})


def agrees(sampler: str, scheduler: Any, options: dict[str, int]) -> None:
    """Compares our sampler with diffusers' scheduler on 20 levels that are evenly spaced in lambda, 0.5 apart."""
    scheduler.set_timesteps(20)
    lams = [-math.log(sigma) for sigma in scheduler.sigmas.double().tolist()]
    lams = lams[: 1 + next((k for k, (now, to) in enumerate(pairwise(lams)) if to <= now), len(lams))]
    x = theirs = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for lam, t in zip(lams[:-1], scheduler.timesteps, strict=False):
        theirs = scheduler.step(mixture(theirs, lam), t, theirs).prev_sample
    for y, _ in SAMPLERS[sampler].step(mixture, x, [level(lam) for lam in lams], torch.randn, **options):
        ours = y
    assert len(lams) > 15 and max(to - now for now, to in pairwise(lams)) < REACH
    assert torch.allclose(ours, theirs, atol=1e-5), options


def test_deis_agrees_with_its_authors_in_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DEISMultistepScheduler(
        1000, 1e-4, 2e-2, solver_order=3, prediction_type="sample", lower_order_final=False, use_exponential_sigmas=True
    )
    agrees("deis", scheduler, {})


def test_ipndm_agrees_with_diffusers_where_that_starts_with_a_signal() -> None:
    """diffusers' first level has no signal, so the comparison starts at the ninth of 80 levels."""
    scheduler = pytest.importorskip("diffusers").IPNDMScheduler()
    scheduler.set_timesteps(80)
    first, last = 8, 74
    levels = [
        Level(math.log(float(a / s)), float(a) ** 2)
        for a, s in list(zip(scheduler.alphas.double(), scheduler.betas.double(), strict=True))[first : last + 1]
    ]
    scheduler.set_begin_index(first)
    x = theirs = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for now, t in zip(levels[:-1], scheduler.timesteps[first:], strict=False):
        x0_hat = mixture(theirs, now.t)
        eps = (theirs - now.a * x0_hat) / now.s
        # the network of this scheduler predicts v
        theirs = scheduler.step(now.a * eps - now.s * x0_hat, t, theirs).prev_sample
    for y, _ in SAMPLERS["ipndm"].step(mixture, x, levels, torch.randn):
        ours = y
    assert max(to.lam - now.lam for now, to in pairwise(levels)) < REACH
    assert torch.allclose(ours, theirs, atol=1e-4)


def distribution(x: np.ndarray, lam: float) -> np.ndarray:
    """Returns the mixture's cumulative distribution of x_t at half log-SNR lam."""
    a, s2 = level(lam).a, 1 - level(lam).alpha_bar
    return sum(
        float(w) * norm.cdf(x, a * float(m), math.sqrt(a**2 * float(v) + s2))
        for w, m, v in zip(WEIGHTS, MEANS, VARIANCES, strict=True)
    )


def test_the_flow_keeps_every_point_at_its_quantile(truth: torch.Tensor) -> None:
    """In one dimension, the exact flow does this. So the test confirms `truth` without the code under test."""
    start = distribution(np.linspace(-2, 2, 9), -2.0)
    assert distribution(truth[:, 0].numpy(), 1.0) == pytest.approx(start, abs=1e-9)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m_sde"])
def test_samples_of_a_mixture_are_distributed_as_the_mixture(sampler: str) -> None:
    """Compares by Kolmogorov's distance, with enough steps that the samplers' own bias is at most 0.008.

    With another seed, each sampler would fail by chance in about 1 of 300 runs. Exact samples would fail in 1 of 700.
    """
    schedule = NoiseSchedule.named("cosine", 1000)

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        log_alpha_bar = schedule.log_alpha_bar_at(t.double()[:1])
        return mixture(x, float(log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))) / 2)

    def noise(k: int) -> torch.Tensor:
        return gaussian(1, range(4_000), k, (1,)).double()

    options = {"variance": "fixed_small"} if sampler == "ddpm" else {}
    x = sample(Denoiser(net, schedule, "x0"), noise(0), sampler, 400, "logsnr", lambda k: noise(k + 1), **options)
    apart = kstest(x[:, 0].numpy(), lambda x: distribution(x, 20.0)).statistic
    assert apart < 0.03
    # A normal distribution with the same mean and variance is much further away.
    assert kstest(x[:, 0].numpy(), norm(x.mean().item(), x.std().item()).cdf).statistic > 0.09


def test_every_deterministic_solver_reaches_the_same_image() -> None:
    """With many steps, all solvers follow the same probability flow from the same noise."""
    schedule = NoiseSchedule.named("cosine", 1000)

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        log_alpha_bar = schedule.log_alpha_bar_at(t.double()[:1])
        return mixture(x, float(log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))) / 2)

    x_T = gaussian(0, range(12), 0, (1,)).double()
    denoiser = Denoiser(net, schedule, "x0")
    images = {
        name: sample(denoiser, x_T, name, 300, "logsnr") for name, row in SAMPLERS.items() if not row.draws_noise()
    }
    assert len(images) >= 6
    for name, image in images.items():
        assert torch.allclose(image, images["heun"], atol=0.02), name
    assert torch.allclose(images["euler"], images["ddim"], atol=1e-9)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_last_step_gives_x0_hat(name: str) -> None:
    """Every sampler ends at alpha_bar = 1, where x equals the last x0_hat."""
    schedule = NoiseSchedule.named(name, 1000)
    target = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: target.expand_as(x), schedule, "x0")
    for sampler in SAMPLERS:
        x = sample(denoiser, gaussian(0, range(3), 0, (2,)).double(), sampler, 10, "logsnr")
        assert torch.allclose(x, target.expand_as(x), atol=1e-9), sampler


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.named("linear", 1000).zero_terminal_snr(), NoiseSchedule.named("rectified", 1000)]
)
def test_from_pure_noise_where_nothing_of_the_signal_is_left(schedule: NoiseSchedule) -> None:
    """With alpha_bar_T = 0, every deterministic sampler starts without signal, stays finite, and reaches the data's moments."""

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = schedule.log_alpha_bar_at(t.double()).exp().view(-1, 1)
        gain = alpha_bar.sqrt() * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar)
        return MEAN + gain * (x - alpha_bar.sqrt() * MEAN)

    x_T = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    for sampler in (name for name, row in SAMPLERS.items() if not row.draws_noise()):
        low, middle, high = sample(Denoiser(net, schedule, "x0"), x_T, sampler, 200, "trailing")[:, 0].tolist()
        assert middle == pytest.approx(MEAN, abs=5e-3), sampler
        assert (high - low) / 2 == pytest.approx(VARIANCE**0.5, rel=0.03), sampler


def test_along_another_schedule() -> None:
    """The network receives its own time at the same noise level. Levels that it never saw become its last level."""
    trained, other = NoiseSchedule.named("linear", 1000), NoiseSchedule.named("cosine", 1000)
    levels = noise_levels(trained, 50, "trailing", along=other)
    wanted = other.log_alpha_bar_at(network_times(other, 50, "trailing")).exp()
    inside = [float(a) for a in wanted if float(trained.alpha_bar[-1]) < float(a) < float(trained.alpha_bar[1])]
    assert [level.alpha_bar for level in levels[1:-1]] == pytest.approx(inside, rel=1e-9)
    assert levels[0].t == 999 and levels[0].alpha_bar == pytest.approx(float(trained.alpha_bar[-1]))
    for visited in levels[:-1]:
        assert float(trained.log_alpha_bar_at(visited.t).exp()) == pytest.approx(visited.alpha_bar, rel=1e-9)
    # Sampling along its own schedule changes nothing.
    own = noise_levels(trained, 50, "trailing")
    again = noise_levels(trained, 50, "trailing", along=trained)
    assert [level.t for level in again] == pytest.approx([level.t for level in own])


def test_unipc_refuses_other_orders() -> None:
    denoiser = Denoiser(lambda x, t: x, NoiseSchedule.named("linear", 10), "x0")
    with pytest.raises(ValueError, match="order"):
        sample(denoiser, torch.zeros(1, 1), "unipc", 3, order=4)
