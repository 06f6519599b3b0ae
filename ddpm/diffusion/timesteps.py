"""Spacings: which S network times a sampler visits, from noise to image.

`leading`, `trailing` and `linspace` are Table 2 of Lin et al. 2024; `quadratic` is appendix D.2 of Song et al. 2020
(DDIM); `karras` is eq. 5 of Karras et al. 2022 with rho = 7; `logsnr` is the uniform grid of Lu et al. 2022
(DPM-Solver).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.diffusion.schedule import NoiseSchedule


def _leading(schedule: NoiseSchedule, steps: int) -> Tensor:
    i = torch.arange(steps - 1, -1, -1)
    return torch.div(i * schedule.T, steps, rounding_mode="floor").double()


def _trailing(schedule: NoiseSchedule, steps: int) -> Tensor:
    i = torch.arange(steps, dtype=torch.float64)
    return torch.round(schedule.T - i * schedule.T / steps) - 1


def _linspace(schedule: NoiseSchedule, steps: int) -> Tensor:
    return torch.linspace(schedule.T - 1, 0, steps, dtype=torch.float64)


def _quadratic(schedule: NoiseSchedule, steps: int) -> Tensor:
    last = min(0.8 * schedule.T, schedule.T - 1)  # the paper's 0.8 T, or T - 1 on a short chain
    return torch.linspace(0, math.sqrt(last), steps, dtype=torch.float64).square().clamp(max=last).flip(0)


def _logsnr(schedule: NoiseSchedule, steps: int) -> Tensor:
    return _between_ends(schedule, steps, lambda snr: snr.log(), torch.nn.functional.logsigmoid)


def _karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> Tensor:
    return _between_ends(schedule, steps, lambda snr: snr ** (-0.5 / rho), lambda ramp: -torch.log1p(ramp ** (2 * rho)))


def _between_ends(
    schedule: NoiseSchedule, steps: int, measure: Callable[[Tensor], Tensor], log_alpha_bar: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns `steps` times from T-1 to 0 that are evenly spaced in `measure`, a function of the signal-to-noise ratio.

    If nothing of the signal is left at T-1, that time comes first and the even spacing starts at T-2.

    Args:
        schedule: gives the signal-to-noise ratios.
        steps: 2 or more.
        measure: signal-to-noise ratio -> measure.
        log_alpha_bar: measure -> log alpha_bar, the inverse.
    """
    silent = int(schedule.snr[-1] == 0)
    first, last = measure(schedule.snr[[-1 - silent, 1]]).tolist()
    grid = torch.linspace(first, last, steps - silent, dtype=torch.float64)
    times = schedule.time_at(log_alpha_bar(grid)).clamp(0, schedule.T - 1)
    return torch.cat([torch.full((silent,), schedule.T - 1.0, dtype=torch.float64), times])


# name -> function of (schedule, S) that returns S network times, float64 [S], from noise to image.
SPACINGS: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
    "karras": _karras,
}


def network_times(schedule: NoiseSchedule, steps: int, spacing: str = "leading") -> Tensor:
    """Returns the S = steps network times that a sampler visits: float64 [S], falling from T-1 at most to 0 at least.

    S = 1 visits T-1. Raises ValueError for an unknown spacing, S < 1, or an S so large that times repeat.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"no spacing '{spacing}'; there are {', '.join(SPACINGS)}")
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1")
    if steps == 1:
        return torch.tensor([schedule.T - 1], dtype=torch.float64)
    times = SPACINGS[spacing](schedule, steps)
    if not bool((times.diff() < 0).all()):
        raise ValueError(f"steps = {steps} is too many for spacing '{spacing}' at T = {schedule.T}: times repeat")
    return times
