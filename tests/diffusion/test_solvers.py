"""The deterministic solvers: order of convergence on a mixture of Gaussians, and closed forms for a Gaussian at every S."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from ddpm import SAMPLERS, SCHEDULES, SPACINGS, Denoiser, NoiseSchedule, sample
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.samplers import Level, noise_levels
from ddpm.diffusion.timesteps import network_times

MEAN, VARIANCE = 0.4, 0.25
MEANS = torch.tensor([-0.8, 0.5], dtype=torch.float64)
VARIANCES = torch.tensor([0.05, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def level(lam: float) -> Level:
    return Level(lam, 1 / (1 + math.exp(-2 * lam)))


def mixture(x: torch.Tensor, lam: float) -> torch.Tensor:
    """E[x_0 | x_t] of the mixture at half log-SNR lam."""
    a, s2 = level(lam).a, 1 - level(lam).alpha_bar
    variance = a**2 * VARIANCES + s2
    log_weight = WEIGHTS.log() - variance.log() / 2 - (x - a * MEANS) ** 2 / (2 * variance)
    component = MEANS + a * VARIANCES / variance * (x - a * MEANS)
    return (log_weight.softmax(-1) * component).sum(-1, keepdim=True)


def solve(sampler: str, steps: int, gentle: bool = False, **options: int) -> torch.Tensor:
    """From lambda = -2 to 1, evenly; gentle: with first steps so small that a multistep solver's low-order start is free."""
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
    ],
)
def test_order_of_convergence(sampler: str, options: dict, order: int, truth: torch.Tensor) -> None:
    counts = np.array([24, 32, 48, 64, 96])
    errors = [float((solve(sampler, count, **options) - truth).abs().max()) for count in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.35), errors


def affine(sampler: str, levels: list[Level]) -> np.ndarray:
    """Each solver in the variance-exploding form of k-diffusion, for x0_hat = g x + h: [constant, x_T, z_0, z_1, ...].

    Written with xi = x / a and sigma = s / a, unlike the code under test.
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
        if k == count - 2 and old and h > 2 * (t - old[-1][0]):
            old = []
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
            d2 = d if not old else (1 + h / (2 * (t - old[-1][0]))) * d - h / (2 * (t - old[-1][0])) * old[-1][1]
            x = to.a * (sigma_to / sigma * xi - math.expm1(-h) * d2)
        elif sampler == "dpmpp_2m_sde":
            d2 = d if not old else d + h / (2 * (t - old[-1][0])) * (d - old[-1][1])
            z = np.eye(2 + count)[2 + k]
            xi = sigma_to / sigma * math.exp(-h) * xi - math.expm1(-2 * h) * d2
            x = to.a * (xi + sigma_to * math.sqrt(-math.expm1(-2 * h)) * z)
        elif sampler == "dpmpp_3m":
            d2 = d
            if len(old) >= 2:
                # The quadratic through the last three x0_hats, integrated against the exponential.
                nodes = np.array([0.0, (old[-1][0] - t) / h, (old[-2][0] - t) / h])
                fit = np.linalg.solve(np.vander(nodes, 3, increasing=True), np.stack([d, old[-1][1], old[-2][1]]))
                u = np.polynomial.legendre.leggauss(40)
                points, weights = (u[0] + 1) / 2, u[1] / 2
                moments = [float((weights * h * np.exp((points - 1) * h) * points**p).sum()) for p in range(3)]
                x = to.a * (sigma_to / sigma * xi + sum(m * c for m, c in zip(moments, fit, strict=True)))
            else:
                if old:
                    d2 = (1 + h / (2 * (t - old[-1][0]))) * d - h / (2 * (t - old[-1][0])) * old[-1][1]
                x = to.a * (sigma_to / sigma * xi - math.expm1(-h) * d2)
        old.append((t, d))
    raise AssertionError("the last level is the clean image")


def integral(h: float, nodes: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Of e^(u - h) times the polynomial through the nodes (u, value), from u = 0 to h, by quadrature."""
    points, weights = np.polynomial.legendre.leggauss(40)
    u = (points + 1) / 2 * h
    total = np.zeros_like(nodes[0][1])
    for here, value in nodes:
        others = [there for there, _ in nodes if there != here]
        basis = np.prod([(u - there) / (here - there) for there in others], axis=0) if others else np.ones_like(u)
        total = total + float((weights / 2 * h * np.exp(u - h) * basis).sum()) * value
    return total


def affine_unipc(order: int, levels: list[Level]) -> np.ndarray:
    """UniPC as exponential integration of an interpolated x0_hat: past ones for the predictor, and the new one to correct.

    Where there is but one node beside the start, the paper takes (1 - e^-h) / 2 of the difference in place of its integral.
    """
    x = kept = np.array([0.0, 1.0])  # as constant + gain x_T; kept: where the last step began
    one = np.array([1.0, 0.0])

    def denoised(x: np.ndarray, at: Level) -> np.ndarray:
        g = at.a * VARIANCE / (at.alpha_bar * VARIANCE + 1 - at.alpha_bar)
        return g * x + (MEAN - g * at.a * MEAN) * one

    def step(x: np.ndarray, now: Level, to: Level, d: np.ndarray, nodes: list[tuple[float, np.ndarray]]) -> np.ndarray:
        h = to.lam - now.lam
        if len(nodes) == 1:
            ((u, value),) = nodes
            moved = -math.expm1(-h) * (d + (value - d) / (2 * u / h))
        else:
            moved = integral(h, [(0.0, d), *nodes])
        return to.s / now.s * x + to.a * moved

    seen: list[tuple[Level, np.ndarray]] = []  # newest last
    for k, (now, to) in enumerate(pairwise(levels)):
        d = denoised(x, now)
        if k:
            (start, before), older = seen[-1], seen[-order:-1]
            x = step(
                kept, start, now, before, [*((at.lam - start.lam, y) for at, y in older), (now.lam - start.lam, d)]
            )
        if to.alpha_bar == 1:
            return d
        kept, reach = x, seen[::-1][: order - 1]
        if k == len(levels) - 3 and seen and to.lam - now.lam > 2 * (now.lam - seen[-1][0].lam):
            reach = []
        x = step(x, now, to, d, [(at.lam - now.lam, y) for at, y in reach])
        seen.append((now, d))
    raise AssertionError("the last level is the clean image")


# sqrt starts at sigma = 1e22, where differences in sigma, all that Euler and Heun know, say nothing in float64.
CASES = [
    (sampler, options, name)
    for name in sorted(SCHEDULES)
    for sampler in ("euler", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc")
    for options in ([{"order": order} for order in (1, 2, 3)] if sampler == "unipc" else [{}])
    if name != "sqrt" or sampler not in ("euler", "heun")
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
        # float32 times reach the network: fractional times are rounded at 1e-7.
        assert found[: len(expected)] == pytest.approx(expected, abs=2e-4, rel=1e-3), steps


def spread(schedule: NoiseSchedule, sampler: str, steps: int, spacing: str) -> float:
    """Of samples of Gaussian data with the perfect denoiser, over the data's own: 1 is right."""

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = schedule.log_alpha_bar_at(t.double()).exp().view(-1, 1)
        return alpha_bar.sqrt() * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar) * x

    x_T = torch.ones(1, 1, dtype=torch.float64)
    return float(sample(Denoiser(net, schedule, "x0"), x_T, sampler, steps, spacing)) / VARIANCE**0.5


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_no_step_is_too_long_for_a_higher_order(name: str, silent: bool) -> None:
    """Where the steps' lengths jump, a high order is no worse than DDIM; nowhere does Heun's second slope blow the image up.

    Extrapolated over leading's last noisy step, 5 steps of dpmpp_3m gave 2.8 (linear); with Karras' unbounded weight 3 steps of
    Heun on cosine, trailing, gave 304.
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
    """Between two levels, without the lower order that diffusers gives its last steps."""
    diffusers = pytest.importorskip("diffusers")
    for order in (1, 2, 3):
        scheduler = diffusers.UniPCMultistepScheduler(
            1000, 1e-4, 2e-2, solver_order=order, solver_type="bh2", prediction_type="sample",
            lower_order_final=False, final_sigmas_type="sigma_min", timestep_spacing="linspace",
        )  # fmt: skip
        scheduler.set_timesteps(9)
        lams = [-math.log(sigma) for sigma in scheduler.sigmas.double().tolist()]
        x = theirs = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        for lam, t in zip(lams, scheduler.timesteps, strict=False):
            theirs = scheduler.step(mixture(theirs, lam), t, theirs).prev_sample
        for y, _ in SAMPLERS["unipc"].step(mixture, x, [level(lam) for lam in lams], torch.randn, order=order):
            ours = y
        assert torch.allclose(ours, theirs, atol=1e-5), order


def distribution(x: np.ndarray, lam: float) -> np.ndarray:
    """The mixture's cumulative distribution of x_t at half log-SNR lam."""
    a, s2 = level(lam).a, 1 - level(lam).alpha_bar
    return sum(
        float(w) * norm.cdf(x, a * float(m), math.sqrt(a**2 * float(v) + s2))
        for w, m, v in zip(WEIGHTS, MEANS, VARIANCES, strict=True)
    )


def test_the_flow_keeps_every_point_at_its_quantile(truth: torch.Tensor) -> None:
    """In one dimension that is what the exact flow does, so the truth above owes nothing to the code under test."""
    start = distribution(np.linspace(-2, 2, 9), -2.0)
    assert distribution(truth[:, 0].numpy(), 1.0) == pytest.approx(start, abs=1e-9)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m_sde"])
def test_samples_of_a_mixture_are_distributed_as_the_mixture(sampler: str) -> None:
    """Compares by Kolmogorov's distance, with steps so many that the samplers' own bias is at most 0.008.

    Under a fresh seed each sampler fails in about 1 of 300 runs; exact samples would in 1 of 700.
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
    # The normal distribution of the same mean and variance is much further away.
    assert kstest(x[:, 0].numpy(), norm(x.mean().item(), x.std().item()).cdf).statistic > 0.09


def test_every_deterministic_solver_reaches_the_same_image() -> None:
    """With many steps all of them follow the same probability flow from the same noise."""
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
    """Every sampler ends at alpha_bar = 1, where x is the last x0_hat and nothing else."""
    schedule = NoiseSchedule.named(name, 1000)
    target = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: target.expand_as(x), schedule, "x0")
    for sampler in SAMPLERS:
        x = sample(denoiser, gaussian(0, range(3), 0, (2,)).double(), sampler, 10, "logsnr")
        assert torch.allclose(x, target.expand_as(x), atol=1e-9), sampler


def test_from_pure_noise_where_nothing_of_the_signal_is_left() -> None:
    """alpha_bar_T = 0: every sampler starts at infinite noise-to-signal, stays finite, and keeps the data's moments."""
    schedule = NoiseSchedule.named("linear", 1000).zero_terminal_snr()

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
    """The network is asked at its own time of the same noise level; levels it never saw become its last one."""
    trained, other = NoiseSchedule.named("linear", 1000), NoiseSchedule.named("cosine", 1000)
    levels = noise_levels(trained, 50, "trailing", along=other)
    wanted = other.log_alpha_bar_at(network_times(other, 50, "trailing")).exp()
    inside = [float(a) for a in wanted if float(trained.alpha_bar[-1]) < float(a) < float(trained.alpha_bar[1])]
    assert [level.alpha_bar for level in levels[1:-1]] == pytest.approx(inside, rel=1e-9)
    assert levels[0].t == 999 and levels[0].alpha_bar == pytest.approx(float(trained.alpha_bar[-1]))
    for visited in levels[:-1]:
        assert float(trained.log_alpha_bar_at(visited.t).exp()) == pytest.approx(visited.alpha_bar, rel=1e-9)
    # Along itself nothing changes.
    own = noise_levels(trained, 50, "trailing")
    again = noise_levels(trained, 50, "trailing", along=trained)
    assert [level.t for level in again] == pytest.approx([level.t for level in own])


def test_unipc_refuses_other_orders() -> None:
    denoiser = Denoiser(lambda x, t: x, NoiseSchedule.named("linear", 10), "x0")
    with pytest.raises(ValueError, match="order"):
        sample(denoiser, torch.zeros(1, 1), "unipc", 3, order=4)
