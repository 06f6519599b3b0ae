"""From noise to images, along any falling sequence of network times.

A sampler sees the denoiser (x_t, t) -> x0_hat and the noise levels it visits, and yields a State after each step. With
a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), x_t = a_t x_0 + s_t eps, and every sampler ends at alpha_bar = 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddpm.denoiser import Denoiser
from ddpm.timesteps import SPACINGS, network_times

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Level:
    """A noise level on the way: network time t (-1 is the clean image) and alpha_bar there."""

    t: float
    alpha_bar: float

    @property
    def a(self) -> float:
        return math.sqrt(self.alpha_bar)

    @property
    def s(self) -> float:
        return math.sqrt(1 - self.alpha_bar)


@dataclass(frozen=True)
class State:
    """After step k = 0 ... S-1: x at the level reached, x0_hat that led there, and the network evaluations so far."""

    k: int
    x: Tensor
    x0_hat: Tensor
    evaluations: int


Steps = Iterator[tuple[Tensor, Tensor]]  # (x, x0_hat) after each step


def ddpm(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise, *, variance: str = "fixed_large") -> Steps:
    """Algorithm 2 of Ho et al. 2020 on the respaced chain, with the posterior mean of eq. 7.

    beta = 1 - alpha_bar_t / alpha_bar_prev; the variance is beta (fixed_large) or beta (1 - alpha_bar_prev) /
    (1 - alpha_bar_t) (fixed_small). The last step adds no noise.
    """
    if variance not in ("fixed_large", "fixed_small"):
        raise ValueError(f"no variance '{variance}'; there are fixed_large, fixed_small")
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        beta = 1 - now.alpha_bar / to.alpha_bar
        shrink = (1 - to.alpha_bar) / (1 - now.alpha_bar)
        x = (to.a * beta / (1 - now.alpha_bar)) * x0_hat + (now.a / to.a * shrink) * x
        if to.alpha_bar < 1:
            x = x + math.sqrt(beta if variance == "fixed_large" else beta * shrink) * noise(k)
        yield x, x0_hat


def ddim(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise, *, eta: float = 0.0) -> Steps:
    """Eq. 12 and 16 of Song et al. 2020 (DDIM): eta = 0 is deterministic, eta = 1 has DDPM's fixed_small variance."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta} must lie in [0, 1]")
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        sigma2 = eta**2 * (1 - to.alpha_bar) / (1 - now.alpha_bar) * (1 - now.alpha_bar / to.alpha_bar)
        direction = math.sqrt(max(1 - to.alpha_bar - sigma2, 0)) / now.s  # eps = (x - a x0_hat) / s, derived again
        x = (to.a - direction * now.a) * x0_hat + direction * x
        if sigma2 > 0:
            x = x + math.sqrt(sigma2) * noise(k)
        yield x, x0_hat


SAMPLERS: dict[str, Callable[..., Steps]] = {"ddpm": ddpm, "ddim": ddim}


def check_options(sampler: str, spacing: str = "leading", **options: Any) -> None:
    """Raises ValueError for an unknown sampler or spacing, and for an option that the sampler doesn't take."""
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler '{sampler}'; there are {', '.join(SAMPLERS)}")
    if spacing not in SPACINGS:
        raise ValueError(f"no spacing '{spacing}'; there are {', '.join(SPACINGS)}")
    taken = [p.name for p in inspect.signature(SAMPLERS[sampler]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in taken:
            raise ValueError(f"sampler '{sampler}' takes no {option}; it takes {', '.join(['spacing', *taken])}")


def trajectory(
    denoiser: Denoiser,
    x_T: Tensor,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "leading",
    noise: Noise | None = None,
    **options: Any,
) -> Iterator[State]:
    """The states of `sample`, one after each of its S = steps steps; the caller shows, saves or stops."""
    check_options(sampler, spacing, **options)
    times = network_times(denoiser.schedule, steps, spacing)
    alpha_bar = denoiser.schedule.log_alpha_bar_at(times).exp()
    levels = [Level(*level) for level in zip(times.tolist(), alpha_bar.tolist(), strict=True)] + [Level(-1.0, 1.0)]
    evaluations = 0

    def denoise(x: Tensor, t: float) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return denoiser(x, t)

    draw = noise or (lambda k: torch.randn_like(x_T))
    for k, (x, x0_hat) in enumerate(SAMPLERS[sampler](denoise, x_T, levels, draw, **options)):
        yield State(k, x, x0_hat, evaluations)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x_T: Tensor,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "leading",
    noise: Noise | None = None,
    **options: Any,
) -> Tensor:
    """Images from noise.

    x_T: standard normal [B, ...]. sampler: a key of SAMPLERS, whose keyword-only arguments are the `options` (eta, variance).
    steps: S, the times visited, as `spacing` (a key of SPACINGS) picks them. noise: noise(k) -> a standard normal tensor
    like x_T for the k-th draw; default torch.randn. Returns x_0, like x_T. Raises ValueError.
    """
    x = x_T
    for state in trajectory(denoiser, x_T, sampler, steps, spacing, noise, **options):
        x = state.x
    return x
