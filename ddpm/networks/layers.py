"""Layers that networks share and that the CPU kernels speed up."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormSwish(nn.GroupNorm):
    """Applies group normalisation, then swish, to x [B, C, H, W]. A shift [B, C] is added to every pixel first, if given."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.silu(super().forward(x if shift is None else x + shift[:, :, None, None]))


class AddingConvolution(nn.Conv2d):
    """Convolves x and adds the result to `onto`, a tensor of the result's shape."""

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:  # type: ignore[override]
        return onto + super().forward(x)


def unrounded(last: nn.Module, h: Tensor) -> Tensor:
    """Applies the last layer of a network in the type of its weights, even under autocast.

    In bfloat16 the layer would round the prediction to 8 bits, which changes the FID of samples by several per cent.
    """
    with torch.autocast(h.device.type, enabled=False):
        prediction: Tensor = last(h.to(next(last.parameters()).dtype))
    return prediction


class SharedDropout(nn.Dropout):
    """Dropout for one of several processes that share each batch.

    Every process draws the mask of the whole batch and uses its own rows. So the number of processes does not change the
    mask.

    Args:
        p: the probability of a zero.
        rank: the index of this process, from 0. Each process has an equal share of the rows, in the order of the ranks.
        size: the number of processes.
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
    query = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch lack this function
    return query is not None and bool(query().get("amx_bf16", False))


FEW = 1024  # most positions for which `attention` may store its weights, a matrix of positions x positions


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes scaled dot-product attention of q, k, v [B, heads, positions, channels]: Vaswani et al. 2017, eq. 1.

    On a CPU, for few positions in bfloat16, plain matrix products replace torch's fused function where they are faster: by a
    quarter in training, and by half on a processor without AMX. In sampling with AMX, the fused function takes half the time.
    """
    training = torch.is_grad_enabled() and q.requires_grad
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= FEW and (training or not _has_amx()):
        return torch.softmax(q * q.shape[3] ** -0.5 @ k.transpose(2, 3), dim=3, dtype=q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def time_embedding(t: Tensor, channels: int, shift: float = 1) -> Tensor:
    """Embeds t [B] in [B, channels]: sinusoids of Vaswani et al. 2017, sines first as in Ho et al.'s code.

    The frequencies fall from 1 to 1 / 10,000. With shift = 0, as in Vaswani et al., they end slightly above 1 / 10,000.
    """
    half = channels // 2
    step = -math.log(10_000) / (half - shift)
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * step)
    angles = t.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
