"""What training minimises, for any prediction target: L_simple, the bound, the hybrid of both, and min-SNR weights.

The bound of eq. 5 of Ho et al. 2020 is L_T + L_{T-1} + ... + L_0: Gaussian KLs between the posterior q(x_{t-1} | x_t, x_0) and
the network's p(x_{t-1} | x_t), and at t = 0 the likelihood of the 8-bit image under a discretised Gaussian (eq. 13). It is in
nats per dimension here, and each image's part is T times the term of its own time, so the mean over uniform times is the
whole bound without the constant L_T. With a fixed variance the terms t > 0 are the weighted squared errors of eq. 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm.diffusion import gaussian
from ddpm.diffusion.denoiser import coefficients, halves
from ddpm.diffusion.schedule import NoiseSchedule

HYBRID = 0.001  # lambda of eq. 16 of Nichol & Dhariwal 2021
GAMMA = 5.0  # of Hang et al. 2023


@dataclass(frozen=True)
class Outcome:
    """What the network was asked and what it said: all [B, C, ...], but t int64 [B]; v is None where it is not learned."""

    x_0: Tensor
    t: Tensor
    target: Tensor
    prediction: Tensor
    v: Tensor | None


@dataclass(frozen=True)
class Objective:
    """Tables over network times 0 ... T-1, float32 on a device, from which a training pair and its loss are gathered.

    x_t = a x_0 + s eps, and the network's target is from_x0 x_0 + from_eps eps: the inverse of the target's row in
    ddpm.diffusion.denoiser.TARGETS, written so that nothing cancels. min_snr: weights of the squared error. to_mean: the factor
    of an error of the prediction in the mean of p(x_{t-1} | x_t). log_small, log_large: of its variance, beta_tilde (at
    t = 0 that of t = 1, since it is 0 there) and beta. log_fixed: log_large, but log_small at t = 0, as in Ho et al.'s code.
    loss: a key of LOSSES.
    """

    a: Tensor
    s: Tensor
    from_x0: Tensor
    from_eps: Tensor
    min_snr: Tensor
    to_mean: Tensor
    log_small: Tensor
    log_large: Tensor
    log_fixed: Tensor
    loss: str = "simple"

    @classmethod
    def of(
        cls, schedule: NoiseSchedule, target: str, device: torch.device | str = "cpu", loss: str = "simple"
    ) -> Objective:
        """Raises ValueError for an unknown loss or target, and for a target that the schedule cannot train."""
        if loss not in LOSSES:
            raise ValueError(f"no loss '{loss}'; there are {', '.join(LOSSES)}")
        t = torch.arange(schedule.T)
        a, s, c_skip, c_out = coefficients(schedule, target, t)
        on_x0, _, log_small, log_large = schedule.posterior_at(t)
        log_small[0] = log_small[1] if schedule.T > 1 else log_large[0]
        log_fixed = torch.cat([log_small[:1], log_large[1:]])
        # In x_0 the weight is min(SNR, gamma), and an error of the prediction is c_out times as large there.
        # Not SNR times c_out^2: at a very small a the one vanishes and the other overflows.
        min_snr = torch.minimum((a / s * c_out).square(), GAMMA * c_out.square())
        tables = {
            "a": a,
            "s": s,
            "from_x0": (1 - c_skip * a) / c_out,
            "from_eps": -c_skip * s / c_out,
            "min_snr": min_snr,
            "to_mean": on_x0 * c_out,
            "log_small": log_small,
            "log_large": log_large,
            "log_fixed": log_fixed,
        }
        return cls(**{name: table.to(device, torch.float32) for name, table in tables.items()}, loss=loss)

    def pair(self, x_0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """x_0, eps [B, ...] and t int64 [B] -> (x_t, target), both like x_0."""
        a, s, from_x0, from_eps = (at(table, t, x_0) for table in (self.a, self.s, self.from_x0, self.from_eps))
        return a * x_0 + s * eps, from_x0 * x_0 + from_eps * eps

    def outcome(self, net: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, t: Tensor, eps: Tensor) -> Outcome:
        """One evaluation of the network, in float32."""
        x_t, target = self.pair(x_0, t, eps)
        return Outcome(x_0, t, target, *halves(net(x_t, t.float()).float(), x_0))

    def losses(self, net: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of each image, float32 [B]. Raises ValueError for the hybrid of a network without learned variance."""
        return LOSSES[self.loss](self, self.outcome(net, x_0, t, eps))


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """A table's entries at t [B], shaped to go with `like` [B, ...]."""
    return table[t].view(-1, *[1] * (like.ndim - 1))


def simple(objective: Objective, outcome: Outcome) -> Tensor:
    """Eq. 14 of Ho et al. 2020: the mean squared error of the prediction."""
    return (outcome.prediction - outcome.target).square().flatten(1).mean(1)


def min_snr(objective: Objective, outcome: Outcome) -> Tensor:
    """Hang et al. 2023: the squared error of x0_hat weighted with min(SNR, 5), whatever the prediction."""
    return objective.min_snr[outcome.t] * simple(objective, outcome)


def vlb(objective: Objective, outcome: Outcome) -> Tensor:
    """The image's part of the bound in nats per dimension (see the module); v decides on the variance where it is learned."""
    x_0, t = outcome.x_0, outcome.t
    small, large, log_variance, to_mean = (
        at(table, t, x_0)
        for table in (objective.log_small, objective.log_large, objective.log_fixed, objective.to_mean)
    )
    if outcome.v is not None:
        log_variance = outcome.v * large + (1 - outcome.v) * small
    # Both means share the part of x_t, which cancels.
    target, prediction = to_mean * outcome.target, to_mean * outcome.prediction
    kl = gaussian.gaussian_kl(target, small, prediction, log_variance)
    decoder = -gaussian.discretised_log_likelihood(x_0, x_0 + (prediction - target), log_variance)
    last = (t == 0).view(-1, *[1] * (x_0.ndim - 1))
    return len(objective.a) * torch.where(last, decoder, kl).flatten(1).mean(1)


def hybrid(objective: Objective, outcome: Outcome) -> Tensor:
    """Eq. 16 of Nichol & Dhariwal 2021: L_simple trains the mean, and 0.001 of the bound the variance alone."""
    if outcome.v is None:
        raise ValueError("loss hybrid trains a learned variance, and this network has none")
    stopped = replace(outcome, prediction=outcome.prediction.detach())
    return simple(objective, outcome) + HYBRID * vlb(objective, stopped)


LOSSES: dict[str, Callable[[Objective, Outcome], Tensor]] = {
    "simple": simple,
    "vlb": vlb,
    "hybrid": hybrid,
    "min_snr": min_snr,
}
