"""Draws Gaussian noise as a function of (seed, image, draw). So batch size, thread count and sharding change no bit of the noise.

The generator is Philox4x32-10 (Salmon et al. 2011), computed with integer tensor operations. The map to a Gaussian uses
only additions, multiplications, divisions and square roots, which IEEE 754 rounds the same way on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Applies Philox4x32: maps four int64 tensors of 32-bit words to four such tensors. The key has two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, so both 32-bit halves come out right.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> 32) & _MASK ^ c1 ^ k0, (product0 >> 32) & _MASK ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _log(x: Tensor) -> Tensor:
    """Returns the natural logarithm of positive normal float32 numbers, to 1e-7, by correctly rounded operations only."""
    bits = x.view(torch.int32)
    # x = m 2^e with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh((m - 1) / (m + 1)).
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).view(torch.float32)
    r = (mantissa - 1) / (mantissa + 1)
    r2 = r * r
    series = r2 * (r2 * (r2 * (r2 * (1 / 9) + 1 / 7) + 1 / 5) + 1 / 3)
    return exponent.float() * 0.6931471805599453 + (r + r * series) * 2


# erfinv(y) = y p(w), w = -log(1 - y^2): the single-precision fit of Giles 2010, table 5.
_CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Evaluates a polynomial at x by Horner's rule. The coefficient of the highest power comes first."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value.mul_(x).add_(coefficient)
    return value


def _inverse_normal(words: Tensor) -> Tensor:
    """Maps 32-bit words to standard normal float32: the quantile at (u + 1/2) / 2^24 for their upper 24 bits u."""
    u = words >> 8
    p = (u.float() + 0.5) * 2**-24
    q = ((2**24 - 1 - u).float() + 0.5) * 2**-24
    w = -_log(p * q * 4)
    root = _polynomial(_CENTRE, w - 2.5)
    tail = _polynomial(_TAIL, w.clamp(min=5).sqrt() - 3)
    return torch.where(w < 5, root, tail) * (p - q) * 1.4142135623730951


def gaussian(
    seed: int, images: Tensor | Sequence[int], draw: int, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Draws standard normal noise whose row j depends only on (seed, images[j], draw).

    Args:
        seed: in [0, 2^64).
        images: the index of each image, [N], in [0, 2^63).
        draw: the index of the draw, in [0, 2^32). An image with several draws gets independent noise in each.
        shape: the shape of one image.
        device: the device of the noise.

    Returns:
        float32 [N, *shape], |z| <= 5.42.
    """
    if isinstance(images, range):  # built on the device: a copy from the host would synchronise the GPU
        index = images.start + images.step * torch.arange(len(images), dtype=torch.int64, device=device)[:, None]
    else:
        index = torch.as_tensor(images, dtype=torch.int64, device=device)[:, None]
    size = 1
    for side in shape:
        size *= side
    position = torch.arange(-(-size // 4), dtype=torch.int64, device=device)[None, :]
    zero = torch.zeros_like(position)
    counter = (position + 0 * index, zero + draw, zero + (index & _MASK), zero + (index >> 32 & _MASK))
    words = torch.stack(philox(counter, (seed & _MASK, seed >> 32 & _MASK)), dim=-1)
    return _inverse_normal(words).flatten(1)[:, :size].reshape(len(index), *shape)
