"""From noise to images, along any falling sequence of network times.

A sampler sees the denoiser (x_t, t) -> x0_hat and the noise levels it visits, and yields a State after each step. With
a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), x_t = a_t x_0 + s_t eps, and every sampler ends at alpha_bar = 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.schedule import NoiseSchedule
from ddpm.diffusion.timesteps import SPACINGS, network_times

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]


class Counted:
    """A denoiser that counts its network evaluations, of an image: the `denoise` that `trajectory` gives to a sampler."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.evaluations = 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.evaluations += self.denoiser.evaluations
        return self.denoiser(x, t)

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        self.evaluations += self.denoiser.evaluations
        return self.denoiser.with_variance(x, t)


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

    @property
    def lam(self) -> float:
        """Half the log signal-to-noise ratio, log(a / s): lambda of Lu et al. 2022."""
        if self.alpha_bar in (0, 1):
            return -math.inf if self.alpha_bar == 0 else math.inf
        return (math.log(self.alpha_bar) - math.log1p(-self.alpha_bar)) / 2


@dataclass(frozen=True)
class State:
    """After step k = 0 ... S-1: x at the level reached, x0_hat that led there, and an image's network evaluations so far."""

    k: int
    x: Tensor
    x0_hat: Tensor
    evaluations: int


Steps = Iterator[tuple[Tensor, Tensor]]  # (x, x0_hat) after each step


def ddpm(denoise: Counted, x: Tensor, levels: list[Level], noise: Noise, *, variance: str = "fixed_large") -> Steps:
    """Algorithm 2 of Ho et al. 2020 on the respaced chain, with the posterior mean of eq. 7.

    beta = 1 - alpha_bar_t / alpha_bar_prev; the variance is beta (fixed_large) or beta (1 - alpha_bar_prev) /
    (1 - alpha_bar_t) (fixed_small), or lies between them where the network says (learned: eq. 15 of Nichol & Dhariwal 2021).
    The last step adds no noise.
    """
    fixed = {"fixed_large": 1.0, "fixed_small": 0.0}
    if variance not in (*fixed, "learned"):
        raise ValueError(f"no variance '{variance}'; there are {', '.join(fixed)}, learned")
    v: Tensor | float | None
    for k, (now, to) in enumerate(pairwise(levels)):
        if variance == "learned":
            x0_hat, v = denoise.with_variance(x, now.t)
        else:
            x0_hat, v = denoise(x, now.t), fixed[variance]
        if v is None:
            raise ValueError("variance learned: this network has learned no variance; take fixed_large or fixed_small")
        beta = 1 - now.alpha_bar / to.alpha_bar
        shrink = (1 - to.alpha_bar) / (1 - now.alpha_bar)
        x = (to.a * beta / (1 - now.alpha_bar)) * x0_hat + (now.a / to.a * shrink) * x
        if to.alpha_bar < 1:
            x = x + (beta * shrink ** (1 - v)) ** 0.5 * noise(k)
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


def flow(x: Tensor, x0_hat: Tensor, now: Level, to: Level) -> Tensor:
    """Along the probability flow while x0_hat stays as it is: DDIM's step, and exact for a single image."""
    ratio = to.s / now.s
    return ratio * x + (to.a - ratio * now.a) * x0_hat


def euler(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Euler's method on the probability-flow ODE of Karras et al. 2022, eq. 1 with sigma = s / a; the same as DDIM at eta = 0."""
    for now, to in pairwise(levels):
        x0_hat = denoise(x, now.t)
        x = flow(x, x0_hat, now, to)
        yield x, x0_hat


def heun(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Algorithm 1 of Karras et al. 2022: second order, two evaluations a step but the last: 2S - 1, from pure noise 2S - 2.

    With sigma = s / a the mean of the slopes here and there comes to x / a = x0_hat + sigma_to slope + w (x0_hat' - x0_hat),
    w = (sigma / sigma_to - 1) / 2. From almost pure noise (cosine, trailing: sigma = 2e4 to 12 at S = 20) such a w would multiply
    what x0_hat' errs a thousand times; it is bounded by 1, so steps of sigma <= 3 sigma_to are Karras' own.
    """
    for now, to in pairwise(levels):
        x0_hat = denoise(x, now.t)
        ahead = flow(x, x0_hat, now, to)
        x = ahead
        if _corrected(now, to):
            weight = min((now.s * to.a / (now.a * to.s) - 1) / 2, 1.0)
            x = ahead + to.a * weight * (denoise(ahead, to.t) - x0_hat)
        yield x, x0_hat


def _corrected(now: Level, to: Level) -> bool:
    """Whether Heun's step is corrected by a second evaluation: not from pure noise, nor onto the clean image."""
    return 0 < to.alpha_bar < 1 and now.alpha_bar > 0


def _far(before: float, now: Level, levels: list[Level], k: int) -> bool:
    """Whether step k leads onto the last noisy level and is more than twice as long, in half log-SNR, as the one from `before`.

    That far nothing is extrapolated: `leading` and `linspace` end with a step three to six times as long as the one before it.
    """
    return k == len(levels) - 3 and abs(levels[k + 1].lam - now.lam) > 2 * abs(now.lam - before)


def _multistep(
    denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise, order: int, stochastic: bool = False
) -> Steps:
    """DPM-Solver++ (Lu et al. 2022b, algorithm 2, and their third-order form) in half log-SNR, on past x0_hats.

    The first steps have lower order, for want of a past, and so has the last, whose step in log-SNR is infinite; the one
    before it, where the past is too near to extrapolate from (see _far).
    """
    past: list[tuple[float, Tensor]] = []  # (lambda, x0_hat), newest first
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        h = to.lam - now.lam
        usable = [] if math.isinf(h) else [(now.lam - lam, then) for lam, then in past if math.isfinite(lam)]
        if usable and _far(past[0][0], now, levels, k):
            usable = []
        phi_1 = -math.expm1(-(2 if stochastic else 1) * h)
        value = x0_hat  # what x0_hat amounts to over the step, extrapolated from the past
        if len(usable) >= 2 and order >= 3:
            (r0, then0), (r1, then1) = [(distance / h, then) for distance, then in usable[:2]]
            d0 = (x0_hat - then0) / r0
            d1 = (then0 - then1) / (r1 - r0)
            slope, curve = d0 + r0 / r1 * (d0 - d1), (d0 - d1) / r1
            # The quadratic through the three, integrated exactly. (The authors' code halves the curvature's weight,
            # and then the measured order is 2.6 instead of 3.)
            moment_1 = 1 - phi_1 / h
            moment_2 = 1 - 2 * moment_1 / h
            value = x0_hat + (moment_1 * slope + moment_2 * curve) / phi_1
        elif usable and order >= 2:
            distance, then = usable[0]
            value = x0_hat + (h / (2 * distance)) * (x0_hat - then)
        if stochastic:
            x = (to.s / now.s * math.exp(-h)) * x + (to.a * phi_1) * value
            if to.s > 0:
                x = x + to.s * math.sqrt(phi_1) * noise(k)
        else:
            x = (to.s / now.s) * x + (to.a * phi_1) * value
        past = [(now.lam, x0_hat), *past[:1]]
        yield x, x0_hat


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """DPM-Solver++ 2M of Lu et al. 2022b: second order, one evaluation a step."""
    return _multistep(denoise, x, levels, noise, order=2)


def dpmpp_3m(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """DPM-Solver++ 3M: third order, one evaluation a step."""
    return _multistep(denoise, x, levels, noise, order=3)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """SDE-DPM-Solver++ 2M of Lu et al. 2022b: the reverse SDE, with fresh noise at every step but the last."""
    return _multistep(denoise, x, levels, noise, order=2, stochastic=True)


def unipc(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise, *, order: int = 3) -> Steps:
    """UniPC of Zhao et al. 2023 with B(h) = e^h - 1 on x0_hat: each evaluation also corrects the step that led to it.

    As in _multistep, nothing is extrapolated onto the last noisy level where the past is too near.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order = {order} must be 1, 2 or 3")
    past: list[tuple[Level, Tensor]] = []  # newest first
    before = x  # x at the newest entry of past
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        if past and math.isfinite(past[0][0].lam):
            x = _unified(before, now, past[: min(order, k)], x0_hat)
        past = [(now, x0_hat), *past[: order - 1]]
        before = x
        near = len(past) > 1 and math.isfinite(past[1][0].lam) and _far(past[1][0].lam, now, levels, k)
        reach = 1 if to.s == 0 or near else min(order, k + 1)
        x = _unified(before, to, past[:reach], None)
        yield x, x0_hat


def _unified(x: Tensor, to: Level, past: list[tuple[Level, Tensor]], there: Tensor | None) -> Tensor:
    """One step of UniP (there = None) or UniC (there = x0_hat at `to`) from past[0]; eq. 8 and 9 of Zhao et al. 2023."""
    (now, x0_hat), *older = past
    h = to.lam - now.lam
    older = [(level, then) for level, then in older if math.isfinite(level.lam)]
    nodes = [((level.lam - now.lam) / h, then - x0_hat) for level, then in older]
    if there is not None:
        nodes.append((1.0, there - x0_hat))
    x = flow(x, x0_hat, now, to)
    if not nodes:
        return x
    # Weights that integrate the polynomial through the nodes against e^-h exactly; B(h) = e^-h - 1.
    b = math.expm1(-h)
    phi, right, factorial = b / -h - 1, [], 1.0
    for power in range(1, len(nodes) + 1):
        right.append(phi * factorial / b)
        factorial *= power + 1
        phi = phi / -h - 1 / factorial
    matrix = torch.tensor([[r**power for r, _ in nodes] for power in range(len(nodes))], dtype=torch.float64)
    # A single weight of 1/2 is the paper's choice, and keeps the order.
    several = len(nodes) > 1
    weights = torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist() if several else [0.5]
    for (r, difference), weight in zip(nodes, weights, strict=True):
        x = x - (to.a * b * weight / r) * difference
    return x


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS: everything that the rest of the project knows of a sampler.

    step: (denoise, x, levels, noise, **options) -> (x, x0_hat) after each step. Its keyword-only arguments are the options.
    deterministic: options -> whether it draws no noise, so that each image has one code. It gets every option, defaults too.
    evaluations: levels -> the network evaluations of an image on the way from levels[0] to levels[-1], without guidance.
    """

    step: Callable[..., Steps]
    deterministic: Callable[[Mapping[str, Any]], bool] = lambda options: True
    evaluations: Callable[[Sequence[Level]], int] = lambda levels: len(levels) - 1

    @property
    def options(self) -> dict[str, Any]:
        """The sampler's own options and their defaults."""
        parameters = inspect.signature(self.step).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

    def draws_noise(self, **options: Any) -> bool:
        """Whether it draws noise of its own with these options."""
        return not self.deterministic({**self.options, **options})


def _always_draws(options: Mapping[str, Any]) -> bool:
    return False


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, deterministic=_always_draws),
    "ddim": Sampler(ddim, deterministic=lambda options: options["eta"] == 0),
    "euler": Sampler(euler),
    "heun": Sampler(heun, evaluations=lambda levels: sum(1 + _corrected(now, to) for now, to in pairwise(levels))),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "dpmpp_3m": Sampler(dpmpp_3m),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, deterministic=_always_draws),
    "unipc": Sampler(unipc),
}


def check_options(sampler: str, spacing: str = "leading", **options: Any) -> None:
    """Raises ValueError for an unknown sampler or spacing, and for an option that the sampler doesn't take."""
    if sampler not in SAMPLERS:
        raise ValueError(f"no sampler '{sampler}'; there are {', '.join(SAMPLERS)}")
    if spacing not in SPACINGS:
        raise ValueError(f"no spacing '{spacing}'; there are {', '.join(SPACINGS)}")
    taken = SAMPLERS[sampler].options
    for option in options:
        if option not in taken:
            raise ValueError(f"sampler '{sampler}' takes no {option}; it takes {', '.join(['spacing', *taken])}")


def noise_levels(
    schedule: NoiseSchedule, steps: int, spacing: str = "leading", along: NoiseSchedule | None = None
) -> list[Level]:
    """The levels a sampler visits, from noise to the clean image, at the network times of `schedule`.

    along: another schedule, whose times `spacing` picks. The network is asked at its own, possibly fractional, time of the
    same signal-to-noise ratio. Levels beyond those it was trained on become its first or last one, and levels that
    coincide are visited once, so there may be fewer than `steps`. Raises ValueError.
    """
    if along is None:
        times = network_times(schedule, steps, spacing)
        log_alpha_bar = schedule.log_alpha_bar_at(times)
        # Between the last two times of a schedule that ends without signal there is none either.
        if int((log_alpha_bar == -math.inf).sum()) > 1:
            raise ValueError(f"spacing '{spacing}' cannot make {steps} different noise levels of T = {schedule.T}")
    else:
        wanted = along.log_alpha_bar_at(network_times(along, steps, spacing))
        log_alpha_bar = wanted.clamp(schedule.log_alpha_bar[-1], schedule.log_alpha_bar[1]).unique().sort().values
        times = schedule.time_at(log_alpha_bar).clamp(0, schedule.T - 1)
    visited = zip(times.tolist(), log_alpha_bar.exp().tolist(), strict=True)
    return [Level(*level) for level in visited] + [Level(-1.0, 1.0)]


def evaluations(
    schedule: NoiseSchedule,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "leading",
    along: NoiseSchedule | None = None,
    **options: Any,
) -> int:
    """Returns how many network evaluations `sample` takes of an image with these settings. Guidance doubles them."""
    check_options(sampler, spacing, **options)
    return SAMPLERS[sampler].evaluations(noise_levels(schedule, steps, spacing, along))


def trajectory(
    denoiser: Denoiser,
    x_T: Tensor,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "leading",
    noise: Noise | None = None,
    along: NoiseSchedule | None = None,
    **options: Any,
) -> Iterator[State]:
    """The states of `sample`, one after each of its steps; the caller shows, saves or stops."""
    check_options(sampler, spacing, **options)
    levels = noise_levels(denoiser.schedule, steps, spacing, along)
    denoise = Counted(denoiser)
    draw = noise or (lambda k: torch.randn_like(x_T))
    for k, (x, x0_hat) in enumerate(SAMPLERS[sampler].step(denoise, x_T, levels, draw, **options)):
        yield State(k, x, x0_hat, denoise.evaluations)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x_T: Tensor,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "leading",
    noise: Noise | None = None,
    along: NoiseSchedule | None = None,
    **options: Any,
) -> Tensor:
    """Images from noise.

    x_T: standard normal [B, ...]. sampler: a key of SAMPLERS; `options` are its own (eta, variance, order).
    steps: S, the times visited, as `spacing` (a key of SPACINGS) picks them. noise: noise(k) -> a standard normal tensor
    like x_T for the k-th draw; default torch.randn. along: visit the noise levels of this schedule instead of the
    network's own (see `noise_levels`). Returns x_0, like x_T. Raises ValueError.
    """
    x = x_T
    for state in trajectory(denoiser, x_T, sampler, steps, spacing, noise, along, **options):
        x = state.x
    return x
