"""Computes training losses for any prediction target: L_simple, the bound, the hybrid of both, and min-SNR weights.

The bound of eq. 5 of Ho et al. 2020 is L_T + L_{T-1} + ... + L_0. The terms L_{T-1} ... L_1, at timesteps t > 0, are
KLs between two Gaussians, the posterior q(x_{t-1} | x_t, x_0) and the network's p(x_{t-1} | x_t). L_0, at t = 0, is the
negative log-likelihood of the 8-bit image under a discretised Gaussian (eq. 13). With a fixed variance, the terms at t > 0
are the weighted squared errors of eq. 12, up to a constant.

Here the bound is in nats per dimension. The loss of an image is T times the bound's term at the image's time. So the mean
over uniform times is the whole bound without the constant L_T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm.diffusion import gaussian
from ddpm.diffusion.denoiser import coefficients, split_variance
from ddpm.diffusion.schedule import NoiseSchedule

HYBRID = 0.001  # lambda of eq. 16 of Nichol & Dhariwal 2021
GAMMA = 5.0  # gamma of Hang et al. 2023


@dataclass(frozen=True)
class Prediction:
    """A prediction of the network, and the target that it should match.

    Args:
        x_0: clean images, [B, C, ...].
        t: timesteps, int64 [B].
        target: the tensor that the network should predict, like x_0.
        prediction: the tensor that the network predicted, like x_0.
        v: the network's learned variance (see `split_variance`), like x_0; None without a learned variance.
    """

    x_0: Tensor
    t: Tensor
    target: Tensor
    prediction: Tensor
    v: Tensor | None


@dataclass(frozen=True)
class Objective:
    """A loss for a schedule and a target, as tables over timesteps 0 ... T-1: float32 [T] on one device.

    x_t = a x_0 + s eps, and the network's target is from_x0 x_0 + from_eps eps. This equals (x_0 - c_skip x_t) / c_out in
    ddpm.diffusion.denoiser, but has no cancellation of large terms.

    Args:
        a: factor of x_0 in x_t.
        s: factor of eps in x_t.
        from_x0: factor of x_0 in the target.
        from_eps: factor of eps in the target.
        min_snr: min-SNR weight of the squared error of the prediction.
        to_mean: the factor by which an error of the prediction enters the mean of p(x_{t-1} | x_t).
        log_small: log beta_tilde, the smaller variance of p. At t = 0, where beta_tilde is 0, the entry of t = 1 is used.
        log_large: log beta, the larger variance of p.
        log_fixed: log_small at t = 0, as in Ho et al.'s code, and log_large at other times.
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
        """Builds the tables.

        Args:
            schedule: the noise schedule.
            target: a key of ddpm.diffusion.denoiser.TARGETS.
            device: the device of the tables.
            loss: a key of LOSSES.

        Raises:
            ValueError: the loss or target is unknown, or a network with this target cannot be trained on the schedule.
        """
        if loss not in LOSSES:
            raise ValueError(f"no loss '{loss}'; there are {', '.join(LOSSES)}")
        t = torch.arange(schedule.T)
        a, s, c_skip, c_out = coefficients(schedule, target, t)
        on_x0, _, log_small, log_large = schedule.posterior_at(t)
        log_small[0] = log_small[1] if schedule.T > 1 else log_large[0]
        log_fixed = torch.cat([log_small[:1], log_large[1:]])
        # The squared error of x0_hat has the weight min(SNR, gamma), and x0_hat's error is c_out times the prediction's error.
        # SNR times c_out^2 is computed as (a / s * c_out)^2: if a is very small, SNR underflows and c_out^2 overflows.
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
        """Returns (x_t, target), both shaped like x_0 and eps [B, ...], at timesteps t, int64 [B]."""
        a, s, from_x0, from_eps = (_gather(table, t, x_0) for table in (self.a, self.s, self.from_x0, self.from_eps))
        return a * x_0 + s * eps, from_x0 * x_0 + from_eps * eps

    def outcome(self, net: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, t: Tensor, eps: Tensor) -> Prediction:
        """Evaluates the network once at (x_t, t). Returns the prediction in float32, with the target. See `losses`."""
        x_t, target = self.pair(x_0, t, eps)
        return Prediction(x_0, t, target, *split_variance(net(x_t, t.float()).float(), x_0))

    def losses(self, net: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Returns the loss of each image, float32 [B].

        Args:
            net: net(x, t) -> prediction like x, or twice the channels with a learned variance.
            x_0: clean images, [B, C, ...] in [-1, 1].
            t: timesteps, int64 [B].
            eps: standard normal noise, like x_0.

        Raises:
            ValueError: the loss is hybrid and the network has no learned variance.
        """
        return LOSSES[self.loss](self, self.outcome(net, x_0, t, eps))


def _gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Returns a table's entries at t [B], shaped to broadcast with `like` [B, ...]."""
    return table[t].view(-1, *[1] * (like.ndim - 1))


def simple(objective: Objective, outcome: Prediction) -> Tensor:
    """Returns the mean squared error of the prediction: eq. 14 of Ho et al. 2020."""
    return (outcome.prediction - outcome.target).square().flatten(1).mean(1)


def min_snr(objective: Objective, outcome: Prediction) -> Tensor:
    """Returns the squared error of x0_hat with weight min(SNR, 5), for any target: Hang et al. 2023."""
    return objective.min_snr[outcome.t] * simple(objective, outcome)


def vlb(objective: Objective, outcome: Prediction) -> Tensor:
    """Returns T times the bound's term at each image's time, in nats per dimension. Uses a learned variance if there is one."""
    x_0, t = outcome.x_0, outcome.t
    small, large, log_variance, to_mean = (
        _gather(table, t, x_0)
        for table in (objective.log_small, objective.log_large, objective.log_fixed, objective.to_mean)
    )
    if outcome.v is not None:
        log_variance = outcome.v * large + (1 - outcome.v) * small
    # Both means contain the same multiple of x_t. That part cancels and is left out.
    target, prediction = to_mean * outcome.target, to_mean * outcome.prediction
    kl = gaussian.gaussian_kl(target, small, prediction, log_variance)
    decoder = -gaussian.discretised_log_likelihood(x_0, x_0 + (prediction - target), log_variance)
    last = (t == 0).view(-1, *[1] * (x_0.ndim - 1))
    return len(objective.a) * torch.where(last, decoder, kl).flatten(1).mean(1)


def hybrid(objective: Objective, outcome: Prediction) -> Tensor:
    """Returns L_simple, which trains the mean, plus 0.001 times the bound, which trains only the variance.

    See eq. 16 of Nichol & Dhariwal 2021. Raises ValueError if the network has no learned variance.
    """
    if outcome.v is None:
        raise ValueError("loss hybrid trains a learned variance, and this network has none")
    stopped = replace(outcome, prediction=outcome.prediction.detach())
    return simple(objective, outcome) + HYBRID * vlb(objective, stopped)


# name -> function of (objective, outcome) that returns the loss of each image, float32 [B].
LOSSES: dict[str, Callable[[Objective, Prediction], Tensor]] = {
    "simple": simple,
    "vlb": vlb,
    "hybrid": hybrid,
    "min_snr": min_snr,
}
