"""What training minimises: L_simple, eq. 14 of Ho et al. 2020, for any prediction target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.denoiser import coefficients
from ddpm.schedule import NoiseSchedule


@dataclass(frozen=True)
class Objective:
    """Tables over network times 0 ... T-1, float32 on a device, from which a training pair is gathered.

    x_t = a x_0 + s eps, and the network's target is from_x0 x_0 + from_eps eps: the inverse of the target's row in
    ddpm.denoiser.TARGETS, written so that nothing cancels.
    """

    a: Tensor
    s: Tensor
    from_x0: Tensor
    from_eps: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, target: str, device: torch.device | str = "cpu") -> Objective:
        a, s, c_skip, c_out = coefficients(schedule, target, torch.arange(schedule.T))
        tables = (a, s, (1 - c_skip * a) / c_out, -c_skip * s / c_out)
        return cls(*(table.to(device, torch.float32) for table in tables))

    def pair(self, x_0: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """x_0, eps [B, ...] and t int64 [B] -> (x_t, target), both like x_0."""
        shape = (-1,) + (1,) * (x_0.ndim - 1)
        a, s, from_x0, from_eps = (table[t].view(shape) for table in (self.a, self.s, self.from_x0, self.from_eps))
        return a * x_0 + s * eps, from_x0 * x_0 + from_eps * eps

    def losses(self, net: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_simple of each image: the mean squared error of the prediction over its values, float32 [B]."""
        x_t, target = self.pair(x_0, t, eps)
        return (net(x_t, t.float()).float() - target).square().flatten(1).mean(1)
