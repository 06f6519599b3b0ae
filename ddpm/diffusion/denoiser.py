"""What the network predicts, turned into one thing: x0_hat, the denoised image.

With a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) and x_t = a x_0 + s eps, each row of TARGETS gives
x0_hat = c_skip x_t + c_out net(x_t, t); the training target is that row's inverse (x_0 - c_skip x_t) / c_out.
`eps` is eq. 11 of Ho et al. 2020; `v` = a eps - s x_0 is appendix D of Salimans & Ho 2022; `mu` = A x_0 + B x_t is the mean of
the posterior q(x_{t-1} | x_t, x_0), eq. 7 of Ho et al., on the chain of T steps: x_0 itself at t = 0.

c_out is what a network's error is multiplied by on its way to x0_hat. It is 1 for x0, s for v and s / a for eps, but 1 / A for
mu, thousands at high noise, where mu hardly depends on x_0: clip x0_hat, and keep that network out of bfloat16. A sampler that
steps down the same chain multiplies by A again, so nothing is lost there.

A conditional network may be guided without a classifier (Ho & Salimans 2022, eq. 6): the prediction is
free + w (labelled - free), that is, samples of p(x) p(label | x)^w instead of p(x | label) = p(x) p(label | x)^1. w = 1 is the
plain conditional network and w = 0 the unconditional one; the w of that paper is ours less 1. A learned variance is the
labelled network's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm.diffusion.schedule import NoiseSchedule

# target -> (a, s, A, B) -> (c_skip, c_out); float64 tensors, A and B as in NoiseSchedule.posterior_at.
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda a, s, A, B: (1 / a, -s / a),
    "x0": lambda a, s, A, B: (torch.zeros_like(a), torch.ones_like(a)),
    "v": lambda a, s, A, B: (a, -s),
    "mu": lambda a, s, A, B: (-B / A, 1 / A),
}


NO_LABEL = -1  # in place of a class: nothing is told


def coefficients(schedule: NoiseSchedule, target: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, s, c_skip, c_out at network times t: float64, t's shape. Raises ValueError where a prediction says nothing of x_0.

    That is for eps where alpha_bar = 0, and for mu where it is 0 one step earlier already: of A x_0 + 0 x_t, at the first zero,
    1 / A is large and finite.
    """
    if target not in TARGETS:
        raise ValueError(f"no target '{target}'; there are {', '.join(TARGETS)}")
    log_alpha_bar = schedule.log_alpha_bar_at(t)
    a, s = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
    c_skip, c_out = TARGETS[target](a, s, *schedule.posterior_at(t)[:2])
    if not bool(c_out.isfinite().all()):
        raise ValueError(f"target {target} says nothing of x_0 where alpha_bar = 0; train with target v or x0")
    return a, s, c_skip, c_out


def halves(prediction: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a network gave for `like` [B, C, ...] -> the prediction [B, C, ...], and v, if there were 2C channels.

    v [B, C, ...], the second half of the channels mapped from [-1, 1] to [0, 1], says where the log variance of a step lies
    between those of fixed_small (0) and fixed_large (1): eq. 15 of Nichol & Dhariwal 2021. As there, nothing clamps it.
    """
    if prediction.ndim < 2 or prediction.shape[1] != 2 * like.shape[1]:
        return prediction, None
    prediction, v = prediction.chunk(2, dim=1)
    return prediction, (v + 1) / 2


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
    With a learned variance it gives twice the channels (see `halves`).
    target: what net predicts, a key of TARGETS.
    clip: True clamps x0_hat to [-1, 1]; a number p in (0, 1) is dynamic thresholding at that quantile (see `_clipped`).
    Samplers derive eps again from the clipped x0_hat.
    labels: int64 [B], the class of each image, for a net(x, t, labels) that knows classes, and -1 as no label.
    guidance: w, how far the prediction goes from no label (0) to the label (1) and beyond. Raises ValueError.
    """

    net: Callable[..., Any]
    schedule: NoiseSchedule
    target: str = "eps"
    clip: bool | float = False
    labels: Tensor | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"no target '{self.target}'; there are {', '.join(TARGETS)}")
        if not isinstance(self.clip, bool) and not 0 < self.clip < 1:
            raise ValueError(f"clip = {self.clip} must be True, False, or a quantile between 0 and 1")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance = {self.guidance} must be a finite number")
        if self.labels is None and self.guidance != 1:
            raise ValueError(f"guidance = {self.guidance:g} takes labels, and a network trained with them")

    @property
    def evaluations(self) -> int:
        """Network evaluations of an image in one call: 2 under guidance, except at w = 0 and w = 1."""
        return 1 if self.guidance in (0, 1) else 2

    def _predict(self, x_t: Tensor, times: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network says, guided, and v (see `halves`); x_t [B, ...], times float32 [B]."""
        if self.labels is None:
            return halves(self.net(x_t, times), x_t)
        if len(self.labels) != len(x_t):
            raise ValueError(f"{len(self.labels)} labels for {len(x_t)} images")
        labels = self.labels.to(x_t.device)
        free = torch.full_like(labels, NO_LABEL)
        if self.evaluations == 1:
            return halves(self.net(x_t, times, labels if self.guidance == 1 else free), x_t)
        both = self.net(torch.cat([x_t, x_t]), torch.cat([times, times]), torch.cat([free, labels]))
        (without, _), (told, v) = (halves(half, x_t) for half in both.chunk(2))
        return without + self.guidance * (told - without), v

    def __call__(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x_t [B, ...], t a number or [B] -> x0_hat, like x_t."""
        return self.with_variance(x_t, t)[0]

    def with_variance(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """x_t [B, ...], t a number or [B] -> x0_hat and v (see `halves`), both like x_t; None for v where it is not learned."""
        times = torch.as_tensor(t, dtype=torch.float64).cpu()
        _, _, c_skip, c_out = (c.to(x_t.dtype) for c in coefficients(self.schedule, self.target, times))
        # Nothing here waits for what a GPU still has to do: a single number goes along with the operation that takes it.
        if times.dim() == 0:
            times = torch.full((len(x_t),), times.item(), dtype=torch.float32, device=x_t.device)
        else:
            there: dict[str, Any] = {"device": x_t.device, "non_blocking": x_t.device.type == "cuda"}
            shape = (-1,) + (1,) * (x_t.ndim - 1)
            c_skip, c_out = (c.expand(len(x_t)).to(**there).view(shape) for c in (c_skip, c_out))
            times = times.to(torch.float32).expand(len(x_t)).to(**there)
        prediction, v = self._predict(x_t, times)
        return _clipped(c_skip * x_t + c_out * prediction, self.clip), v
