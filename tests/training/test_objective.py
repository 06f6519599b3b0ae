"""Checks targets, variances and losses against direct integration, scipy, and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn

from ddpm import LOSSES, SCHEDULES, TARGETS, Denoiser, NoiseSchedule, sample, trajectory
from ddpm.diffusion.denoiser import coefficients
from ddpm.diffusion.gaussian import discretised_log_likelihood, gaussian_kl
from ddpm.diffusion.noise import gaussian
from ddpm.training.objective import GAMMA, HYBRID, Objective

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def bayes(schedule: NoiseSchedule, t: float, x_t: float, x_0: float) -> tuple[float, float]:
    """Returns mean and variance of q(x_{t-1} | x_t, x_0), by quadrature of the product of two Gaussians."""
    now, before = (float(schedule.log_alpha_bar_at(u).exp()) for u in (t, t - 1))
    alpha = now / before
    prior = stats.norm(math.sqrt(before) * x_0, math.sqrt(1 - before))
    # As a function of x_{t-1}, the likelihood of the step is a Gaussian around x_t / sqrt(alpha).
    likelihood = stats.norm(x_t / math.sqrt(alpha), math.sqrt((1 - alpha) / alpha))
    narrow = min(prior, likelihood, key=lambda d: d.std())
    x = np.linspace(narrow.mean() - 12 * narrow.std(), narrow.mean() + 12 * narrow.std(), 20_001)
    weight = np.exp(prior.logpdf(x) + likelihood.logpdf(x) - (prior.logpdf(x) + likelihood.logpdf(x)).max())
    weight /= weight.sum()
    mean = float((weight * x).sum())
    return mean, float((weight * (x - mean) ** 2).sum())


@pytest.mark.parametrize("t", [1, 2, 17, 250.5, 700, 999])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_mu_is_the_mean_of_the_posterior(name: str, t: float) -> None:
    schedule = NoiseSchedule.named(name, 1000)
    if name == "sqrt" and t > 500:
        pytest.skip("alpha_bar is below 1e-16: the product of the two densities has no digits left")
    if name == "rectified" and t == 999:
        pytest.skip("alpha_bar_T = 0: x_T says nothing, so one of the two densities is flat")
    x_0, eps = 0.3, -0.8
    a, s, c_skip, c_out = (float(c) for c in coefficients(schedule, "mu", torch.tensor(t, dtype=torch.float64)))
    x_t = a * x_0 + s * eps
    mean, variance = bayes(schedule, t, x_t, x_0)
    assert (x_0 - c_skip * x_t) / c_out == pytest.approx(mean, abs=1e-9 + 1e-9 * abs(mean))
    on_x0, on_x_t, log_small, log_large = (float(c) for c in schedule.posterior_at(t))
    assert on_x0 * x_0 + on_x_t * x_t == pytest.approx(mean, abs=1e-9)
    assert math.exp(log_small) == pytest.approx(variance, rel=1e-6)
    if t == int(t):
        assert math.exp(log_large) == pytest.approx(float(schedule.betas[int(t)]), rel=1e-9)
        _, target = Objective.of(schedule, "mu").pair(
            torch.full((1, 1, 1, 1), x_0), torch.tensor([int(t)]), torch.full((1, 1, 1, 1), eps)
        )
        assert float(target) == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.25])
def test_the_posterior_ends_at_the_clean_image(t: float) -> None:
    schedule = NoiseSchedule.named("cosine", 1000)
    _, _, c_skip, c_out = coefficients(schedule, "mu", torch.tensor(t, dtype=torch.float64))
    if t == 0:
        assert (float(c_skip), float(c_out)) == (0, pytest.approx(1, rel=1e-12))
    before = float(schedule.log_alpha_bar_at(t - 1).exp())
    on_x0, on_x_t, *_ = schedule.posterior_at(t)
    a = float((schedule.log_alpha_bar_at(t) / 2).exp())
    assert float(on_x0 + on_x_t * a) == pytest.approx(math.sqrt(before), rel=1e-12)  # E[x_{t-1} | x_0]


@given(st.sampled_from(sorted(TARGETS)), st.sampled_from(sorted(SCHEDULES)), st.floats(0, 99), st.integers(0, 2**32))
def test_round_trips_at_fractional_times(target: str, name: str, t: float, seed: int) -> None:
    """Converts x_0 -> x_t -> target -> x_0 in float64, through the Denoiser."""
    schedule = NoiseSchedule.named(name, 100)
    generator = torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(2, 1, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    a, s, c_skip, c_out = coefficients(schedule, target, torch.tensor(t, dtype=torch.float64))
    x_t = a * x_0 + s * eps
    wanted = (x_0 - c_skip * x_t) / c_out
    back = Denoiser(lambda x, times: wanted, schedule, target)(x_t, t)
    assert float((back - x_0).abs().max()) < 1e-13 * max(1, float(c_out.abs()), float(c_skip.abs()))


@pytest.mark.parametrize("target", ["eps", "mu"])
def test_targets_that_say_nothing_of_the_image_are_refused(target: str) -> None:
    schedule = NoiseSchedule(torch.full((2000,), 0.9))  # alpha_bar underflows to zero
    with pytest.raises(ValueError, match="does not determine x_0"):
        Objective.of(schedule, target)
    Objective.of(NoiseSchedule.named("linear", 1000).zero_terminal_snr(), "mu")  # x_{T-1} still depends on x_0


# The terms of the bound.


@pytest.mark.parametrize("logvars", [(-3.0, -2.0), (0.5, -1.0), (-9.0, -9.0 + 1e-4)])
def test_gaussian_kl_by_integration(logvars: tuple[float, float]) -> None:
    p, q = (stats.norm(mean, math.exp(v / 2)) for mean, v in zip((0.2, -0.1), logvars, strict=True))
    ends = p.mean() - 12 * p.std(), p.mean() + 12 * p.std()
    expected, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), *ends, epsabs=1e-12, limit=200)
    arguments = (torch.tensor(x, dtype=torch.float64) for x in (0.2, logvars[0], -0.1, logvars[1]))
    assert float(gaussian_kl(*arguments)) == pytest.approx(expected, rel=1e-8)


def test_gaussian_kl_of_nearly_equal_variances_has_digits() -> None:
    zero, step = torch.zeros(()), torch.tensor(1e-3)
    assert float(gaussian_kl(zero, zero, zero, step)) == pytest.approx((1e-3 + math.expm1(-1e-3)) / 2, rel=2e-4)


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 0.1234, 0.998, 2.5])
@pytest.mark.parametrize("std", [0.002, 0.0074, 0.3, 3.0])
def test_discretised_likelihood_is_scipys_and_sums_to_one(mean: float, std: float) -> None:
    found = discretised_log_likelihood(
        LEVELS, torch.tensor(mean, dtype=torch.float64), torch.tensor(2 * math.log(std), dtype=torch.float64)
    )
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-12)
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
    expected = np.diff(stats.norm.cdf(edges, mean, std))
    assert found.exp().numpy() == pytest.approx(expected, abs=1e-13)
    assert bool(found.isfinite().all())


def test_discretised_likelihood_keeps_its_digits_and_its_gradient_in_the_tails() -> None:
    """Where the bin's mass underflows, it is about the tail beyond the bin's nearer edge: log p = -z^2 / 2 - ..."""
    x0 = LEVELS.float()[[0, 40, 200, 255]]
    mean = torch.tensor([1.0, 0.9, -0.7, -1.0], requires_grad=True)
    found = discretised_log_likelihood(x0, mean, torch.tensor(2 * math.log(0.0074)))
    exact = discretised_log_likelihood(x0.double(), mean.detach().double(), torch.tensor(2 * math.log(0.0074)).double())
    z = ((x0 - mean).abs().double() - 1 / 255) / 0.0074
    tail = stats.norm.logsf(z.detach().numpy())
    assert exact.numpy() == pytest.approx(tail, rel=1e-4)
    assert found.detach().double().numpy() == pytest.approx(exact.numpy(), rel=1e-4)
    found.sum().backward()
    assert mean.grad is not None
    assert (mean.grad.double() * 0.0074).numpy() == pytest.approx(
        (torch.sign(x0 - mean) * z).detach().numpy(), rel=0.01
    )


# Losses of a linear network, computed in another way.


def setup(name: str, target: str, loss: str, count: int = 6) -> tuple[NoiseSchedule, Objective, tuple]:
    schedule = NoiseSchedule.named(name, 50)
    generator = torch.Generator().manual_seed(0)
    x_0 = LEVELS.float()[torch.randint(256, (count, 2, 3, 3), generator=generator)]
    eps = torch.randn(x_0.shape, generator=generator)
    t = torch.arange(count) * 49 // (count - 1)  # 0 ... T-1
    return schedule, Objective.of(schedule, target, loss=loss), (x_0, t, eps)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_vlb_is_the_bound(name: str, target: str, learned: bool) -> None:
    """Computes every term from x0_hat and the textbook's posterior, in float64, with scipy's distribution function."""
    schedule, objective, (x_0, t, eps) = setup(name, target, "vlb")

    def net(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        right = objective.pair(x_0, t, eps)[1]
        wrong = right + 0.03 * torch.sin(7 * x) / objective.to_mean[t].abs().clamp(min=0.03).view(-1, 1, 1, 1)
        return torch.cat([wrong, torch.cos(3 * x)], dim=1) if learned else wrong

    x_t = objective.pair(x_0, t, eps)[0]
    x0_hat, v = Denoiser(net, schedule, target).with_variance(x_t.double(), t.double())
    beta, alpha_bar = schedule.betas, schedule.alpha_bar
    small = beta * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    expected = []
    for i, time in enumerate(t.tolist()):
        large_log, small_log = beta[time].log(), small[max(time, 1)].log()
        if learned:
            assert v is not None
            log_variance = v[i].double() * large_log + (1 - v[i].double()) * small_log
        else:
            log_variance = (large_log if time else small_log).expand(2, 3, 3)
        std = (log_variance / 2).exp()
        if time == 0:
            centre = x_0[i].double()
            upper = np.where(centre > 0.999, np.inf, (centre + 1 / 255 - x0_hat[i]) / std)
            lower = np.where(centre < -0.999, -np.inf, (centre - 1 / 255 - x0_hat[i]) / std)
            term = -np.log(stats.norm.cdf(upper) - stats.norm.cdf(lower))
        else:
            on_x0 = alpha_bar[time].sqrt() * beta[time] / (1 - alpha_bar[time + 1])
            gap = on_x0 * (x0_hat[i] - x_0[i].double())
            ratio = small[time] / std**2
            term = ((ratio - 1 - ratio.log() + gap**2 / std**2) / 2).numpy()
        expected.append(50 * float(term.mean()))
    found = objective.losses(net, x_0, t, eps)
    assert found.numpy() == pytest.approx(np.array(expected), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_vlb_of_a_fixed_variance_is_the_weighted_error_of_equation_12(name: str) -> None:
    schedule, objective, (x_0, t, eps) = setup(name, "eps", "vlb")
    _, simple, _ = setup(name, "eps", "simple")
    x_0, t, eps = x_0[1:], t[1:], eps[1:]
    beta, alpha_bar = schedule.betas[t], schedule.alpha_bar[t + 1]
    weight = 50 * beta**2 / (2 * beta * (1 - beta) * (1 - alpha_bar))  # sigma^2 = beta
    gap = [
        objective.losses(lambda x, times, e=error: eps + e, x_0, t, eps).double()
        - weight * simple.losses(lambda x, times, e=error: eps + e, x_0, t, eps).double()
        for error in (0.0, 0.5, -2.0)
    ]
    ratio = (1 - schedule.alpha_bar[t]) / (1 - alpha_bar)
    constant = 50 * (ratio - 1 - ratio.log()) / 2  # the loss from fixed_large not being the posterior's variance
    for found in gap:
        assert found.numpy() == pytest.approx(constant.numpy(), rel=1e-3, abs=1e-5 * float(weight.max()))


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_min_snr_weights(target: str) -> None:
    """The weight is min(SNR, 5) for x0, divided by SNR for eps and by SNR + 1 for v (Hang et al. 2023, section 3.4)."""
    schedule, objective, (x_0, t, eps) = setup("linear", target, "min_snr")
    _, plain, _ = setup("linear", target, "simple")

    def net(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)

    snr = schedule.alpha_bar[t + 1] / (1 - schedule.alpha_bar[t + 1])
    on_x0 = schedule.posterior_at(t)[0]
    divide = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1, "mu": on_x0**2, "flow": (snr.sqrt() + 1) ** 2}[
        target
    ]
    expected = snr.clamp(max=GAMMA) / divide * plain.losses(net, x_0, t, eps)
    assert objective.losses(net, x_0, t, eps).numpy() == pytest.approx(expected.numpy(), rel=1e-5)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_tables_of_a_very_long_chain_are_finite(target: str) -> None:
    """At the end of the chain, a is below 1e-200 for `linear`."""
    for name in ("linear", "scaled_linear", "cosine"):
        try:
            objective = Objective.of(NoiseSchedule.named(name, 100_000), target)
        except ValueError as error:
            assert "does not determine x_0" in str(error)
            continue
        tables = {name: table for name, table in vars(objective).items() if isinstance(table, torch.Tensor)}
        assert all(table.isfinite().all() for table in tables.values())
        if target == "eps":
            assert objective.min_snr[-1] == 1


class Affine(nn.Module):
    """A network with twice the channels: a mean and a variance, each with its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.variance = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.mean * x, self.variance + 0 * x], dim=1)


def test_hybrid_trains_the_mean_by_the_simple_loss_and_the_variance_by_the_bound() -> None:
    gradients = {}
    for loss in ("simple", "vlb", "hybrid"):
        _, objective, (x_0, t, eps) = setup("linear", "eps", loss)
        net = Affine()
        value = objective.losses(net, x_0, t, eps).mean()
        value.backward()
        gradients[loss] = (float(value.detach()), net.mean.grad, net.variance.grad)
    simple, vlb, hybrid = gradients["simple"], gradients["vlb"], gradients["hybrid"]
    assert hybrid[0] == pytest.approx(simple[0] + HYBRID * vlb[0], rel=1e-6)
    assert torch.equal(hybrid[1], simple[1]) and float(vlb[1].abs()) > 0
    assert float(hybrid[2]) == pytest.approx(HYBRID * float(vlb[2]), rel=1e-5)
    assert simple[2] is None or float(simple[2]) == 0


def test_losses_refused() -> None:
    _, objective, (x_0, t, eps) = setup("linear", "eps", "hybrid")
    with pytest.raises(ValueError, match="has none"):
        objective.losses(lambda x, times: x, x_0, t, eps)
    with pytest.raises(ValueError, match="no loss"):
        Objective.of(NoiseSchedule.named("linear", 50), "eps", loss="l1")


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_loss_and_gradient_is_finite_at_every_time(name: str, target: str, loss: str) -> None:
    """Includes times at which alpha_bar vanishes in float32. The network is untrained, so its errors are large."""
    schedule = NoiseSchedule.named(name, 1000)
    if float(schedule.alpha_bar[-1]) == 0 and target == "eps":
        with pytest.raises(ValueError, match="does not determine x_0"):
            Objective.of(schedule, target, loss=loss)
        return
    objective = Objective.of(schedule, target, loss=loss)
    generator = torch.Generator().manual_seed(0)
    x_0 = LEVELS.float()[torch.randint(256, (1000, 1, 1, 1), generator=generator)]
    net = Affine()
    if loss in ("simple", "min_snr"):
        net.variance.requires_grad_(False)
    losses = objective.losses(net, x_0, torch.arange(1000), torch.randn(x_0.shape, generator=generator))
    assert bool(losses.isfinite().all())
    losses.mean().backward()
    assert all(bool(p.grad.isfinite()) for p in net.parameters() if p.grad is not None)


# Sampling with a learned variance.


@pytest.mark.parametrize("spacing", ["leading", "quadratic", "logsnr"])
@pytest.mark.parametrize(("v", "fixed"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_ends_of_the_learned_variance_are_the_fixed_ones(v: float, fixed: str, spacing: str) -> None:
    schedule = NoiseSchedule.named("cosine", 1000)

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.sin(x), torch.full_like(x, 2 * v - 1)], dim=1)

    x_T = gaussian(0, range(3), 0, (1, 2, 2)).double()

    def draw(k: int) -> torch.Tensor:
        return gaussian(0, range(3), k + 1, (1, 2, 2)).double()

    denoiser = Denoiser(net, schedule, "v")
    learned = sample(denoiser, x_T, "ddpm", 12, spacing, draw, variance="learned")
    assert torch.allclose(learned, sample(denoiser, x_T, "ddpm", 12, spacing, draw, variance=fixed), atol=1e-12)


def test_a_learned_variance_between_the_ends_on_a_respaced_chain() -> None:
    """v = 1/2 adds noise with the geometric mean of the two variances. All other samplers ignore v."""
    schedule = NoiseSchedule.named("linear", 1000)
    denoiser = Denoiser(lambda x, t: torch.cat([0 * x, 0 * x], dim=1), schedule, "x0")
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    now, to = (float(schedule.alpha_bar[t + 1]) for t in (500, 0))
    large = 1 - now / to
    small = large * (1 - to) / (1 - now)
    for variance, expected in {"fixed_large": large, "fixed_small": small, "learned": math.sqrt(large * small)}.items():
        # Starts from x_T = 0 with a draw of one, so the first of two steps shows the deviation. The last step gives x0_hat.
        first, last = trajectory(denoiser, 0 * ones, "ddpm", 2, "leading", lambda k: ones, variance=variance)
        assert float(first.x) ** 2 == pytest.approx(expected, rel=1e-12), variance
        assert float(last.x) == 0 and last.evaluations == 2

    alone = Denoiser(lambda x, t: 0 * x, schedule, "x0")
    for sampler in ("ddim", "heun", "dpmpp_2m", "unipc"):
        assert torch.equal(sample(denoiser, ones, sampler, 5), sample(alone, ones, sampler, 5))
