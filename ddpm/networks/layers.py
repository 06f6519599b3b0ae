"""Layers that networks share and that the CPU kernels speed up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormSwish(nn.GroupNorm):
    """Group normalisation, then swish: precedes every 3x3 convolution of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


FEW = 1024  # positions of an image whose weights of attention may be kept in memory: positions squared


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes scaled dot-product attention of q, k, v [B, heads, positions, channels]: Vaswani et al. 2017, eq. 1.

    In bfloat16 on a CPU, plain products take half the time of torch's fused function for few positions.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= FEW:
        return torch.softmax(q * q.shape[3] ** -0.5 @ k.transpose(2, 3), dim=3, dtype=q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
