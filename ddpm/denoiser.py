"""What the network predicts, turned into one thing: x0_hat, the denoised image.

With a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) and x_t = a x_0 + s eps, each row of TARGETS gives
x0_hat = c_skip x_t + c_out net(x_t, t); the training target is that row's inverse (x_0 - c_skip x_t) / c_out.
`eps` is eq. 11 of Ho et al. 2020; `v` = a eps - s x_0 is appendix D of Salimans & Ho 2022.

A conditional network may be guided without a classifier (Ho & Salimans 2022, eq. 6): the prediction is
free + w (labelled - free), that is, samples of p(x) p(label | x)^w instead of p(x | label) = p(x) p(label | x)^1. w = 1 is the
plain conditional network and w = 0 the unconditional one; the w of that paper is ours less 1.
"""

from __future__ import annotations

import math
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


NO_LABEL = -1  # in place of a class: nothing is told


def coefficients(schedule: NoiseSchedule, target: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, s, c_skip, c_out at network times t: float64, t's shape. Raises ValueError for eps where a = 0."""
    if target not in TARGETS:
        raise ValueError(f"no target '{target}'; there are {', '.join(TARGETS)}")
    log_alpha_bar = schedule.log_alpha_bar_at(t)
    a, s = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
    if target == "eps" and bool((a == 0).any()):
        raise ValueError("target eps says nothing of x_0 where alpha_bar = 0; train with target v or x0")
    return a, s, *TARGETS[target](a, s)


@dataclass(frozen=True)
class Denoiser:
    """x0_hat = denoiser(x_t, t) from any network.

    net: net(x, t) -> like x, with x [B, ...] and t float32 [B], 0 ... T-1 as in Ho et al. and diffusers; fractions allowed.
    target: what net predicts, a key of TARGETS.
    clip: clamp x0_hat to [-1, 1]; samplers derive eps again from the clamped x0_hat.
    labels: int64 [B], the class of each image, for a net(x, t, labels) that knows classes, and -1 as no label.
    guidance: w, how far the prediction goes from no label (0) to the label (1) and beyond. Raises ValueError.
    """

    net: Callable[..., Any]
    schedule: NoiseSchedule
    target: str = "eps"
    clip: bool = False
    labels: Tensor | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"no target '{self.target}'; there are {', '.join(TARGETS)}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance = {self.guidance} must be a finite number")
        if self.labels is None and self.guidance != 1:
            raise ValueError(f"guidance = {self.guidance:g} takes labels, and a network trained with them")

    @property
    def evaluations(self) -> int:
        """Network evaluations of an image in one call: 2 under guidance, except at w = 0 and w = 1."""
        return 1 if self.guidance in (0, 1) else 2

    def _predict(self, x_t: Tensor, times: Tensor) -> Tensor:
        """What the network says, guided; x_t [B, ...], times float32 [B] -> like x_t."""
        if self.labels is None:
            return self.net(x_t, times)
        if len(self.labels) != len(x_t):
            raise ValueError(f"{len(self.labels)} labels for {len(x_t)} images")
        labels = self.labels.to(x_t.device)
        free = torch.full_like(labels, NO_LABEL)
        if self.evaluations == 1:
            return self.net(x_t, times, labels if self.guidance == 1 else free)
        both = self.net(torch.cat([x_t, x_t]), torch.cat([times, times]), torch.cat([free, labels]))
        without, told = both.chunk(2)
        return without + self.guidance * (told - without)

    def __call__(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x_t [B, ...], t a number or [B] -> x0_hat, like x_t."""
        times = torch.as_tensor(t, dtype=torch.float64).expand(len(x_t))
        _, _, c_skip, c_out = coefficients(self.schedule, self.target, times.cpu() if times.dim() else times)
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        c_skip, c_out = (c.to(x_t.device, x_t.dtype).view(shape) for c in (c_skip, c_out))
        prediction = self._predict(x_t, times.to(x_t.device, torch.float32))
        x0_hat = c_skip * x_t + c_out * prediction
        return x0_hat.clamp(-1, 1) if self.clip else x0_hat
