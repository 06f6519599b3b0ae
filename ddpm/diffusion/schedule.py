"""Noise schedules: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)   (eq. 4, Ho et al. 2020).

beta_1 ... beta_T are the variances of the forward steps, alpha_t = 1 - beta_t, and alpha_bar_t = alpha_1 ... alpha_t
with alpha_bar_0 = 1. Tables are float64: sqrt's alpha_bar_1000 is 3e-44, which float32 cannot hold.
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
    """Section 4 of Ho et al. 2020."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _scaled_linear(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """Linear in sqrt(beta): latent diffusion's `linear`, Ho et al.'s `quad`."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2


def _sqrt(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """Latent diffusion's `sqrt`."""
    return torch.linspace(start, end, steps, dtype=torch.float64).sqrt()


def _cosine(steps: int, s: float = 0.008) -> Tensor:
    """Eq. 17 of Nichol & Dhariwal 2021, with beta clipped at 0.999."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def _sigmoid(steps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """beta along a logistic curve between its end points, from -6 to 6: GeoDiff's (Xu et al. 2022), and diffusers'."""
    return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "sqrt": _sqrt,
    "sigmoid": _sigmoid,
}

# What other projects call them. Latent diffusion's `linear` and `sqrt` are no aliases: the first is `scaled_linear` here,
# the second is `sqrt` already.
ALIASES = {"quad": "scaled_linear", "sqrt_linear": "linear", "squaredcos_cap_v2": "cosine"}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A table of beta_1 ... beta_T and what follows from it.

    betas: float64 [T], each in (0, 1); the last may be 1, and then alpha_bar_T = 0 (see `zero_terminal_snr`).
    name: what it is called in files and messages.
    Network time t in 0 ... T-1 pairs with alpha_bar[t + 1]; t = -1 is the clean image. Raises ValueError.
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
            raise ValueError(f"betas of schedule '{self.name}': every one must lie in (0, 1); the last may be 1")
        object.__setattr__(self, "betas", betas)

    @classmethod
    def named(cls, name: str, steps: int = 1000, *, zero_terminal_snr: bool = False, **shape: float) -> NoiseSchedule:
        """A row of SCHEDULES, or of ALIASES, at T = steps.

        shape: the row's own numbers: start and end (beta_1 and beta_T of linear and scaled_linear, their squares for sqrt),
        or s of cosine. zero_terminal_snr: rescaled as the method of that name says. Raises ValueError.
        """
        kind = ALIASES.get(name, name)
        if kind not in SCHEDULES:
            raise ValueError(f"no schedule '{name}'; there are {', '.join(SCHEDULES)}")
        if steps < 1:
            raise ValueError(f"schedule '{name}': steps = {steps} must be at least 1")
        takes = list(inspect.signature(SCHEDULES[kind]).parameters)[1:]
        for option in shape:
            if option not in takes:
                raise ValueError(f"schedule '{name}' takes no {option}; it takes {', '.join(takes)}")
        made = cls(SCHEDULES[kind](steps, **shape), name)
        return made.zero_terminal_snr() if zero_terminal_snr else made

    def zero_terminal_snr(self) -> NoiseSchedule:
        """The same schedule shifted and scaled so that nothing of x_0 is left at T: algorithm 1 of Lin et al. 2024.

        sqrt(alpha_bar_1) stays, sqrt(alpha_bar_T) becomes 0. Target eps cannot be trained at the last time then.
        Raises ValueError for a single step, which cannot do both.
        """
        if self.T < 2:
            raise ValueError(f"schedule '{self.name}': zero_terminal_snr takes two steps or more, not {self.T}")
        a = self.alpha_bar[1:].sqrt()
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), a.square()])
        return NoiseSchedule(1 - alpha_bar[1:] / alpha_bar[:-1], self.name)

    @property
    def T(self) -> int:
        return len(self.betas)

    @cached_property
    def log_alpha_bar(self) -> Tensor:
        """float64 [T+1]: log alpha_bar_0 = 0, ..., log alpha_bar_T."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-self.betas).cumsum(0)])

    @cached_property
    def alpha_bar(self) -> Tensor:
        """float64 [T+1]: alpha_bar_0 = 1, ..., alpha_bar_T (the paper's indexing)."""
        return self.log_alpha_bar.exp()

    @cached_property
    def snr(self) -> Tensor:
        """float64 [T+1]: alpha_bar / (1 - alpha_bar); infinite at 0."""
        return self.alpha_bar / -torch.expm1(self.log_alpha_bar)

    def log_alpha_bar_at(self, t: Tensor | float) -> Tensor:
        """log alpha_bar at network times t in [-1, T-1], linear between entries; float64, t's shape, on the CPU.

        Where alpha_bar_T = 0 there is no line to T-1: times after T-2 have its level, -inf.
        """
        times = np.asarray(t.detach().cpu() if isinstance(t, Tensor) else t, dtype=np.float64)
        if times.size and not (times.min() >= -1 and times.max() <= self.T - 1):
            raise ValueError(f"network times must lie in [-1, {self.T - 1}], got {times.min():g} ... {times.max():g}")
        entries, table = self._finite
        levels = np.interp(times, entries, table)
        return torch.from_numpy(np.asarray(np.where(times > entries[-1], -np.inf, levels)))

    def posterior_at(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x_0) = N(A x_0 + B x_t, beta_tilde I) at network times t in [0, T-1]: eq. 6 and 7 of Ho et al. 2020.

        Returns A, B, log beta_tilde and log beta: float64, t's shape, on the CPU. At fractional t the step goes from t to t - 1,
        but never beyond the clean image at -1. At t = 0 it ends there: A = 1, B = 0, and log beta_tilde is -inf.
        """
        times = torch.as_tensor(t, dtype=torch.float64).cpu()
        now, before = self.log_alpha_bar_at(times), self.log_alpha_bar_at((times - 1).clamp(min=-1))
        log_alpha = now - before
        beta, noise, noise_before = (-torch.expm1(x) for x in (log_alpha, now, before))
        on_x0, on_x_t = (before / 2).exp() * (beta / noise), (log_alpha / 2).exp() * (noise_before / noise)
        return on_x0, on_x_t, beta.log() + (noise_before / noise).log(), beta.log()

    def time_at(self, log_alpha_bar: Tensor) -> Tensor:
        """The inverse of `log_alpha_bar_at`: float64 network times; levels beyond the table's ends get its end times."""
        levels = np.asarray(log_alpha_bar.detach().cpu(), dtype=np.float64)
        entries, table = self._finite
        times = np.interp(-levels, -table, entries)
        return torch.from_numpy(np.asarray(np.where(np.isneginf(levels), self.T - 1, times)))

    @cached_property
    def _finite(self) -> tuple[np.ndarray, np.ndarray]:
        """Network times, and log alpha_bar there, without an infinite last entry."""
        table = self.log_alpha_bar.numpy()
        count = self.T + (1 if np.isfinite(table[-1]) else 0)
        return np.arange(-1, count - 1, dtype=np.float64), table[:count]
