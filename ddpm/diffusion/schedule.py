"""Noise schedules: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)   (eq. 4, Ho et al. 2020).

beta_1 ... beta_T are the variances of the forward steps, alpha_t = 1 - beta_t, and alpha_bar_t = alpha_1 ... alpha_t
with alpha_bar_0 = 1. Tables are float64: alpha_bar_1000 of `sqrt` is 3e-44, which float32 cannot hold precisely.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


def _linear(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """Returns betas that rise linearly: section 4 of Ho et al. 2020."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _scaled_linear(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """Returns betas whose square roots rise linearly: latent diffusion's `linear`, and `quad` in Ho et al.'s code."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2


def _sqrt(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """Returns the square roots of linear betas: latent diffusion's `sqrt`."""
    return torch.linspace(start, end, steps, dtype=torch.float64).sqrt()


def _cosine(steps: int, s: float = 0.008) -> Tensor:
    """Returns betas whose alpha_bar follows a squared cosine, clipped at 0.999: eq. 17 of Nichol & Dhariwal 2021."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def _sigmoid(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """Returns betas on a logistic curve from -6 to 6, scaled to the end points, as in GeoDiff (Xu et al. 2022)."""
    return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start


def _rectified(steps: int) -> Tensor:
    """Returns the betas of rectified flow (Liu et al. 2023): straight paths (1 - t/T) x_0 + t/T eps, at unit variance.

    alpha_bar_t = (1 - t/T)^2 / ((1 - t/T)^2 + (t/T)^2), so alpha_bar_T = 0.
    """
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = (1 - t).square() / ((1 - t).square() + t.square())
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


# name -> function that returns the betas, float64 [T], from T and optional numbers (`shape` of NoiseSchedule.named).
SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "sqrt": _sqrt,
    "sigmoid": _sigmoid,
    "rectified": _rectified,
}

# Names that other projects use. Latent diffusion's `linear` is `scaled_linear` here, where `linear` means another schedule.
ALIASES = {"quad": "scaled_linear", "sqrt_linear": "linear", "squaredcos_cap_v2": "cosine"}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A table of beta_1 ... beta_T, with the quantities that follow from the betas.

    Network time t in 0 ... T-1 has the noise level alpha_bar[t + 1]. t = -1 is the clean image.

    Args:
        betas: variances of the forward steps, float64 [T], each in (0, 1). The last beta may be 1: then alpha_bar_T = 0
            (see `zero_terminal_snr`).
        name: the schedule's name in files and messages.

    Raises:
        ValueError: `betas` has another shape or values out of range.
    """

    betas: Tensor
    name: str = "custom"

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 1:
            raise ValueError(f"betas: expected a vector of at least one entry, got shape {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1)).all()) and not bool(
            ((betas[:-1] > 0) & (betas[:-1] < 1)).all() and betas[-1] == 1
        ):
            raise ValueError(
                f"betas of schedule '{self.name}': every beta must lie in (0, 1), except the last, which may be 1"
            )
        object.__setattr__(self, "betas", betas)

    @classmethod
    def named(cls, name: str, steps: int = 1000, *, zero_terminal_snr: bool = False, **shape: float) -> NoiseSchedule:
        """Builds a schedule of SCHEDULES.

        Args:
            name: a key of SCHEDULES or ALIASES.
            steps: T.
            zero_terminal_snr: whether to rescale the schedule with the method `zero_terminal_snr`.
            shape: `s` for cosine; `start` and `end` for the other schedules, except rectified, which takes none. `start` and
                `end` are beta_1 and beta_T for linear and scaled_linear, roughly so for sigmoid, and beta_1^2 and beta_T^2 for
                sqrt.

        Raises:
            ValueError: the name is unknown, the schedule does not take one of the numbers, or a number is out of range.
        """
        kind = ALIASES.get(name, name)
        if kind not in SCHEDULES:
            raise ValueError(f"no schedule '{name}'; there are {', '.join(SCHEDULES)}")
        if steps < 1:
            raise ValueError(f"schedule '{name}': steps = {steps} must be at least 1")
        options = list(inspect.signature(SCHEDULES[kind]).parameters)[1:]
        for option in shape:
            if option not in options:
                raise ValueError(f"schedule '{name}' takes no {option}; it takes {', '.join(options) or 'no options'}")
        schedule = cls(SCHEDULES[kind](steps, **shape), name)
        return schedule.zero_terminal_snr() if zero_terminal_snr else schedule

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Returns the schedule shifted and scaled so that nothing of x_0 is left at T: algorithm 1 of Lin et al. 2024.

        sqrt(alpha_bar_1) keeps its value and sqrt(alpha_bar_T) becomes 0. So a network with target eps cannot be trained on
        the schedule. Raises ValueError if T < 2, because alpha_bar_1 and alpha_bar_T are then the same number.
        """
        if self.T < 2:
            raise ValueError(f"schedule '{self.name}': zero_terminal_snr takes two steps or more, not {self.T}")
        a = self.alpha_bar[1:].sqrt()
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), a.square()])
        return NoiseSchedule(1 - alpha_bar[1:] / alpha_bar[:-1], self.name)

    @property
    def T(self) -> int:
        """The number of forward steps."""
        return len(self.betas)

    @cached_property
    def log_alpha_bar(self) -> Tensor:
        """log alpha_bar_0 = 0, ..., log alpha_bar_T: float64 [T+1]."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-self.betas).cumsum(0)])

    @cached_property
    def alpha_bar(self) -> Tensor:
        """alpha_bar_0 = 1, ..., alpha_bar_T, indexed as in the paper: float64 [T+1]."""
        return self.log_alpha_bar.exp()

    @cached_property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio alpha_bar / (1 - alpha_bar), infinite at 0: float64 [T+1]."""
        return self.alpha_bar / -torch.expm1(self.log_alpha_bar)

    def log_alpha_bar_at(self, t: Tensor | float) -> Tensor:
        """Returns log alpha_bar at timesteps t: float64, shaped like t, on the CPU.

        Values at fractional times are interpolated linearly. If alpha_bar_T = 0, all times after T-2 have log alpha_bar = -inf.
        Raises ValueError for times outside [-1, T-1].
        """
        times = np.asarray(t.detach().cpu() if isinstance(t, Tensor) else t, dtype=np.float64)
        if times.size and not (times.min() >= -1 and times.max() <= self.T - 1):
            raise ValueError(f"timesteps must lie in [-1, {self.T - 1}], got {times.min():g} ... {times.max():g}")
        entries, table = self._finite
        levels = np.interp(times, entries, table)
        return torch.from_numpy(np.asarray(np.where(times > entries[-1], -np.inf, levels)))

    def posterior_at(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the posterior q(x_{t-1} | x_t, x_0) = N(A x_0 + B x_t, beta_tilde I): eq. 6 and 7 of Ho et al. 2020.

        Args:
            t: timesteps in [0, T-1], fractions allowed. The step goes from t to t - 1, where -1 is the clean image.

        Returns:
            A, B, log beta_tilde and log beta: float64, shaped like t, on the CPU. At t = 0, A = 1, B = 0 and log beta_tilde
                = -inf.
        """
        times = torch.as_tensor(t, dtype=torch.float64).cpu()
        now, before = self.log_alpha_bar_at(times), self.log_alpha_bar_at((times - 1).clamp(min=-1))
        log_alpha = now - before
        beta, noise, noise_before = (-torch.expm1(x) for x in (log_alpha, now, before))
        on_x0, on_x_t = (before / 2).exp() * (beta / noise), (log_alpha / 2).exp() * (noise_before / noise)
        return on_x0, on_x_t, beta.log() + (noise_before / noise).log(), beta.log()

    def time_at(self, log_alpha_bar: Tensor) -> Tensor:
        """Inverts `log_alpha_bar_at`: returns float64 times. A level outside the table gets the table's first or last time."""
        levels = np.asarray(log_alpha_bar.detach().cpu(), dtype=np.float64)
        entries, table = self._finite
        times = np.interp(-levels, -table, entries)
        return torch.from_numpy(np.asarray(np.where(np.isneginf(levels), self.T - 1, times)))

    @cached_property
    def _finite(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns timesteps and their log alpha_bar, without the last entry if it is infinite."""
        table = self.log_alpha_bar.numpy()
        count = self.T + (1 if np.isfinite(table[-1]) else 0)
        return np.arange(-1, count - 1, dtype=np.float64), table[:count]
