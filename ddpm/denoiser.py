"""What the network predicts, turned into one thing: x0_hat, the denoised image.

With a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) and x_t = a x_0 + s eps, each row of TARGETS gives
x0_hat = c_skip x_t + c_out net(x_t, t); the training target is that row's inverse (x_0 - c_skip x_t) / c_out.
`eps` is eq. 11 of Ho et al. 2020; `v` = a eps - s x_0 is appendix D of Salimans & Ho 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm.schedule import NoiseSchedule

# target -> (a, s) -> (c_skip, c_out); a and s are float64 tensors.
TARGETS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda a, s: (1 / a, -s / a),
    "x0": lambda a, s: (torch.zeros_like(a), torch.ones_like(a)),
    "v": lambda a, s: (a, -s),
}


def coefficients(schedule: NoiseSchedule, target: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, s, c_skip, c_out at network times t: float64, t's shape. Raises ValueError for eps where a = 0."""
    if target not in TARGETS:
        raise ValueError(f"no target '{target}'; there are {', '.join(TARGETS)}")
    log_alpha_bar = schedule.log_alpha_bar_at(t)
    a, s = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
    if target == "eps" and bool((a == 0).any()):
        raise ValueError("target eps says nothing of x_0 where alpha_bar = 0; train with target v or x0")
    return a, s, *TARGETS[target](a, s)


def _clipped(x0_hat: Tensor, clip: bool | float) -> Tensor:
    """x0_hat [B, ...] as it is, clamped to [-1, 1], or dynamically thresholded: section 2.3 of Saharia et al. 2022 (Imagen).

    That clamps each image to [-s, s] and divides it by s, the quantile `clip` of its |x0_hat|, or 1 if that is less.
    """
    if isinstance(clip, bool):
        return x0_hat.clamp(-1, 1) if clip else x0_hat
    s = x0_hat.flatten(1).abs().quantile(clip, dim=1).clamp(min=1).view(-1, *[1] * (x0_hat.ndim - 1))
    return x0_hat.clamp(-s, s) / s


@dataclass(frozen=True)
class Denoiser:
    """x0_hat = denoiser(x_t, t) from any network.

    net: net(x, t) -> like x, with x [B, ...] and t float32 [B], 0 ... T-1 as in Ho et al. and diffusers; fractions allowed.
    target: what net predicts, a key of TARGETS.
    clip: True clamps x0_hat to [-1, 1]; a number p in (0, 1) is dynamic thresholding at that quantile (see `_clipped`).
    Samplers derive eps again from the clipped x0_hat. Raises ValueError.
    """

    net: Callable[[Tensor, Tensor], Any]
    schedule: NoiseSchedule
    target: str = "eps"
    clip: bool | float = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"no target '{self.target}'; there are {', '.join(TARGETS)}")
        if not isinstance(self.clip, bool) and not 0 < self.clip < 1:
            raise ValueError(f"clip = {self.clip} must be True, False, or a quantile between 0 and 1")

    def __call__(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x_t [B, ...], t a number or [B] -> x0_hat, like x_t."""
        times = torch.as_tensor(t, dtype=torch.float64).expand(len(x_t))
        _, _, c_skip, c_out = coefficients(self.schedule, self.target, times.cpu() if times.dim() else times)
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        c_skip, c_out = (c.to(x_t.device, x_t.dtype).view(shape) for c in (c_skip, c_out))
        prediction = self.net(x_t, times.to(x_t.device, torch.float32))
        return _clipped(c_skip * x_t + c_out * prediction, self.clip)
