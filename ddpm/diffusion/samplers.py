"""Samples images from noise, along any falling sequence of network times.

A sampler gets the denoiser (x_t, t) -> x0_hat and the noise levels to visit. It yields (x, x0_hat) after each step.
With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), x_t = a_t x_0 + s_t eps, and every sampler ends at alpha_bar = 1.
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
    """Counts a denoiser's network evaluations per image: the `denoise` that `trajectory` passes to a sampler."""

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
    """A noise level: network time t (-1 is the clean image) and alpha_bar there."""

    t: float
    alpha_bar: float

    @property
    def a(self) -> float:
        """sqrt(alpha_bar), the factor of x_0."""
        return math.sqrt(self.alpha_bar)

    @property
    def s(self) -> float:
        """sqrt(1 - alpha_bar), the factor of eps."""
        return math.sqrt(1 - self.alpha_bar)

    @property
    def lam(self) -> float:
        """Half the log signal-to-noise ratio, log(a / s): lambda of Lu et al. 2022."""
        if self.alpha_bar in (0, 1):
            return -math.inf if self.alpha_bar == 0 else math.inf
        return (math.log(self.alpha_bar) - math.log1p(-self.alpha_bar)) / 2


@dataclass(frozen=True)
class State:
    """The state of a chain after a step.

    Args:
        k: number of the step, 0 ... S-1.
        x: the images at the level reached, [B, ...].
        x0_hat: the estimate of the clean images that the step used, like x.
        evaluations: network evaluations per image so far.
    """

    k: int
    x: Tensor
    x0_hat: Tensor
    evaluations: int


Steps = Iterator[tuple[Tensor, Tensor]]  # (x, x0_hat) after each step


def ddpm(denoise: Counted, x: Tensor, levels: list[Level], noise: Noise, *, variance: str = "fixed_large") -> Steps:
    """Algorithm 2 of Ho et al. 2020 on the respaced chain, with the posterior mean of eq. 7.

    With beta = 1 - alpha_bar_t / alpha_bar_prev, the variance is beta for fixed_large. For fixed_small it is
    beta (1 - alpha_bar_prev) / (1 - alpha_bar_t). For learned, the network interpolates between the two: eq. 15 of
    Nichol & Dhariwal 2021. The last step adds no noise. Raises ValueError for another variance, or for learned if the
    network has none.
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
    """Eq. 12 and 16 of Song et al. 2020 (DDIM). eta = 0 is deterministic; eta = 1 has DDPM's fixed_small variance."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta} must lie in [0, 1]")
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        sigma2 = eta**2 * (1 - to.alpha_bar) / (1 - now.alpha_bar) * (1 - now.alpha_bar / to.alpha_bar)
        # The factor of eps = (x - a x0_hat) / s, derived from the clipped x0_hat.
        direction = math.sqrt(max(1 - to.alpha_bar - sigma2, 0)) / now.s
        x = (to.a - direction * now.a) * x0_hat + direction * x
        if sigma2 > 0:
            x = x + math.sqrt(sigma2) * noise(k)
        yield x, x0_hat


def flow(x: Tensor, x0_hat: Tensor, now: Level, to: Level) -> Tensor:
    """Follows the probability flow with x0_hat held constant: DDIM's step, exact if the data is a single image."""
    ratio = to.s / now.s
    return ratio * x + (to.a - ratio * now.a) * x0_hat


def euler(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Euler's method on the probability-flow ODE: eq. 1 of Karras et al. 2022, sigma = s / a. DDIM at eta = 0."""
    for now, to in pairwise(levels):
        x0_hat = denoise(x, now.t)
        x = flow(x, x0_hat, now, to)
        yield x, x0_hat


def heun(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Algorithm 1 of Karras et al. 2022: second order, with 2S - 1 network evaluations, or 2S - 2 from pure noise.

    With sigma = s / a, the mean of the slopes at both ends of a step gives

        x / a = x0_hat + sigma_to slope + w (x0_hat' - x0_hat),    w = (sigma / sigma_to - 1) / 2,

    where x0_hat' is the estimate at the end. From almost pure noise (cosine, trailing: sigma = 2e4 to 12 at S = 20), w
    would multiply the error of x0_hat' by a thousand. So w is at most 1; steps with sigma <= 3 sigma_to are the paper's.
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
    """Returns whether Heun's step has a second evaluation: not from pure noise, and not onto the clean image."""
    return 0 < to.alpha_bar < 1 and now.alpha_bar > 0


def _too_far(before: float, now: Level, levels: list[Level], k: int) -> bool:
    """Returns whether step k is too long to extrapolate over.

    That is a step onto the last noisy level, more than twice as long in half log-SNR as the step from `before` to
    `now`. `leading` and `linspace` end with a step three to six times as long as the one before it.
    """
    return k == len(levels) - 3 and abs(levels[k + 1].lam - now.lam) > 2 * abs(now.lam - before)


def _multistep(
    denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise, order: int, stochastic: bool = False
) -> Steps:
    """DPM-Solver++ (Lu et al. 2022b, algorithm 2, and their third-order form) in half log-SNR, from past x0_hats.

    The first steps have lower order, since there is no past yet. The last step has order 1, since it is infinite in
    log-SNR. The step before it has order 1 if it is too long to extrapolate over (see _too_far).
    """
    past: list[tuple[float, Tensor]] = []  # (lambda, x0_hat), newest first
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        h = to.lam - now.lam
        usable = [] if math.isinf(h) else [(now.lam - lam, then) for lam, then in past if math.isfinite(lam)]
        if usable and _too_far(past[0][0], now, levels, k):
            usable = []
        phi_1 = -math.expm1(-(2 if stochastic else 1) * h)
        value = x0_hat  # the effective x0_hat of the step, extrapolated from the past
        if len(usable) >= 2 and order >= 3:
            (r0, then0), (r1, then1) = [(distance / h, then) for distance, then in usable[:2]]
            d0 = (x0_hat - then0) / r0
            d1 = (then0 - then1) / (r1 - r0)
            slope, curve = d0 + r0 / r1 * (d0 - d1), (d0 - d1) / r1
            # The quadratic through the three estimates, integrated exactly. (The authors' code gives the curvature half
            # this weight, and its measured order is 2.6 instead of 3.)
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
    """UniPC of Zhao et al. 2023 with B(h) = e^-h - 1 on x0_hat: each evaluation also corrects the step before it.

    As in _multistep, a step onto the last noisy level has order 1 if it is too long to extrapolate over.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order = {order} must be 1, 2 or 3")
    past: list[tuple[Level, Tensor]] = []  # newest first
    before = x  # x at the newest entry of past
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        if past and math.isfinite(past[0][0].lam):
            x = _unipc_step(before, now, past[: min(order, k)], x0_hat)
        past = [(now, x0_hat), *past[: order - 1]]
        before = x
        near = len(past) > 1 and math.isfinite(past[1][0].lam) and _too_far(past[1][0].lam, now, levels, k)
        reach = 1 if to.s == 0 or near else min(order, k + 1)
        x = _unipc_step(before, to, past[:reach], None)
        yield x, x0_hat


def _unipc_step(x: Tensor, to: Level, past: list[tuple[Level, Tensor]], x0_hat_to: Tensor | None) -> Tensor:
    """Takes a step from past[0] to `to`: UniP, or UniC if x0_hat at `to` is known (eq. 8 and 9 of Zhao et al. 2023)."""
    (now, x0_hat), *older = past
    h = to.lam - now.lam
    older = [(level, then) for level, then in older if math.isfinite(level.lam)]
    nodes = [((level.lam - now.lam) / h, then - x0_hat) for level, then in older]
    if x0_hat_to is not None:
        nodes.append((1.0, x0_hat_to - x0_hat))
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
    # For a single node the paper takes the weight 1/2, which keeps the order.
    several = len(nodes) > 1
    weights = torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist() if several else [0.5]
    for (r, difference), weight in zip(nodes, weights, strict=True):
        x = x - (to.a * b * weight / r) * difference
    return x


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS: everything that the rest of the project knows about a sampler.

    Args:
        step: step(denoise, x, levels, noise, **options) yields (x, x0_hat) after each step. Its keyword-only arguments
            are the sampler's options.
        deterministic: maps all options, defaults included, to whether the sampler draws no noise. Then each image has
            one code.
        evaluations: maps the levels to the network evaluations per image from the first to the last, without guidance.
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
        """Returns whether the sampler draws noise with these options."""
        return not self.deterministic({**self.options, **options})


def _always_draws(options: Mapping[str, Any]) -> bool:
    return False


# name -> row
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
    """Raises ValueError for an unknown sampler or spacing, or an option that the sampler does not take."""
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
    """Returns the levels that a sampler visits, from noise to the clean image.

    Args:
        schedule: the schedule that the network was trained on.
        steps: S.
        spacing: a key of SPACINGS.
        along: another schedule whose noise levels are visited. The network is evaluated at its own, possibly
            fractional, times of the same signal-to-noise ratios. Levels outside its training become its first or last
            one, and levels that coincide are visited once, so there may be fewer than `steps`.

    Returns:
        S levels or fewer, and the clean image.

    Raises:
        ValueError: the spacing is unknown, or cannot give so many different levels.
    """
    if along is None:
        times = network_times(schedule, steps, spacing)
        log_alpha_bar = schedule.log_alpha_bar_at(times)
        # If a schedule ends without signal, there is no signal at fractional times after T-2 either.
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
    """Returns the network evaluations per image of `sample` with these settings. Guidance doubles the number."""
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
    """Yields the State after each step of `sample`, which has the same arguments.

    Unlike `sample`, it does not disable gradients.
    """
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
    """Draws images from noise.

    Args:
        denoiser: the model.
        x_T: standard normal noise, [B, ...].
        sampler: a key of SAMPLERS.
        steps: S, the number of network times to visit.
        spacing: which times, a key of SPACINGS.
        noise: noise(k) -> standard normal tensor like x_T for step k, for samplers that draw noise; by default
            torch.randn_like.
        along: visits the noise levels of this schedule instead of the network's own (see `noise_levels`).
        options: the sampler's own: `variance` of ddpm, `eta` of ddim, `order` of unipc.

    Returns:
        x_0, like x_T.

    Raises:
        ValueError: a name is unknown, the sampler does not take an option, or a number is out of range.
    """
    x = x_T
    for state in trajectory(denoiser, x_T, sampler, steps, spacing, noise, along, **options):
        x = state.x
    return x
