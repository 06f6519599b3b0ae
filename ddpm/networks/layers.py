"""Layers that networks share and that the CPU kernels speed up."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormSwish(nn.GroupNorm):
    """Adds shift [B, C], if it is given, to every pixel of x [B, C, H, W]. Then group normalisation and swish."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.silu(super().forward(x if shift is None else x + shift[:, :, None, None]))


class AddingConvolution(nn.Conv2d):
    """Convolves x and adds the result to `onto`, a tensor of its shape."""

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:  # type: ignore[override]
        return onto + super().forward(x)


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


@cache
def _has_amx() -> bool:
    query = getattr(torch.cpu, "get_capabilities", None)  # not in every torch that we allow
    return query is not None and bool(query().get("amx_bf16", False))


FEW = 1024  # positions of an image whose weights of attention may be kept in memory: positions squared


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes scaled dot-product attention of q, k, v [B, heads, positions, channels]: Vaswani et al. 2017, eq. 1.

    In bfloat16 on a CPU, plain products are faster than torch's fused function for few positions: in training by a quarter, and
    by half where the processor has no AMX. With AMX, the fused function takes half the time in sampling.
    """
    trained = torch.is_grad_enabled() and q.requires_grad
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= FEW and (trained or not _has_amx()):
        return torch.softmax(q * q.shape[3] ** -0.5 @ k.transpose(2, 3), dim=3, dtype=q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def time_embedding(t: Tensor, channels: int, shift: float = 1) -> Tensor:
    """Embeds t [B] in [B, channels]: sinusoids of Vaswani et al. 2017, sines first as in Ho et al.'s code.

    The frequencies fall from 1 to 1 / 10,000. With shift = 0, as in Vaswani et al., the lowest is slightly above 1 / 10,000.
    """
    half = channels // 2
    step = -math.log(10_000) / (half - shift)
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * step)
    angles = t.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
