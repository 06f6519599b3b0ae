"""The variational bound on -log2 p(x_0), in bits per dimension: eq. 5 of Ho et al. 2020.

L = L_T + sum_{t=2}^T L_{t-1} + L_0, where L_T = KL(q(x_T|x_0) || N(0, I)), L_{t-1} = KL(q(x_{t-1}|x_t, x_0) ||
p(x_{t-1}|x_t)) between two Gaussians, and L_0 = -log p(x_0|x_1) with the discretised decoder of eq. 13. Each term is an
expectation over x_t ~ q(x_t|x_0), estimated with one seeded draw per image.

Network time t = 0 gives L_0, and t = 1 ... T-1 gives the paper's L_t. Everything outside the network is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.forward import prior
from ddpm.diffusion.gaussian import discretised_log_likelihood, gaussian_kl
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.schedule import NoiseSchedule

VARIANCES = ("fixed_large", "fixed_small")


def reverse_log_variance(
    schedule: NoiseSchedule, t: Tensor, variance: str = "fixed_large", v: Tensor | None = None
) -> Tensor:
    """Returns the log variance of p(x_{t-1}|x_t) at timesteps t: float64, shaped like t, or like v if v is given.

    At t = 0 the posterior variance beta_tilde is 0, and the decoder would have no width. So at t = 0, both fixed variances
    are beta_tilde of t = 1, as in Ho et al.'s code.

    Args:
        schedule: the noise schedule, with T >= 2.
        t: int64 [B] in 0 ... T-1.
        variance: "fixed_large" for beta, "fixed_small" for beta_tilde; ignored if v is given.
        v: [B, ...] in [0, 1], for the learned variance beta^v beta_tilde^(1 - v): eq. 15 of Nichol & Dhariwal 2021.

    Raises:
        ValueError: the variance is unknown, or T < 2.
    """
    if variance not in VARIANCES:
        raise ValueError(f"no variance '{variance}'; there are {', '.join(VARIANCES)}")
    large, small = schedule.betas.log(), _posterior_log_variance(schedule)
    if v is None:
        table = torch.cat([small[:1], large[1:]]) if variance == "fixed_large" else small
        return table.to(t.device)[t]
    large, small = (_broadcast(table.to(t.device)[t], v) for table in (large, small))
    return v * large + (1 - v) * small


def _posterior_log_variance(schedule: NoiseSchedule) -> Tensor:
    """Returns log beta_tilde (eq. 7 of Ho et al. 2020), float64 [T]. The entry at t = 0 repeats the entry at t = 1."""
    if schedule.T < 2:
        raise ValueError(f"the variational bound takes a schedule of at least T = 2 steps (given: T = {schedule.T})")
    small = schedule.posterior_at(torch.arange(schedule.T))[2]
    return torch.cat([small[1:2], small[1:]])


def term(
    schedule: NoiseSchedule,
    t: Tensor,
    x_0: Tensor,
    x0_hat: Tensor,
    variance: str = "fixed_large",
    v: Tensor | None = None,
) -> Tensor:
    """Returns one term of the bound for each image, in bits/dim: float64 [B].

    The term is L_0 if all times are 0, and L_t if no time is 0. A batch must not mix the two.

    Args:
        schedule: the noise schedule, with T >= 2.
        t: int64 [B], timesteps. If t lies on the CPU, the test for t = 0 does not synchronise the GPU.
        x_0: the images, float64 [B, ...]. For L_0, the values must be the 256 levels of an 8-bit image, in [-1, 1].
        x0_hat: the denoiser's estimate, like x_0.
        variance: see `reverse_log_variance`.
        v: see `reverse_log_variance`.

    Raises:
        ValueError: the variance is unknown, or T < 2.
    """
    log_variance = reverse_log_variance(schedule, t, variance, v)
    if v is None:
        log_variance = _broadcast(log_variance, x_0)
    if not bool(t.any()):
        nats = -discretised_log_likelihood(x_0, x0_hat, log_variance)
    else:
        weight, posterior = (
            _broadcast(table.to(t.device)[t], x_0)
            for table in (schedule.posterior_at(torch.arange(schedule.T))[0], _posterior_log_variance(schedule))
        )
        # Both means contain the same multiple of x_t (eq. 7). That part cancels and is left out.
        nats = gaussian_kl(weight * x_0, posterior, weight * x0_hat, log_variance)
    return nats.flatten(1).mean(1) / math.log(2)


def _broadcast(values: Tensor, images: Tensor) -> Tensor:
    """Shapes values [B] to broadcast with images [B, ...], and moves them to the images' device without blocking."""
    return values.to(images.device, non_blocking=images.device.type == "cuda").view(-1, *[1] * (images.ndim - 1))


def strata(T: int, times: int | None = None) -> list[range]:
    """Splits the timesteps 0 ... T-1 into `times` consecutive ranges. None means one range per time.

    The first range contains only 0. The edges of the other ranges grow quadratically, since most bits are spent near the
    image, at small t. Raises ValueError unless 2 <= times <= T.
    """
    times = T if times is None else times
    if not 2 <= times <= T:
        raise ValueError(f"times = {times} must lie between 2 and T = {T}")
    edges = [1 + max(k, (T - 1) * k * k // (times - 1) ** 2) for k in range(times)]
    return [range(1), *(range(first, after) for first, after in pairwise(edges))]


@dataclass(frozen=True)
class Bound:
    """The bound of N images on S strata of times, in bits/dim: float64, on the CPU.

    Args:
        prior: [N], the term L_T.
        terms: [N, S], the estimated sum of the terms in each stratum. The first stratum holds L_0.
        squared_error: [N, S], the mean of (x0_hat - x_0)^2 over an image with values in [-1, 1], at the time drawn from
            each stratum.
        strata: S ranges of timesteps, from the function `strata`.
    """

    prior: Tensor
    terms: Tensor
    squared_error: Tensor
    strata: list[range]

    @property
    def decoder(self) -> Tensor:
        """The decoder's term L_0, [N]."""
        return self.terms[:, 0]

    @property
    def kl(self) -> Tensor:
        """The sum of the KL terms, L_1 + ... + L_{T-1}: [N]."""
        return self.terms[:, 1:].sum(1)

    @property
    def total(self) -> Tensor:
        """The whole bound L, [N]."""
        return self.prior + self.terms.sum(1)

    @property
    def rate(self) -> Tensor:
        """The rate of x_t in bits/dim, L_T + ... + L_{t+1}, at the middle timestep t of each stratum: float64 [S].

        Figure 5 of Ho et al. 2020 shows this rate. It does not include L_0, the decoder's bits, which encode x_0 itself.
        """
        mean = self.terms.mean(0)
        before = self.prior.mean() + mean.flip(0).cumsum(0).flip(0) - mean
        size = torch.tensor([len(stratum) for stratum in self.strata], dtype=torch.float64)
        return before + mean * (size - 1) / (2 * size)

    @property
    def distortion(self) -> Tensor:
        """The root mean squared error of x0_hat in each stratum of timesteps, on the scale 0 ... 255: float64 [S]."""
        return self.squared_error.mean(0).sqrt() * 127.5


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Returns the mean of independent values [N] and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@torch.inference_mode()
def variational_bound(
    denoiser: Denoiser,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    times: int | None = None,
    batch: int = 256,
    variance: str = "fixed_large",
    device: torch.device | str = "cpu",
    done: Callable[[int], None] = lambda count: None,
) -> Bound:
    """Estimates the variational bound on -log2 p(x_0) of each image: eq. 5 of Ho et al. 2020.

    If `times` is less than T, the T timesteps are split into `times` ranges (see `strata`). For each image, one network
    time is drawn from each range. The estimate of each image stays unbiased, and the standard error over images includes the
    randomness of the draws.

    Args:
        denoiser: the model.
        images: uint8 [N, C, H, W].
        labels: int64 [N], for a conditional network.
        seed: the seed of noise and times, which depend on (seed, image, stratum) and not on `batch`.
        times: the number of network evaluations per image, 2 ... T. None evaluates all T times.
        batch: the number of images in a batch.
        variance: one of VARIANCES; ignored if the network has a learned variance.
        device: the device of the network.
        done: called as done(n) whenever n images have finished one stratum.

    Returns:
        The terms of the bound in bits/dim.

    Raises:
        ValueError: `times`, `variance` or the number of labels is wrong, or T < 2.
    """
    schedule, parts = denoiser.schedule, strata(denoiser.schedule.T, times)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(images), len(parts), generator=generator, dtype=torch.float64)
    first, size = (torch.tensor([f(part) for part in parts]) for f in (lambda part: part.start, len))
    drawn = first + (uniform * size).long()  # [N, S]
    terms, squared_error = torch.zeros(2, *drawn.shape, dtype=torch.float64)
    bound = Bound(torch.zeros(len(images), dtype=torch.float64), terms, squared_error, parts)
    a, s = schedule.alpha_bar.sqrt(), (-torch.expm1(schedule.log_alpha_bar)).sqrt()
    for start in range(0, len(images), batch):
        rows = range(start, min(start + batch, len(images)))
        x_0 = images[start : rows.stop].to(device, torch.float64) / 127.5 - 1
        bound.prior[start : rows.stop] = prior(schedule, x_0.square().flatten(1).mean(1).cpu())
        labelled = denoiser if labels is None else replace(denoiser, labels=labels[start : rows.stop].to(device))
        bits, errors = torch.empty(2, len(rows), len(parts), dtype=torch.float64, device=device)
        for stratum in range(len(parts)):
            t = drawn[start : rows.stop, stratum]
            eps = gaussian(seed, rows, stratum, x_0.shape[1:], device)
            signal, noise = (_broadcast(table[t + 1], x_0) for table in (a, s))
            x_t = (signal * x_0 + noise * eps).to(torch.float32, memory_format=torch.channels_last)
            # By default, cuDNN may round float32 to TF32.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, fp32_precision="ieee"):
                x0_hat, v = labelled.with_variance(x_t, t)
            x0_hat, v = x0_hat.double(), None if v is None else v.double()
            bits[:, stratum] = term(schedule, t, x_0, x0_hat, variance, v) * len(parts[stratum])
            errors[:, stratum] = (x0_hat - x_0).square().flatten(1).mean(1)
            done(len(rows))
        bound.terms[start : rows.stop], bound.squared_error[start : rows.stop] = bits.cpu(), errors.cpu()
    return bound
