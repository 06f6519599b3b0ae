"""Follows images to noise and back: states of a chain, codes of images, and interpolations between two images.

Settings are the arguments of `ddpm.sample`: sampler, steps, spacing, along, times, and the sampler's own options. The code of an
image is the x_T that leads to it along the probability flow. So samplers that draw noise cannot encode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.samplers import SAMPLERS, State, check_options, sample, trajectory
from ddpm.diffusion.schedule import NoiseSchedule
from ddpm.diffusion.solvers import Noise, Steps, flow
from ddpm.diffusion.timesteps import Level, Times, noise_levels


@torch.no_grad()
def snapshots(denoiser: Denoiser, x_T: Tensor, count: int = 10, **settings: Any) -> list[State]:
    """Returns `count` evenly spaced states of one chain, or all states of a shorter chain.

    The x0_hat of the states, from blurred to sharp, are the progressive generation of Ho et al. 2020, figure 6. The x
    of the states are the chain itself. In the last state, x and x0_hat are both the result of `sample`.

    Args:
        denoiser: the model.
        x_T: standard normal noise, [B, ...].
        count: number of states. With 1, the last state is returned. Otherwise the first and the last state are included.
        settings: see `ddpm.sample`.

    Raises:
        ValueError: a setting is wrong.
    """
    level_settings = {key: settings[key] for key in ("spacing", "along", "times") if key in settings}
    last = len(noise_levels(denoiser.schedule, settings.get("steps", 50), **level_settings)) - 2
    shown = {last} if count == 1 else {round(last * i / (count - 1)) for i in range(count)}
    return [state for state in trajectory(denoiser, x_T, **settings) if state.k in shown]


def check_flow(sampler: str = "ddim", **options: Any) -> None:
    """Raises ValueError if the sampler draws noise with these options. The steps of such a sampler cannot be reversed."""
    if sampler in SAMPLERS and SAMPLERS[sampler].draws_noise(**options):
        chosen = " and ".join(f"{name} = {value}" for name, value in options.items())
        noiseless = ", ".join(name for name, row in SAMPLERS.items() if not row.draws_noise())
        raise ValueError(
            f"sampler '{sampler}'{f' with {chosen}' if chosen else ''} draws noise of its own, so an image has no single"
            f" code; take one of {noiseless}, with its default options"
        )


@torch.no_grad()
def encode(
    denoiser: Denoiser,
    x_0: Tensor,
    sampler: str = "ddim",
    steps: int = 50,
    spacing: str = "leading",
    along: NoiseSchedule | None = None,
    times: Times | None = None,
    **options: Any,
) -> Tensor:
    """Encodes images: runs the sampler upwards through the same noise levels (section 5.4 of Song et al. 2020, DDIM).

    `sample` with the same settings turns the codes back into x_0. The error shrinks with `steps` at the sampler's order.
    Encoding takes as many network evaluations as `sample`.

    Args:
        denoiser: the model.
        x_0: images, [B, ...] in [-1, 1].
        sampler: the sampler. With these `options`, it must not draw noise.
        steps, spacing, along, times, options: see `ddpm.sample`.

    Returns:
        The codes x_T, shaped like x_0.

    Raises:
        ValueError: the sampler draws noise, or a setting is wrong.
    """
    check_options(sampler, spacing, **options)
    check_flow(sampler, **options)
    rising = noise_levels(denoiser.schedule, steps, spacing, along, times)[-2::-1]
    # The network was never trained on images without noise, so the first step uses eps at t = 0, the lowest noise level.
    lowest = Level(0.0, float(denoiser.schedule.alpha_bar[1]))
    eps = (x_0 - lowest.a * denoiser(x_0, lowest.t)) / lowest.s
    x = rising[0].a * x_0 + rising[0].s * eps
    # The last step, up to pure noise, is infinite in log SNR. So DDIM's step is taken there, with any sampler.
    top = rising.pop() if rising[-1].alpha_bar == 0 and len(rising) > 1 else None
    x = _last(SAMPLERS[sampler].step(denoiser, x, rising, lambda k: torch.zeros_like(x_0), **options), x)
    return x if top is None else flow(x, denoiser(x, rising[-1].t), rising[-1], top)


def _last(steps: Steps, x: Tensor) -> Tensor:
    """Returns x after the last of the steps, or x itself if there are none."""
    for after, _ in steps:
        x = after
    return x


def slerp(x: Tensor, y: Tensor, weight: float) -> Tensor:
    """Interpolates spherically from x (weight 0) to y (weight 1), both [B, ...]: section 5.3 of Song et al. 2020.

    If x and y have the same length, the result has that length, too. A linear interpolation would be shorter than typical noise.
    Parallel vectors are interpolated linearly.
    """
    u, v = x.flatten(1).double(), y.flatten(1).double()
    # The half-angle formula on unit vectors, which is stable at small angles, unlike the cosine.
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    straight = angle < 1e-6
    x_factor, y_factor = (
        torch.where(straight, share, (share * angle).sin() / angle.sin()).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        for share in (1 - weight, weight)
    )
    return x_factor * x + y_factor * y


def interpolate(denoiser: Denoiser, x_0: Tensor, y_0: Tensor, weights: Sequence[float], **settings: Any) -> Tensor:
    """Interpolates between two images: encodes both, interpolates between the codes with `slerp`, and decodes the results.

    See section 5.3 of Song et al. 2020 (DDIM).

    Args:
        denoiser: the model.
        x_0: the image at weight 0, [C, H, W] in [-1, 1]. The result at weight 0 is x_0 encoded and decoded.
        y_0: the image at weight 1, like x_0.
        weights: the weight of y_0 in each result, in [0, 1].
        settings: see `encode`.

    Returns:
        The images, [len(weights), C, H, W].

    Raises:
        ValueError: the sampler draws noise, or a setting is wrong.
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
    times: Times | None = None,
    **options: Any,
) -> Tensor:
    """Interpolates between two images: mixes them, adds noise and denoises. See section 4.4 of Ho et al. 2020.

    Args:
        denoiser: the model.
        x_0: the image at weight 0, [C, H, W] in [-1, 1].
        y_0: the image at weight 1, like x_0.
        weights: the weight of y_0 in each result, in [0, 1].
        depth: how much noise is added, from 0 (no noise) to 1 (the chain's highest noise level).
        noise: noise(k) -> standard normal [C, H, W], the same for all weights. noise(0) is added to the images, and
            noise(k + 1) is the sampler's draw k.
        sampler, steps, spacing, along, times, options: see `ddpm.sample`.

    Returns:
        The images, [len(weights), C, H, W].

    Raises:
        ValueError: the depth or another setting is wrong.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth = {depth} must lie in [0, 1]")
    check_options(sampler, spacing, **options)
    levels = noise_levels(denoiser.schedule, steps, spacing, along, times)
    falling = levels[len(levels) - 1 - math.ceil(depth * (len(levels) - 1)) :]
    mixed = torch.stack([(1 - weight) * x_0 + weight * y_0 for weight in weights])
    x = falling[0].a * mixed + falling[0].s * noise(0)
    return _last(SAMPLERS[sampler].step(denoiser, x, falling, lambda k: noise(k + 1).expand_as(x), **options), x)


def pixel_error(x_0: Tensor, decoded: Tensor) -> Tensor:
    """Returns the mean squared error [B] of images in [-1, 1], on the [0, 1] scale of table 2 of Song et al. 2020."""
    return ((decoded.clamp(-1, 1) - x_0) / 2).square().flatten(1).mean(1)
