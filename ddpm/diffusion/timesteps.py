"""Chooses the S timesteps that a sampler visits, from noise to image, and their noise levels. The spacings:

- `leading`, `trailing` and `linspace`: table 2 of Lin et al. 2024.
- `quadratic`: appendix D.2 of Song et al. 2020 (DDIM).
- `karras`: eq. 5 of Karras et al. 2022 with rho = 7.
- `logsnr`: the uniform grid in log SNR of Lu et al. 2022 (DPM-Solver).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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

    If no signal is left at T-1, the first time is T-1 and the even spacing starts at T-2.

    Args:
        schedule: the noise schedule.
        steps: the number of times, 2 or more.
        measure: signal-to-noise ratio -> measure.
        log_alpha_bar: measure -> log alpha_bar, the inverse.
    """
    without_signal = int(schedule.snr[-1] == 0)  # the number of times without signal
    first, last = measure(schedule.snr[[-1 - without_signal, 1]]).tolist()
    grid = torch.linspace(first, last, steps - without_signal, dtype=torch.float64)
    times = schedule.time_at(log_alpha_bar(grid)).clamp(0, schedule.T - 1)
    return torch.cat([torch.full((without_signal,), schedule.T - 1.0, dtype=torch.float64), times])


# name -> function of (schedule, S) that returns S timesteps, float64 [S], from noise to image.
SPACINGS: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
    "karras": _karras,
}


def network_times(schedule: NoiseSchedule, steps: int, spacing: str = "leading") -> Tensor:
    """Returns the S = `steps` timesteps that a sampler visits: float64 [S], falling, all between T-1 and 0.

    With S = 1, the time is T-1. Raises ValueError for an unknown spacing, S < 1, or an S so large that times repeat.
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


@dataclass(frozen=True)
class Level:
    """A noise level: timestep t (-1 is the clean image) and alpha_bar there."""

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


Times = Mapping[int, Sequence[float]]  # S -> S falling timesteps


def noise_levels(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "leading",
    along: NoiseSchedule | None = None,
    times: Times | None = None,
) -> list[Level]:
    """Returns the levels that a sampler visits, from noise to the clean image.

    Args:
        schedule: the schedule that the network was trained on.
        steps: S, the number of levels besides the clean image.
        spacing: a key of SPACINGS.
        along: another schedule, whose noise levels the sampler visits. The network is evaluated at the times, possibly
            fractional, at which `schedule` has the same signal-to-noise ratios. Levels outside the network's training
            become the first or last level of `schedule`. Equal levels are visited once, so there may be fewer than `steps`.
        times: the times to visit for each S, instead of the times of a spacing. `along` has no effect then.

    Returns:
        S levels or fewer, and the clean image.

    Raises:
        ValueError: the spacing is unknown or cannot give S different levels, or `times` has no entry for S or does not fit
            the schedule.
    """
    if along is None or times is not None:
        visited = network_times(schedule, steps, spacing) if times is None else _given(schedule, steps, times)
        log_alpha_bar = schedule.log_alpha_bar_at(visited)
        # A schedule without signal at T-1 has no signal at fractional times after T-2 either.
        if int((log_alpha_bar == -math.inf).sum()) > 1:
            cause = f"spacing '{spacing}' cannot make" if times is None else "times: do not make"
            raise ValueError(f"{cause} {steps} different noise levels of T = {schedule.T}")
    else:
        wanted = along.log_alpha_bar_at(network_times(along, steps, spacing))
        log_alpha_bar = wanted.clamp(schedule.log_alpha_bar[-1], schedule.log_alpha_bar[1]).unique().sort().values
        visited = schedule.time_at(log_alpha_bar).clamp(0, schedule.T - 1)
    levels = zip(visited.tolist(), log_alpha_bar.exp().tolist(), strict=True)
    return [Level(*level) for level in levels] + [Level(-1.0, 1.0)]


def check_times(times: Times) -> None:
    """Raises ValueError unless `times` holds S falling times, all at least 0, for each S."""
    for steps, row in times.items():
        if len(row) != steps or any(not now > to for now, to in pairwise(row)) or not row or not row[-1] >= 0:
            raise ValueError(f"times: expected {steps} falling timesteps, all at least 0, for {steps} steps")


def _given(schedule: NoiseSchedule, steps: int, times: Times) -> Tensor:
    """Returns `times[steps]`, float64 [S]. Raises ValueError if that entry is missing, or if `times` is invalid."""
    check_times(times)
    if steps not in times:
        raise ValueError(f"times: no entry for {steps} steps; there are entries for {', '.join(map(str, times))}")
    if times[steps][0] > schedule.T - 1:
        raise ValueError(f"times: {times[steps][0]:g} lies after the last timestep, {schedule.T - 1}")
    return torch.tensor(times[steps], dtype=torch.float64)
