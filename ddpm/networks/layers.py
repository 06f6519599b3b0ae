"""Layers that networks share, and that the CPU kernels know."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class NormSwish(nn.GroupNorm):
    """Group normalisation, then swish: what is before every convolution of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))
