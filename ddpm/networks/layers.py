"""Layers that networks share and that the CPU kernels speed up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormSwish(nn.GroupNorm):
    """Group normalisation, then swish: precedes every 3x3 convolution of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class SharedDropout(nn.Dropout):
    """Dropout with one process's rows of the mask that a single process would draw for the whole batch.

    Every process draws the whole mask, so that the number of processes changes no bit of it.

    Args:
        p: the probability of a zero.
        rank: number of this process, from 0. It has an equal share of the rows, in the order of the ranks.
        size: how many processes there are.
    """

    def __init__(self, p: float, rank: int, size: int) -> None:
        super().__init__(p)
        self.rank, self.size = rank, size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape, strides = (len(x) * self.size, *x.shape[1:]), (x[0].numel(), *x.stride()[1:])
        ones = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).fill_(1)
        return x * F.dropout(ones, self.p)[self.rank * len(x) : (self.rank + 1) * len(x)]


FEW = 1024  # positions of an image whose weights of attention may be kept in memory: positions squared


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes scaled dot-product attention of q, k, v [B, heads, positions, channels]: Vaswani et al. 2017, eq. 1.

    In bfloat16 on a CPU, plain products take half the time of torch's fused function for few positions.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= FEW:
        return torch.softmax(q * q.shape[3] ** -0.5 @ k.transpose(2, 3), dim=3, dtype=q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
