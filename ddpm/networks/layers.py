"""Layers that networks share and that the CPU kernels speed up."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class NormSwish(nn.GroupNorm):
    """Group normalisation, then swish: precedes every 3x3 convolution of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))
