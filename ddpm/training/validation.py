"""Computes losses on held-out images. Times and noise are fixed, so that the losses of training steps can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddpm.training.fit import autocast, conditioned, scaled
from ddpm.training.objective import LOSSES, Objective

BINS, BIN_IMAGES = 10, 256  # `by_time`: the number of ranges of timesteps, and the most images per range


@dataclass(frozen=True)
class Validation:
    """Images to validate a network on.

    Args:
        images: uint8 [N, C, H, W], on the network's device.
        objective: the loss.
        batch: the number of images in a batch.
        precision: "float32" or "bfloat16" (autocast).
        labels: int64 [N] on the network's device, for a conditional network.
    """

    images: Tensor
    objective: Objective
    batch: int
    precision: str = "float32"
    labels: Tensor | None = None

    def loss(self, net: Callable[..., Tensor]) -> float:
        """Returns the objective's mean loss at times spread evenly over 0 ... T-1. Needs at least one image."""
        generator = torch.Generator(self.images.device).manual_seed(0)
        order = torch.randperm(len(self.images), device=self.images.device, generator=generator)
        times = self._spread(len(self.images), 0, len(self.objective.a))[order]
        return self._means(net, times, generator, (self.objective.loss,))[0]

    def by_time(self, net: Callable[..., Tensor]) -> list[dict[str, Any]]:
        """Returns the losses by timestep: a row for each of BINS even ranges of 0 ... T-1.

        A row has these entries. Without images, the losses are "".

        - t: the middle of the range.
        - loss_simple: L_simple.
        - loss_vlb: the bound's terms times T, in nats per dimension.

        Each image has one time, and the times are spread evenly over the range. If every time of the range occurs equally
        often, the mean of loss_vlb over equal ranges is the bound without L_T. With few images, loss_vlb shows only roughly
        which times contribute to the bound. For example, t = 0 (the time of L_0) occurs only with more than T / (2 BINS)
        images. `ddpm.diffusion.bound` computes the bound itself.
        """
        generator = torch.Generator(self.images.device).manual_seed(0)
        T, count = len(self.objective.a), min(len(self.images), BIN_IMAGES)
        bins, rows = min(BINS, T), []
        for start, end in pairwise(T * i // bins for i in range(bins + 1)):
            means: list[Any] = ["", ""]
            if count:
                means = self._means(net, self._spread(count, start, end), generator, ("simple", "vlb"))
            rows.append({"t": (start + end - 1) // 2, "loss_simple": means[0], "loss_vlb": means[1]})
        return rows

    def _spread(self, count: int, start: int, end: int) -> Tensor:
        """Returns a time for each of `count` images, spread evenly over start ... end - 1."""
        return (start + (torch.arange(count, device=self.images.device) + 0.5) / count * (end - start)).long()

    @torch.no_grad()
    def _means(
        self, net: Callable[..., Tensor], times: Tensor, generator: torch.Generator, names: tuple[str, ...]
    ) -> list[float]:
        """Returns the mean of each loss over the first N images.

        Args:
            net: the network.
            times: the timestep of each image, int64 [N].
            generator: the generator of the noise.
            names: keys of LOSSES.
        """
        total = torch.zeros(len(names), dtype=torch.float64, device=times.device)
        for start in range(0, len(times), self.batch):
            rows = slice(start, min(start + self.batch, len(times)))
            x_0 = scaled(self.images[rows])
            eps = torch.randn(x_0.shape, device=times.device, generator=generator)
            with autocast(times.device, self.precision):
                labelled = conditioned(net, None if self.labels is None else self.labels[rows])
                outcome = self.objective.outcome(labelled, x_0, times[rows], eps)
                total += torch.stack([LOSSES[name](self.objective, outcome).sum() for name in names])
        return [value / len(times) for value in total.tolist()]
