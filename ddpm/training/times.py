"""TIMES: the distributions from which a training draws the timesteps of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm.diffusion.schedule import NoiseSchedule

KEPT = 10  # number of losses that `LossAware` remembers for each time
UNIFORM = 0.001  # share of the times drawn uniformly, so that every time occurs: the code of Nichol & Dhariwal 2021
# Mean and standard deviation of log SNR = -2 ln sigma. EDM draws ln sigma with mean -1.2 and standard deviation 1.2.
MEAN, DEVIATION = 2.4, 2.4


class Times:
    """Draws timesteps 0 ... T-1 uniformly, as in algorithm 1 of Ho et al. 2020.

    Args:
        schedule: the noise schedule.
        device: the device of the times.
        unbiased: whether the expectation of the loss must equal the mean loss over uniform times. The losses vlb and hybrid
            need this.
    """

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu", unbiased: bool = False) -> None:
        self.T, self.device, self.unbiased = schedule.T, torch.device(device), unbiased

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that a saved state must contain, by name."""
        return {}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws times, int64 [count] on the generator's device."""
        return torch.randint(self.T, (count,), device=generator.device, generator=generator)

    def weights(self, t: Tensor) -> Tensor | None:
        """Returns the factors [B] of the losses at drawn times t [B], or None if all are 1."""
        return None

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Records the unweighted losses [B] at times t [B]."""


class LossAware(Times):
    """Draws each time with a probability proportional to the RMS of its recent losses: Nichol & Dhariwal 2021, section 3.3.

    Times are drawn uniformly until every time has KEPT losses. Multiplied by weights(t), the loss has the same expectation as
    with uniform times.
    """

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu", unbiased: bool = True) -> None:
        super().__init__(schedule, device, unbiased)
        self.losses = torch.zeros(self.T, KEPT, device=self.device)
        self.counts = torch.zeros(self.T, dtype=torch.int64, device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "counts": self.counts}

    def probabilities(self) -> Tensor:
        """Returns the probability of each time, float32 [T]."""
        size = self.losses.square().mean(1).sqrt()
        uniform = torch.full_like(size, 1 / self.T)
        by_loss = (1 - UNIFORM) * size / size.sum().clamp(min=torch.finfo(size.dtype).tiny) + UNIFORM * uniform
        known = (self.counts >= KEPT).all() & (size.sum() > 0) & size.sum().isfinite()
        return torch.where(known, by_loss, uniform)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.probabilities(), count, replacement=True, generator=generator)

    def weights(self, t: Tensor) -> Tensor | None:
        return 1 / (self.T * self.probabilities()[t])

    def observe(self, t: Tensor, losses: Tensor) -> None:
        order = t.argsort(stable=True)
        total = torch.bincount(t, minlength=self.T)
        before = torch.empty_like(t)  # how many earlier images of the batch have the same time
        before[order] = torch.arange(len(t), device=t.device) - (total.cumsum(0) - total)[t[order]]
        newest = before >= total[t] - KEPT  # of more than KEPT losses at one time, the last KEPT are recorded
        self.losses[t[newest], (self.counts[t] + before)[newest] % KEPT] = losses[newest].to(self.losses.dtype)
        self.counts += total


class LogNormal(Times):
    """Draws times whose log SNR is normal: the distribution of Karras et al. 2022, table 1, on any schedule.

    A time that is drawn more often has more influence on the loss, which is intended. With `unbiased`, weights(t) cancels this
    effect. Raises ValueError for a schedule with fewer than two times of finite log SNR, or with none near the distribution.
    """

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu", unbiased: bool = False) -> None:
        super().__init__(schedule, device, unbiased)
        log_snr = schedule.snr[1:].log()  # falls with t; -inf at the end of some schedules
        finite = log_snr[log_snr.isfinite()]
        if len(finite) < 2:
            raise ValueError("log_normal needs two or more times of finite log SNR; take uniform, or more timesteps")
        edges = torch.cat([finite[:1] + (finite[:1] - finite[1:2]) / 2, (finite[1:] + finite[:-1]) / 2])
        edges = torch.cat([edges, finite[-1:] - (finite[-2:-1] - finite[-1:]) / 2])
        below = torch.special.ndtr((edges - MEAN) / DEVIATION)
        between = torch.cat([below[:-1] - below[1:], torch.zeros(len(log_snr) - len(finite), dtype=below.dtype)])
        if between.sum() == 0:
            low, high = float(finite[-1]), float(finite[0])
            raise ValueError(
                f"log_normal draws log SNR near {MEAN:g}, but this schedule has {low:.3g} ... {high:.3g};"
                " take uniform, or a schedule that adds more noise"
            )
        table = (1 - UNIFORM) * between / between.sum() + UNIFORM / self.T
        self.table = table.to(self.device, torch.float32)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.table, count, replacement=True, generator=generator)

    def weights(self, t: Tensor) -> Tensor | None:
        return 1 / (self.T * self.table[t]) if self.unbiased else None


# name -> (schedule, device, unbiased) -> times
TIMES: dict[str, Callable[[NoiseSchedule, torch.device, bool], Times]] = {
    "uniform": Times,
    "loss_aware": LossAware,
    "log_normal": LogNormal,
}
