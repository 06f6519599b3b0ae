"""Measures noise schedules: whether x_T is pure noise, and how the steps are spread over the noise levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.diffusion.schedule import NoiseSchedule

# Signal-to-noise ratios alpha_bar / (1 - alpha_bar) that separate the five bands of `shares`.
BANDS = (1e-4, 1e-2, 1.0, 1e2)

PRIOR_LIMIT = 1e-3  # x_T counts as noise if L_T is at most this, in bits/dim; linear at T = 1000 has 7e-6
NO_SIGNAL = 1e-4  # below this alpha_bar nothing of x_0 can be seen
NO_SIGNAL_SHARE = 0.25  # the largest share of the steps that may be spent below NO_SIGNAL; linear at T = 1000 spends 5%


@dataclass(frozen=True)
class Summary:
    """A schedule in numbers.

    Args:
        T: the number of steps.
        alpha_bar: alpha_bar_T.
        snr: signal-to-noise ratio at T.
        prior: L_T in bits/dim.
        shares: share of the steps in each band of signal-to-noise ratio (see BANDS), lowest ratio first.
        gone: share of the steps with alpha_bar < NO_SIGNAL.
        warnings: one line for each fault, with its cause and remedy.
    """

    T: int
    alpha_bar: float
    snr: float
    prior: float
    shares: tuple[float, ...]
    gone: float
    warnings: tuple[str, ...]


def summary(schedule: NoiseSchedule, mean_square: float = 0.25) -> Summary:
    """Measures a schedule and warns of faults. `mean_square` is E[x_0^2] of the data, for values in [-1, 1]."""
    alpha_bar, snr = float(schedule.alpha_bar[-1]), float(schedule.snr[-1])
    bits, gone = float(prior(schedule, mean_square)), float((schedule.alpha_bar[1:] < NO_SIGNAL).double().mean())
    warnings = []
    if bits > PRIOR_LIMIT:
        warnings.append(
            f"x_T is not noise: alpha_bar_T = {alpha_bar:.2g}, L_T = {bits:.2g} bits/dim, while sampling starts from pure noise."
            f" T = {schedule.T} is too small for these betas, which add up to {float(schedule.betas.sum()):.2g}:"
            " raise T or the end point, set zero_terminal_snr, or take cosine, which adapts to T"
        )
    if gone > NO_SIGNAL_SHARE:
        first = int((schedule.alpha_bar < NO_SIGNAL).nonzero()[0])
        warnings.append(
            f"the signal is gone early: alpha_bar < {NO_SIGNAL:g} from t = {first} on, so {gone:.0%} of the steps have nothing"
            " to learn or to draw: lower T or the end point"
        )
    return Summary(schedule.T, alpha_bar, snr, bits, shares(schedule), gone, tuple(warnings))


def prior(schedule: NoiseSchedule, mean_square: Tensor | float) -> Tensor:
    """Returns L_T in bits/dim for data with E[x_0^2] = mean_square: float64, shaped like mean_square."""
    alpha_bar = schedule.alpha_bar[-1].item()
    signal = alpha_bar * torch.as_tensor(mean_square, dtype=torch.float64)
    return (signal - alpha_bar - math.log1p(-alpha_bar)) / (2 * math.log(2))


def shares(schedule: NoiseSchedule) -> tuple[float, ...]:
    """Returns the share of the steps 1 ... T in each band of BANDS, lowest signal-to-noise ratio first. The shares sum to 1."""
    band = torch.bucketize(schedule.snr[1:], torch.tensor(BANDS, dtype=torch.float64), right=True)
    return tuple((torch.bincount(band, minlength=len(BANDS) + 1).double() / schedule.T).tolist())


def noised(schedule: NoiseSchedule, x_0: Tensor, steps: Tensor, eps: Tensor) -> Tensor:
    """Returns x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps at each of `steps`: [len(steps), ...].

    Args:
        schedule: the noise schedule.
        x_0: the image, [...].
        steps: int64 [S] in 0 ... T. Step 0 returns x_0 itself.
        eps: standard normal noise, like x_0.
    """
    alpha_bar = schedule.alpha_bar[steps].view(-1, *[1] * x_0.ndim).to(x_0.dtype)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
