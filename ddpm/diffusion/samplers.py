"""Samples images from noise, along any falling sequence of timesteps.

A sampler is a function of these arguments, which yields (x, x0_hat) after each step:

- denoise: the denoiser (x_t, t) -> x0_hat, which counts its evaluations (`Counted`).
- x: the images at the first level, [B, ...]; standard normal noise to draw new images.
- levels: the noise levels to visit, from noise to the clean image, where alpha_bar = 1.
- noise: noise(k) -> standard normal tensor like x, for step k.
- the sampler's own options, as keyword-only arguments.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), x_t = a_t x_0 + s_t eps.
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

from ddpm.diffusion import solvers
from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.schedule import NoiseSchedule
from ddpm.diffusion.solvers import Denoise, Noise, Steps
from ddpm.diffusion.timesteps import SPACINGS, Level, Times, noise_levels


class Counted:
    """Wraps a denoiser and counts its network evaluations per image. `trajectory` passes it to a sampler as `denoise`."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.evaluations = 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.evaluations += self.denoiser.evaluations(t)
        return self.denoiser(x, t)

    def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        self.evaluations += self.denoiser.evaluations(t)
        return self.denoiser.with_variance(x, t)


@dataclass(frozen=True)
class State:
    """The state of a chain after a step.

    Args:
        k: the index of the step, 0 ... S-1.
        x: the images at the noise level that the step reached, [B, ...].
        x0_hat: the estimate of the clean images that the step used, like x.
        evaluations: network evaluations per image so far.
    """

    k: int
    x: Tensor
    x0_hat: Tensor
    evaluations: int


def ddpm(denoise: Counted, x: Tensor, levels: list[Level], noise: Noise, *, variance: str = "fixed_large") -> Steps:
    """Samples by algorithm 2 of Ho et al. 2020 on the respaced chain, with the posterior mean of eq. 7.

    With beta = 1 - alpha_bar_t / alpha_bar_prev, the variance is beta for fixed_large, and
    beta (1 - alpha_bar_prev) / (1 - alpha_bar_t) for fixed_small. For learned, the network interpolates between the two:
    eq. 15 of Nichol & Dhariwal 2021. The last step adds no noise.

    Raises:
        ValueError: the variance is unknown, or `learned` while the network has learned no variance.
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
    """Samples by eq. 12 and 16 of Song et al. 2020 (DDIM).

    With eta = 0, sampling is deterministic. With eta = 1, the variance is DDPM's fixed_small. Raises ValueError unless eta
    lies in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta} must lie in [0, 1]")
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        sigma2 = eta**2 * (1 - to.alpha_bar) / (1 - now.alpha_bar) * (1 - now.alpha_bar / to.alpha_bar)
        # The factor of s eps = x - a x0_hat, where x0_hat may be clipped.
        direction = math.sqrt(max(1 - to.alpha_bar - sigma2, 0)) / now.s
        x = (to.a - direction * now.a) * x0_hat + direction * x
        if sigma2 > 0:
            x = x + math.sqrt(sigma2) * noise(k)
        yield x, x0_hat


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS: everything that the rest of the project knows about a sampler.

    Args:
        step: step(denoise, x, levels, noise, **options) yields (x, x0_hat) after each step. The docstring of
            this module explains the arguments. The keyword-only arguments are the sampler's options.
        deterministic: a function of the sampler's options that returns whether the steps add no noise. Then each image
            comes from one x_T, and can be encoded as that x_T.
        evaluations: a function of the levels that returns the number of network evaluations per image, without guidance.
    """

    step: Callable[..., Steps]
    deterministic: Callable[[Mapping[str, Any]], bool] = lambda options: True
    evaluations: Callable[[Sequence[Level]], int] = lambda levels: len(levels) - 1

    @property
    def options(self) -> dict[str, Any]:
        """The sampler's own options and their defaults."""
        parameters = inspect.signature(self.step).parameters.values()
        return {option.name: option.default for option in parameters if option.kind is option.KEYWORD_ONLY}

    def draws_noise(self, **options: Any) -> bool:
        """Returns whether the sampler draws noise with these options."""
        return not self.deterministic({**self.options, **options})


def _always_draws(options: Mapping[str, Any]) -> bool:
    return False


# name -> row
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, deterministic=_always_draws),
    "ddim": Sampler(ddim, deterministic=lambda options: options["eta"] == 0),
    "euler": Sampler(solvers.euler),
    "heun": Sampler(
        solvers.heun,
        evaluations=lambda levels: sum(1 + solvers.corrected(now, to) for now, to in pairwise(levels)),
    ),
    "dpmpp_2m": Sampler(solvers.dpmpp_2m),
    "dpmpp_3m": Sampler(solvers.dpmpp_3m),
    "dpmpp_2m_sde": Sampler(solvers.dpmpp_2m_sde, deterministic=_always_draws),
    "unipc": Sampler(solvers.unipc),
    "ipndm": Sampler(solvers.ipndm),
    "deis": Sampler(solvers.deis),
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


def evaluations(
    schedule: NoiseSchedule,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "leading",
    along: NoiseSchedule | None = None,
    times: Times | None = None,
    **options: Any,
) -> int:
    """Returns the network evaluations per image of `sample` with the same settings, without guidance.

    A guided step takes twice as many evaluations.

    Args:
        schedule: the schedule that the network was trained on.
        sampler, steps, spacing, along, times, options: see `sample`.

    Raises:
        ValueError: a setting is wrong.
    """
    check_options(sampler, spacing, **options)
    return SAMPLERS[sampler].evaluations(noise_levels(schedule, steps, spacing, along, times))


def trajectory(
    denoiser: Denoiser,
    x_T: Tensor,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "leading",
    noise: Noise | None = None,
    along: NoiseSchedule | None = None,
    times: Times | None = None,
    **options: Any,
) -> Iterator[State]:
    """Yields the State after each step of `sample`, which has the same arguments.

    Unlike `sample`, this function does not disable gradients.
    """
    check_options(sampler, spacing, **options)
    levels = noise_levels(denoiser.schedule, steps, spacing, along, times)
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
    times: Times | None = None,
    **options: Any,
) -> Tensor:
    """Draws images from noise.

    Args:
        denoiser: the model.
        x_T: standard normal noise, [B, ...].
        sampler: a key of SAMPLERS.
        steps: S, the number of timesteps to visit.
        spacing: which times, a key of SPACINGS.
        noise: noise(k) -> standard normal tensor like x_T for step k, for samplers that draw noise. The default is
            torch.randn_like.
        along: a schedule whose noise levels are visited instead of the network's own (see `noise_levels`).
        times: {S: S falling timesteps} to visit instead of the times of a spacing (see `ddpm fit-times`).
        options: the sampler's own options: `variance` of ddpm, `eta` of ddim, `order` of unipc.

    Returns:
        x_0, like x_T.

    Raises:
        ValueError: a name is unknown, the sampler does not take an option, or a number is out of range.
    """
    x = x_T
    for state in trajectory(denoiser, x_T, sampler, steps, spacing, noise, along, times, **options):
        x = state.x
    return x
