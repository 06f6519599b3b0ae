"""Checks the variational bound against closed forms, direct integration, a joint Gaussian, and data of known entropy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from ddpm import Denoiser, NoiseSchedule
from ddpm.diffusion.bound import (
    VARIANCES,
    discretised_log_likelihood,
    gaussian_kl,
    mean_and_error,
    prior,
    reverse_log_variance,
    strata,
    term,
    variational_bound,
)

GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def gauss_hermite(count: int) -> tuple[Tensor, Tensor]:
    """Returns nodes and weights for E f(z), z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


# The terms of the bound.


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("scaled_linear", 1.324554138967e-4),
        ("cosine", 4.379962486593e-10),
        ("linear", 7.278676963885e-6),
        ("sqrt", 5.8e-45),
    ],
)
def test_prior_of_the_schedules(name: str, bits: float) -> None:
    """The expected values were computed with 60 digits."""
    assert float(prior(NoiseSchedule.named(name, 1000), 0.25)) == pytest.approx(
        bits, rel=2e-3 if bits < 1e-40 else 1e-9
    )
    assert float(prior(NoiseSchedule.named(name, 1000, zero_terminal_snr=True), 0.25)) == 0


@given(st.floats(-2, 2), st.floats(-6, 3), st.floats(-2, 2), st.floats(-6, 3))
def test_kl_of_gaussians(mean1: float, logvar1: float, mean2: float, logvar2: float) -> None:
    ours = float(gaussian_kl(*(double(value) for value in (mean1, logvar1, mean2, logvar2))))
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(double(mean1), double(logvar1 / 2).exp()),
        torch.distributions.Normal(double(mean2), double(logvar2 / 2).exp()),
    )
    assert ours == pytest.approx(float(theirs), rel=1e-9, abs=1e-12)


@given(st.floats(-4, 4), st.floats(-25, 6))
def test_the_decoder_is_a_distribution(mean: float, log_variance: float) -> None:
    """However narrow or far away the distribution is, its 256 bins sum to one and agree with scipy's normal distribution."""
    ours = discretised_log_likelihood(GRID, double(mean), double(log_variance))
    assert bool(torch.isfinite(ours).all())
    assert float(ours.logsumexp(0)) == pytest.approx(0, abs=1e-9)
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -math.inf, math.inf
    theirs = np.diff(norm.cdf(edges.numpy(), mean, math.exp(log_variance / 2)))
    seen = theirs > 1e-6  # scipy's difference has too few digits for smaller values
    np.testing.assert_allclose(ours.exp().numpy()[seen], theirs[seen], rtol=1e-7)


def test_the_decoder_far_from_the_image() -> None:
    """Compares both far tails with the density times the bin width. In the upper tail, a cumulative distribution rounds to 1."""
    for side in (1, -1):
        ours = discretised_log_likelihood(double(side * 101 / 127.5), double(-side * 0.9), double(2 * math.log(0.05)))
        z = (101 / 127.5 + 0.9) / 0.05  # 34 deviations
        h = z / 0.05 / 127.5 / 2  # how far the log density falls over half a bin
        expected = norm.logpdf(z) - math.log(0.05) + math.log(math.sinh(h) / h / 127.5)
        assert float(ours) == pytest.approx(expected, rel=1e-4)


def test_variances() -> None:
    """Checks the two variances of Ho et al., their first entry, and the learned variance between them."""
    schedule = NoiseSchedule.named("linear", 20)
    t, alpha_bar, betas = torch.arange(20), schedule.alpha_bar, schedule.betas
    small = betas[1:] * (1 - alpha_bar[1:-1]) / (1 - alpha_bar[2:])
    for variance, expected in (("fixed_large", betas[1:]), ("fixed_small", small)):
        ours = reverse_log_variance(schedule, t, variance).exp()
        assert torch.allclose(ours, torch.cat([small[:1], expected]), rtol=1e-12)
    image = torch.ones(20, 1, 2, 2, dtype=torch.float64)
    ends = [reverse_log_variance(schedule, t, v=v * image)[:, 0, 1, 1] for v in (0, 1, 0.25)]
    assert torch.equal(ends[0], reverse_log_variance(schedule, t, "fixed_small"))
    assert torch.allclose(ends[1], betas.log(), rtol=1e-12)
    assert torch.allclose(ends[2], 0.75 * ends[0] + 0.25 * ends[1], rtol=1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("t", [1, 4, 9])
def test_a_term_against_integration(variance: str, t: int) -> None:
    """Integrates KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) on a grid, with q by Bayes' rule and p from algorithm 2."""
    schedule = NoiseSchedule.named("cosine", 10)
    alpha_bar, beta = schedule.alpha_bar.tolist(), float(schedule.betas[t])
    x_0, x_t, x0_hat = 0.3, 0.4, -0.2
    grid = np.linspace(-15, 15, 600_001)
    log_q = norm.logpdf(x_t, math.sqrt(1 - beta) * grid, math.sqrt(beta))
    log_q += norm.logpdf(grid, math.sqrt(alpha_bar[t]) * x_0, math.sqrt(1 - alpha_bar[t]))
    log_q -= np.log(np.sum(np.exp(log_q)) * (grid[1] - grid[0]))
    eps_hat = (x_t - math.sqrt(alpha_bar[t + 1]) * x0_hat) / math.sqrt(1 - alpha_bar[t + 1])
    mean = (x_t - beta / math.sqrt(1 - alpha_bar[t + 1]) * eps_hat) / math.sqrt(1 - beta)  # eq. 11
    shrink = 1 if variance == "fixed_large" else (1 - alpha_bar[t]) / (1 - alpha_bar[t + 1])
    log_p = norm.logpdf(grid, mean, math.sqrt(beta * shrink))
    expected = np.sum(np.exp(log_q) * (log_q - log_p)) * (grid[1] - grid[0]) / math.log(2)
    ours = term(schedule, torch.tensor([t]), double(x_0).view(1, 1), double(x0_hat).view(1, 1), variance)
    assert float(ours) == pytest.approx(expected, rel=1e-7)


# Gaussian data, x_0 ~ N(0, v), and the exact denoiser for these data.


def gaussian_terms(schedule: NoiseSchedule, v: float, variance: str) -> Tensor:
    """Returns the expected terms 1 ... T-1 in bits, by Gauss-Hermite quadrature, which is exact for quadratic functions."""
    nodes, weights = gauss_hermite(4)
    x_0, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(math.sqrt(v) * nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).flatten()
    found = []
    for t in range(1, schedule.T):
        alpha_bar = float(schedule.alpha_bar[t + 1])
        x_t = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps
        x0_hat = math.sqrt(alpha_bar) * v / (alpha_bar * v + 1 - alpha_bar) * x_t
        found.append((weight * term(schedule, torch.full((len(x_0),), t), x_0, x0_hat, variance)).sum())
    return torch.stack(found)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("v", [0.25, 1.0])
def test_terms_of_gaussian_data_in_closed_form(variance: str, v: float) -> None:
    """Each term is [(w^2 Var[x_0 | x_t] + beta_tilde) / sigma^2 - 1 - log(beta_tilde / sigma^2)] / 2.

    w is the weight of x_0 in eq. 7.
    """
    schedule = NoiseSchedule.named("linear", 1000)
    alpha_bar, betas = schedule.alpha_bar, schedule.betas[1:]
    before, after = alpha_bar[1:-1], alpha_bar[2:]
    posterior = v * (1 - after) / (after * v + 1 - after)
    small = betas * (1 - before) / (1 - after)
    sigma2 = betas if variance == "fixed_large" else small
    w = before.sqrt() * betas / (1 - after)
    expected = ((w**2 * posterior + small) / sigma2 - 1 - (small / sigma2).log()) / (2 * math.log(2))
    assert torch.allclose(gaussian_terms(schedule, v, variance), expected, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_sum_is_the_divergence_of_the_whole_chains(variance: str) -> None:
    """The sum L_T + ... + L_1 is E KL(q(x_1, ..., x_T | x_0) || p(x_1, ..., x_T)).

    Here q and p are Gaussians in T dimensions.
    """
    schedule, T, v = NoiseSchedule.named("linear", 6, start=0.05, end=0.6), 6, 0.4
    alpha_bar, betas = schedule.alpha_bar.numpy(), schedule.betas.numpy()
    # q: x_t = sqrt(alpha_bar_t) x_0 + noise. For t <= u the covariance is (1 - alpha_bar_t) sqrt(alpha_bar_u / alpha_bar_t).
    first, later = (pick.outer(np.arange(1, T + 1), np.arange(1, T + 1)) for pick in (np.minimum, np.maximum))
    q = (1 - alpha_bar[first]) * np.sqrt(alpha_bar[later] / alpha_bar[first])
    # p: x_T = z_T, x_{t-1} = gain x_t + sigma z_{t-1}, as a matrix that computes all of x from all of z.
    make = np.zeros((T, T))
    make[T - 1, T - 1] = 1
    for t in range(T, 1, -1):
        beta, left, left_before = betas[t - 1], 1 - alpha_bar[t], 1 - alpha_bar[t - 1]
        eps_gain = math.sqrt(left) / (alpha_bar[t] * v + left)  # eps_hat / x_t of the exact denoiser
        make[t - 2] = (1 - beta / math.sqrt(left) * eps_gain) / math.sqrt(1 - beta) * make[t - 1]
        make[t - 2, t - 2] = math.sqrt(beta if variance == "fixed_large" else beta * left_before / left)
    p = make @ make.T
    inverse = np.linalg.inv(p)
    mean = np.sqrt(alpha_bar[1:])  # to be multiplied by x_0
    divergence = (
        np.trace(inverse @ q) - T + np.linalg.slogdet(p)[1] - np.linalg.slogdet(q)[1] + v * mean @ inverse @ mean
    )
    ours = float(prior(schedule, v)) + float(gaussian_terms(schedule, v, variance).sum())
    assert ours == pytest.approx(divergence / (2 * math.log(2)), rel=1e-10)


def test_each_variance_is_best_for_the_data_it_is_meant_for() -> None:
    """beta suits unit Gaussian data, and beta_tilde suits a single image (Ho et al. 2020, section 3.2)."""
    schedule = NoiseSchedule.named("linear", 100)
    large, small = (gaussian_terms(schedule, 1.0, variance) for variance in VARIANCES)
    assert bool((large < small).all())
    large, small = (gaussian_terms(schedule, 0.0, variance) for variance in VARIANCES)
    assert bool((large > 0).all()) and float(small.abs().max()) < 1e-15


# Images whose pixels take two values with equal probability. Their entropy is one bit per pixel.

LOW, HIGH = 60, 180


def coins(count: int, seed: int = 0) -> Tensor:
    drawn = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(drawn, LOW, HIGH).to(torch.uint8)


def coin_x0(schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> Tensor:
    """Returns E[x_0 | x_t] for x_0 = middle +- half, each with probability 1/2."""
    middle, half = (LOW + HIGH) / 255 - 1, (HIGH - LOW) / 255
    alpha_bar = schedule.log_alpha_bar_at(t).exp().view(-1, *[1] * (x_t.ndim - 1))
    a = alpha_bar.sqrt()
    return middle + half * torch.tanh((x_t.double() - a * middle) * a * half / (1 - alpha_bar))


def coin_denoiser(schedule: NoiseSchedule) -> Denoiser:
    return Denoiser(lambda x, t: coin_x0(schedule, x, t).float(), schedule, "x0")


def coin_bound(schedule: NoiseSchedule, variance: str) -> tuple[Tensor, Tensor]:
    """Returns the bound's terms 0 ... T-1 in bits, and the denoiser's squared errors, both by quadrature."""
    grid = np.linspace(-10, 10, 4001)  # the trapezoidal rule, accurate for smooth functions that vanish at both ends
    eps, weight = torch.from_numpy(grid)[:, None], torch.from_numpy(norm.pdf(grid) * (grid[1] - grid[0]))
    bits, errors = [], []
    for t in range(schedule.T):
        times, alpha_bar = torch.full((len(eps),), t), schedule.alpha_bar[t + 1]
        mean_bits, mean_error = 0.0, 0.0
        for value in (LOW, HIGH):
            x_0 = torch.full_like(eps, value) / 127.5 - 1
            x0_hat = coin_x0(schedule, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps, times.double())
            mean_bits += float((weight * term(schedule, times, x_0, x0_hat, variance)).sum()) / 2
            mean_error += float((weight[:, None] * (x0_hat - x_0).square()).sum()) / 2
        bits.append(mean_bits)
        errors.append(mean_error)
    return torch.tensor(bits, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_of_coins(variance: str) -> None:
    """Every part of the estimate agrees with quadrature, and the bound lies above the entropy of one bit per pixel.

    With another seed, the test would fail by chance in about 1 of 4,000 runs (5 standard errors at each of 28 times, 4 for
    the sum).
    """
    schedule = NoiseSchedule.named("cosine", 30)
    bits, errors = coin_bound(schedule, variance)
    bound = variational_bound(coin_denoiser(schedule), coins(400), seed=1, batch=128, variance=variance)
    for ours, expected in ((bound.decoder, bits[0]), (bound.kl, bits[1:].sum())):
        mean, error = mean_and_error(ours)
        assert error > 0 and mean == pytest.approx(float(expected), abs=4 * error + 1e-6)
    for found, expected, rare in ((bound.terms, bits, 0.02), (bound.squared_error, errors, 2.5e-4)):
        gap, error = (found.mean(0) - expected).abs(), found.std(0) / math.sqrt(len(found))
        assert bool((gap[2:] < 5 * error[2:]).all())
        assert (
            float(gap[:2].max()) < rare
        )  # at t = 0 and 1, fewer than one of 25,600 pixels is wrong on average, so the standard error means nothing
    assert torch.allclose(bound.distortion, bound.squared_error.mean(0).sqrt() * 127.5)
    assert float(bits.sum()) + float(prior(schedule, ((coins(400) / 127.5 - 1) ** 2).double().mean())) > 1


def test_more_steps_come_closer_to_the_entropy() -> None:
    """L_T + ... + L_1 encodes x_1, which reveals a pixel's value, so the sum approaches one bit from above as T grows.

    The decoder's own bits stay, because its variance is fixed whatever x_1 reveals.
    """
    excess = []
    for steps in (10, 40, 160):
        schedule = NoiseSchedule.named("cosine", steps)
        bits, _ = coin_bound(schedule, "fixed_small")
        excess.append(float(bits[1:].sum() + prior(schedule, ((coins(400) / 127.5 - 1) ** 2).double().mean())) - 1)
    assert all(0 < later < earlier / 3 for earlier, later in pairwise(excess))
    assert excess[-1] < 0.04


@pytest.mark.parametrize("times", [2, 5, 17])
def test_a_few_times_estimate_the_whole_sum(times: int) -> None:
    """The estimate is unbiased, and its standard error equals its spread over seeds.

    With other seeds, the test would fail by chance in about 1 of 2,000 runs (the spread of 40 estimates; 4 standard errors of
    their mean).
    """
    schedule = NoiseSchedule.named("cosine", 50)
    denoiser, images = coin_denoiser(schedule), coins(120)
    runs = [
        variational_bound(denoiser, images, seed=seed, times=times, variance="fixed_small") for seed in range(1, 41)
    ]
    found = torch.tensor([mean_and_error(run.total) for run in runs], dtype=torch.float64)
    bits, _ = coin_bound(schedule, "fixed_small")
    expected = float(bits.sum() + prior(schedule, (images / 127.5 - 1).square().double().mean()))
    # 6 standard errors, since the distribution is skewed: with 2 times, 1 of 800 runs exceeds 4 standard errors
    assert bool((abs(found[:, 0] - expected) < 6 * found[:, 1]).all())
    assert float(found[:, 0].mean()) == pytest.approx(expected, abs=4 * float(found[:, 1].mean()) / math.sqrt(40))
    assert 0.6 < float(found[:, 0].std() / found[:, 1].mean()) < 1.5
    assert all(len(run.strata) == times for run in runs)


@given(st.integers(2, 1500), st.data())
def test_strata_are_all_times_once(T: int, data: st.DataObject) -> None:
    times = data.draw(st.integers(2, T))
    parts = strata(T, times)
    assert len(parts) == times and parts[0] == range(1)
    assert [t for part in parts for t in part] == list(range(T))
    assert strata(T) == [range(t, t + 1) for t in range(T)]


def test_rate_grows_and_distortion_falls() -> None:
    """For an exact denoiser, every step adds bits and improves the image (Ho et al. 2020, figure 5).

    With another seed, the test would fail by chance in fewer than 1 of 1,000 runs: none of 50 seeds came near a limit.
    """
    schedule = NoiseSchedule.named("cosine", 100)
    bound = variational_bound(coin_denoiser(schedule), coins(300))
    reverse_rate = bound.rate.flip(0)
    assert float(reverse_rate[0]) == pytest.approx(float(bound.prior.mean()), rel=1e-9)
    assert bool((reverse_rate.diff() > 0).all())
    assert float(bound.rate[0] + bound.decoder.mean()) == pytest.approx(float(bound.total.mean()), rel=1e-12)
    smooth = bound.distortion.unfold(0, 5, 5).mean(1)
    assert bool((smooth.diff() >= 0).all())
    assert (
        float(bound.distortion[-1]) == pytest.approx((HIGH - LOW) / 2, rel=0.02) and float(bound.distortion[0]) < 1e-3
    )
    thinned = variational_bound(coin_denoiser(schedule), coins(300), times=20)
    middle = [(part.start + part.stop - 1) / 2 for part in thinned.strata]
    between = np.interp(middle, np.arange(100), bound.rate.numpy())
    np.testing.assert_allclose(thinned.rate.numpy(), between, atol=0.06)


def test_nothing_depends_on_the_batch_and_all_on_the_seed() -> None:
    denoiser, images = coin_denoiser(NoiseSchedule.named("linear", 30)), coins(11)
    whole, split = (variational_bound(denoiser, images, times=7, batch=batch) for batch in (11, 4))
    other = variational_bound(denoiser, images, times=7, batch=11, seed=1)
    assert torch.equal(whole.total, split.total) and torch.equal(whole.squared_error, split.squared_error)
    assert not torch.equal(whole.total, other.total)
    assert torch.equal(variational_bound(denoiser, images[:5], times=7).total, whole.total[:5])


def test_clipping_lowers_the_bound_of_a_wild_network() -> None:
    """Clamping x0_hat brings every step's mean closer to the true mean, because x_0 lies in [-1, 1]."""
    schedule = NoiseSchedule.named("linear", 30)
    plain, clipped = (
        variational_bound(Denoiser(lambda x, t: 3 * x, schedule, "x0", clip=clip), coins(10)) for clip in (False, True)
    )
    assert bool((clipped.terms <= plain.terms).all()) and bool((clipped.kl < plain.kl).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: strata(10, 1), "times = 1 must lie between 2 and T = 10"),
        (lambda: strata(10, 11), "times = 11"),
        (
            lambda: reverse_log_variance(NoiseSchedule.named("linear", 5), torch.arange(5), "large"),
            "no variance 'large'",
        ),
        (lambda: reverse_log_variance(NoiseSchedule.named("linear", 1), torch.arange(1)), "at least T = 2"),
    ],
)
def test_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_network_computes_in_float32_on_a_gpu_too() -> None:
    """The network does not run in TF32, and the earlier settings of torch are restored."""
    schedule = NoiseSchedule.named("linear", 30)
    seen: set[tuple[bool, str]] = set()
    cudnn = torch.backends.cudnn

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.add((cudnn.allow_tf32, cudnn.fp32_precision))
        return x

    before = cudnn.allow_tf32, cudnn.fp32_precision
    variational_bound(Denoiser(net, schedule, "x0"), coins(4), times=3)
    assert seen == {(False, "ieee")}
    assert (cudnn.allow_tf32, cudnn.fp32_precision) == before
