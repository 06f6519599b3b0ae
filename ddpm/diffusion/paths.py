"""What lies between an image and noise: a chain seen on its way, images as codes, and the images between two.

Settings are those of `ddpm.sample`: sampler, steps, spacing, along, and the sampler's own. A code is the x_T that leads
to an image along the probability flow, so samplers that draw noise of their own cannot encode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.samplers import (
    SAMPLERS,
    Level,
    Noise,
    State,
    Steps,
    check_options,
    flow,
    noise_levels,
    sample,
    trajectory,
)
from ddpm.diffusion.schedule import NoiseSchedule


@torch.no_grad()
def snapshots(denoiser: Denoiser, x_T: Tensor, count: int = 10, **settings: Any) -> list[State]:
    """`count` states of one chain at even distances, its first and its last among them; all of a shorter chain.

    Their x0_hat, from blurred to sharp, are the progressive generation of Ho et al. 2020, figure 6; their x the chain
    itself. The last of either is what `sample` gives. x_T: [B, ...]; settings may hold `noise`. Raises ValueError.
    """
    levels = {key: settings[key] for key in ("spacing", "along") if key in settings}
    last = len(noise_levels(denoiser.schedule, settings.get("steps", 50), **levels)) - 2
    shown = {last} if count == 1 else {round(last * i / (count - 1)) for i in range(count)}
    return [state for state in trajectory(denoiser, x_T, **settings) if state.k in shown]


def check_flow(sampler: str = "ddim", **options: Any) -> None:
    """Raises ValueError for a sampler that draws noise, whose steps cannot be gone back."""
    if sampler in SAMPLERS and SAMPLERS[sampler].draws_noise(**options):
        chosen = " and ".join(f"{name} = {value}" for name, value in options.items())
        quiet = ", ".join(name for name, row in SAMPLERS.items() if not row.draws_noise())
        raise ValueError(
            f"sampler '{sampler}'{f' with {chosen}' if chosen else ''} draws noise of its own, so an image has no single"
            f" code; take one of {quiet}, with its default options"
        )


@torch.no_grad()
def encode(
    denoiser: Denoiser,
    x_0: Tensor,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "leading",
    along: NoiseSchedule | None = None,
    **options: Any,
) -> Tensor:
    """Images -> their codes: the sampler's own steps up the same noise levels (section 5.4 of Song et al. 2020, DDIM).

    x_0: [B, ...] in [-1, 1]. `sample` with the same settings gives x_0 back, up to an error that shrinks with `steps` at
    the sampler's order. As many network evaluations as `sample` makes.
    Returns x_T, like x_0. Raises ValueError.
    """
    check_options(sampler, spacing, **options)
    check_flow(sampler, **options)
    rising = noise_levels(denoiser.schedule, steps, spacing, along)[-2::-1]
    # The network never saw an image without noise; its prediction of eps at the first time it knows takes the first step.
    least = Level(0.0, float(denoiser.schedule.alpha_bar[1]))
    eps = (x_0 - least.a * denoiser(x_0, least.t)) / least.s
    x = rising[0].a * x_0 + rising[0].s * eps
    # The step up to pure noise is infinite in log-SNR: for every sampler it is DDIM's.
    top = rising.pop() if rising[-1].alpha_bar == 0 and len(rising) > 1 else None
    x = _last(SAMPLERS[sampler].step(denoiser, x, rising, lambda k: torch.zeros_like(x_0), **options), x)
    return x if top is None else flow(x, denoiser(x, rising[-1].t), rising[-1], top)


def _last(steps: Steps, x: Tensor) -> Tensor:
    """Where they lead from x."""
    for after, _ in steps:
        x = after
    return x


def slerp(x: Tensor, y: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of each pair, from x (weight 0) to y (weight 1), as section 5.3 of Song et al. 2020 (DDIM) has it.

    x, y: [B, ...]. Between vectors of the same length all have that length, as codes must. Parallel ones go straight.
    """
    u, v = x.flatten(1).double(), y.flatten(1).double()
    # Stable at small angles, where the cosine is not: the half-angle formula on unit vectors.
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    straight = angle < 1e-6
    of_x, of_y = (
        torch.where(straight, share, (share * angle).sin() / angle.sin()).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        for share in (1 - weight, weight)
    )
    return of_x * x + of_y * y


def interpolate(denoiser: Denoiser, x_0: Tensor, y_0: Tensor, weights: Sequence[float], **settings: Any) -> Tensor:
    """The images between two, through their codes: section 5.3 of Song et al. 2020 (DDIM).

    x_0, y_0: [C, H, W]. Weight 0 gives x_0 encoded and decoded again, weight 1 so y_0. Returns [len(weights), C, H, W].
    Raises ValueError.
    """
    x_T, y_T = encode(denoiser, torch.stack([x_0, y_0]), **settings).split(1)
    return sample(denoiser, torch.cat([slerp(x_T, y_T, weight) for weight in weights]), **settings)


@torch.no_grad()
def blend(
    denoiser: Denoiser,
    x_0: Tensor,
    y_0: Tensor,
    weights: Sequence[float],
    depth: float,
    noise: Noise,
    sampler: str = "ddpm",
    steps: int = 50,
    spacing: str = "leading",
    along: NoiseSchedule | None = None,
    **options: Any,
) -> Tensor:
    """The images between two, mixed under noise that both share and denoised: section 4.4 of Ho et al. 2020.

    x_0, y_0: [C, H, W]. depth: how far up the chain both are noised, 0 (mixed as they are) ... 1 (to its first level).
    noise: noise(k) -> [C, H, W]; k = 0 makes x_t of both, the rest belong to the sampler, the same for all weights.
    Returns [len(weights), C, H, W]. Raises ValueError.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth = {depth} must lie in [0, 1]")
    check_options(sampler, spacing, **options)
    levels = noise_levels(denoiser.schedule, steps, spacing, along)
    down = levels[len(levels) - 1 - math.ceil(depth * (len(levels) - 1)) :]
    mixed = torch.stack([(1 - weight) * x_0 + weight * y_0 for weight in weights])
    x = down[0].a * mixed + down[0].s * noise(0)
    return _last(SAMPLERS[sampler].step(denoiser, x, down, lambda k: noise(k + 1).expand_as(x), **options), x)


def pixel_error(x_0: Tensor, again: Tensor) -> Tensor:
    """Mean squared error of each image per value, on the [0, 1] scale of table 2 of Song et al. 2020: [B]."""
    return ((again.clamp(-1, 1) - x_0) / 2).square().flatten(1).mean(1)
