"""Converts any network's prediction to x0_hat, the estimate of the clean image.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), x_t = a x_0 + s eps. Each row of TARGETS gives c_skip and c_out of
x0_hat = c_skip x_t + c_out net(x_t, t). The training target is the inverse, (x_0 - c_skip x_t) / c_out.

- `eps` is the noise: eq. 11 of Ho et al. 2020.
- `x0` is the clean image.
- `v` = a eps - s x_0: appendix D of Salimans & Ho 2022.
- `mu` = A x_0 + B x_t is the mean of the posterior q(x_{t-1} | x_t, x_0) on the chain of T steps: eq. 7 of Ho et al.
  2020. At t = 0 it is x_0.
- `flow` = eps - x_0 is the velocity along the straight path from x_0 to eps: eq. 1 of Liu et al. 2023 (rectified flow).

A network's error is multiplied by |c_out| on its way to x0_hat: by 1 for x0, s for v, s / (a + s) for flow, s / a for eps,
and 1 / A for mu.
At high noise mu hardly depends on x_0, so 1 / A reaches thousands: clip x0_hat, and don't run such a network in
bfloat16. A sampler that steps down the same chain multiplies by A again and loses nothing.

Classifier-free guidance (Ho & Salimans 2022, eq. 6) combines two predictions of a conditional network to
free + w (labelled - free). Guided samples follow p(x) p(label | x)^w. So w = 1 gives p(x | label), and w = 0 gives the
unconditional network. The paper's w is this w minus 1. A learned variance comes from the labelled prediction.

Guidance may be limited to an interval of noise levels, with w = 1 outside (Kynkaanniemi et al. 2024). The guided
prediction may be rescaled towards the standard deviation of the labelled prediction (section 3.4 of Lin et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm.diffusion.schedule import NoiseSchedule

# target -> function of (a, s, A, B) that returns (c_skip, c_out): float64 tensors, A and B as in `posterior_at`.
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda a, s, A, B: (1 / a, -s / a),
    "x0": lambda a, s, A, B: (torch.zeros_like(a), torch.ones_like(a)),
    "v": lambda a, s, A, B: (a, -s),
    "mu": lambda a, s, A, B: (-B / A, 1 / A),
    "flow": lambda a, s, A, B: (1 / (a + s), -s / (a + s)),
}


NO_LABEL = -1  # the label for which a conditional network predicts without a class


def coefficients(schedule: NoiseSchedule, target: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns a, s, c_skip and c_out at timesteps t: float64, t's shape.

    Raises:
        ValueError: the target is unknown, or does not determine x_0 at one of the times. `eps` fails where alpha_bar =
            0. `mu` fails only where alpha_bar is already 0 one step earlier. At the first time with alpha_bar = 0, 1 / A
            is large but still finite.
    """
    if target not in TARGETS:
        raise ValueError(f"no target '{target}'; there are {', '.join(TARGETS)}")
    log_alpha_bar = schedule.log_alpha_bar_at(t)
    a, s = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
    c_skip, c_out = TARGETS[target](a, s, *schedule.posterior_at(t)[:2])
    if not bool(c_out.isfinite().all()):
        raise ValueError(f"target {target} does not determine x_0 at these times; train with target v, x0 or flow")
    return a, s, c_skip, c_out


def split_variance(prediction: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Splits a network's output into the prediction [B, C, ...] and v. v is None without a learned variance.

    `like` is the network's input, [B, C, ...]. A network with a learned variance returns 2C channels. v [B, C, ...] is
    the second half of them, mapped from [-1, 1] to [0, 1]. v interpolates the log variance of a step between fixed_small
    (v = 0) and fixed_large (v = 1): eq. 15 of Nichol & Dhariwal 2021. As in the paper, v is not clamped.
    """
    if prediction.ndim < 2 or prediction.shape[1] != 2 * like.shape[1]:
        return prediction, None
    prediction, v = prediction.chunk(2, dim=1)
    return prediction, (v + 1) / 2


def _clipped(x0_hat: Tensor, clip: bool | float) -> Tensor:
    """Returns x0_hat [B, ...] unchanged (False), clamped to [-1, 1] (True), or dynamically thresholded (a number).

    Dynamic thresholding clamps each image to [-s, s] and divides it by s (section 2.3 of Saharia et al. 2022, Imagen).
    Here s is the quantile `clip` of the image's |x0_hat|, or 1 if the quantile is below 1.
    """
    if isinstance(clip, bool):
        return x0_hat.clamp(-1, 1) if clip else x0_hat
    s = x0_hat.flatten(1).abs().quantile(clip, dim=1).clamp(min=1).view(-1, *[1] * (x0_hat.ndim - 1))
    return x0_hat.clamp(-s, s) / s


def check_guidance(interval: tuple[float, float] | None, rescale: float) -> None:
    """Raises ValueError if `interval` or `rescale` is out of range."""
    if interval is not None and not 0 <= interval[0] < interval[1] < math.inf:
        raise ValueError(f"guidance_interval: expected two noise levels, 0 <= low < high (given: {list(interval)})")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale = {rescale} must lie in [0, 1]")


def _rescaled(guided: Tensor, labelled: Tensor, share: float) -> Tensor:
    """Rescales the guided prediction by `share` towards the standard deviation of `labelled`: eq. 15 and 16 of Lin et al."""
    if not share:
        return guided
    shape = (-1, *[1] * (guided.ndim - 1))
    deviation, wanted = (x.flatten(1).std(dim=1, correction=0).view(shape) for x in (guided, labelled))
    return guided * torch.where(deviation > 0, share * (wanted / deviation) + 1 - share, 1.0)


@dataclass(frozen=True)
class Denoiser:
    """Estimates the clean image from a noisy one with any network: x0_hat = denoiser(x_t, t).

    Args:
        net: called as net(x, t) with x [B, ...] and t float32 [B] in 0 ... T-1, as in Ho et al. 2020 and diffusers; t
            may be fractional. `net` returns a prediction like x, or twice the channels with a learned variance (see
            `split_variance`).
        schedule: the noise schedule that the network was trained on.
        target: what the network predicts, a key of TARGETS.
        clip: True clamps x0_hat to [-1, 1]. A number in (0, 1) is the quantile of dynamic thresholding (see
            `_clipped`). Samplers derive eps again from the clipped x0_hat.
        labels: int64 [B], the class of each image, or -1 for no label. With labels, the network is called as net(x, t,
            labels).
        guidance: w of classifier-free guidance: 0 ignores the labels, 1 follows them, and more than 1 exaggerates them.
        guidance_interval: (low, high). Guidance applies at noise levels low < sigma <= high, with sigma = s / a. Other
            levels have w = 1. None applies guidance at all levels.
        guidance_rescale: phi in [0, 1]. The guided prediction of each image is multiplied by
            phi std(labelled) / std(guided) + 1 - phi, with standard deviations over the image.

    Raises:
        ValueError: the target is unknown, `clip` or a guidance setting is out of range, or guidance has no labels.
    """

    net: Callable[..., Any]
    schedule: NoiseSchedule
    target: str = "eps"
    clip: bool | float = False
    labels: Tensor | None = None
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"no target '{self.target}'; there are {', '.join(TARGETS)}")
        if not isinstance(self.clip, bool) and not 0 < self.clip < 1:
            raise ValueError(f"clip = {self.clip} must be True, False, or a quantile between 0 and 1")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance = {self.guidance} must be a finite number")
        if self.labels is None and self.guidance != 1:
            raise ValueError(f"guidance = {self.guidance:g} needs labels, and a network that was trained with labels")
        check_guidance(self.guidance_interval, self.guidance_rescale)

    def evaluations(self, t: Tensor | float) -> int:
        """Returns how often a call at timesteps t evaluates the network per image.

        The network is evaluated once if the guidance strength w is 0 at every timestep in t, or 1 at every timestep in t.
        Otherwise it is evaluated twice.
        """
        w = self._strength(torch.as_tensor(t, dtype=torch.float64).cpu())
        return 1 if bool((w == 1).all() or (w == 0).all()) else 2

    def _strength(self, times: Tensor) -> Tensor:
        """Returns the guidance strength w at timesteps: float64, shaped like `times`, on the CPU."""
        w = torch.full_like(times, self.guidance)
        if self.guidance_interval is None:
            return w
        low, high = self.guidance_interval
        sigma = torch.expm1(-self.schedule.log_alpha_bar_at(times)).sqrt()
        return torch.where((low < sigma) & (sigma <= high), w, 1.0)

    def _predict(self, x_t: Tensor, times: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the guided prediction and v (see `split_variance`), for x_t [B, ...] and times float32 [B].

        w: the strength of guidance, float64 [] or [B], on the CPU.
        """
        if self.labels is None:
            return split_variance(self.net(x_t, times), x_t)
        if len(self.labels) != len(x_t):
            raise ValueError(f"{len(self.labels)} labels for {len(x_t)} images")
        labels = self.labels.to(x_t.device)
        no_labels = torch.full_like(labels, NO_LABEL)
        for single_w, given_labels in ((1, labels), (0, no_labels)):  # these strengths need one evaluation
            if bool((w == single_w).all()):
                return split_variance(self.net(x_t, times, given_labels), x_t)
        outputs = self.net(torch.cat([x_t, x_t]), torch.cat([times, times]), torch.cat([no_labels, labels]))
        (free, _), (labelled, v) = (split_variance(output, x_t) for output in outputs.chunk(2))
        share = w.item() if w.dim() == 0 else w.to(x_t).view(-1, *[1] * (x_t.ndim - 1))
        return _rescaled(free + share * (labelled - free), labelled, self.guidance_rescale), v

    def __call__(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Returns x0_hat, like x_t [B, ...]. t is a timestep in 0 ... T-1, a number or [B]."""
        return self.with_variance(x_t, t)[0]

    def with_variance(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """Returns x0_hat and v, both like x_t [B, ...]. v is None without a learned variance (see `split_variance`).

        t is a timestep in 0 ... T-1, a number or [B].
        """
        times = torch.as_tensor(t, dtype=torch.float64).cpu()
        _, _, c_skip, c_out = (c.to(x_t.dtype) for c in coefficients(self.schedule, self.target, times))
        w = self._strength(times)
        # Does not synchronise the GPU: a single number is passed as an argument, and a vector is copied without blocking.
        if times.dim() == 0:
            times = torch.full((len(x_t),), times.item(), dtype=torch.float32, device=x_t.device)
        else:
            placement: dict[str, Any] = {"device": x_t.device, "non_blocking": x_t.device.type == "cuda"}
            shape = (-1,) + (1,) * (x_t.ndim - 1)
            c_skip, c_out = (c.expand(len(x_t)).to(**placement).view(shape) for c in (c_skip, c_out))
            times = times.to(torch.float32).expand(len(x_t)).to(**placement)
        prediction, v = self._predict(x_t, times, w)
        return _clipped(c_skip * x_t + c_out * prediction, self.clip), v
