"""Power-function averages of a training's weights: Karras et al. 2024, section 3.

An average combines the network's weights after every step, with a factor for each step. The length of the average is the
standard deviation of the step number under these factors, as a fraction of the training. A training keeps averages of two
lengths, and takes snapshots of both. A linear combination of snapshots combines the weights after every step too. With enough
snapshots and suitable coefficients, it comes close to an average of another length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LENGTHS = (0.05, 0.1)  # of the averages that a training keeps
FURTHEST = 0.15  # the largest relative L2 difference between the factors of an average and those of its approximation
DIGITS = 9  # decimals of the coefficients of snapshots, so that rounding errors of the linear solver change no weights


def exponent(length: float) -> float:
    """Returns the exponent gamma of the power function whose standard deviation, as a share of the training, is `length`.

    length: 0 < length < 12 ** -0.5. The equation is length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


class PowerAverage:
    """An average in which the weights after step k of t count in proportion to k ** gamma.

    Args:
        parameters: the weights before the first step.
        length: the standard deviation of the averaged steps, as a share of the training. It decides gamma (see `exponent`).

    Attributes:
        tensors: the average of each parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], length: float) -> None:
        self.gamma = exponent(length)
        self.tensors: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Adds the weights after a step, counted from 1."""
        torch._foreach_lerp_(self.tensors, list(parameters), 1 - (1 - 1 / step) ** (self.gamma + 1))


def coefficients(snapshots: Sequence[tuple[int, float]], step: int, length: float) -> NDArray[np.float64]:
    """Returns coefficients, float64 [snapshots], that combine the snapshots to the closest approximation of an average.

    An average multiplies the weights after each step by a factor. "Closest" means the least squared difference of these factors.
    The coefficients are then scaled so that their sum is 1, as that of the factors.

    Args:
        snapshots: the step and the length of each snapshot.
        step: the last step that the average includes.
        length: the length of the average, as in `PowerAverage`.

    Raises:
        ValueError: the snapshots are too few for an average of this length: the difference is above FURTHEST.
    """
    steps = np.array([taken for taken, _ in snapshots], dtype=float)
    gammas = np.array([exponent(each) for _, each in snapshots])
    products = _product(steps[:, None], gammas[:, None], steps[None], gammas[None])
    last = np.array(float(step)), np.array(exponent(length))
    wanted, square = _product(steps, gammas, *last), float(_product(*last, *last))
    found, *_ = np.linalg.lstsq(products, wanted, rcond=None)
    apart = max(0.0, float(found @ products @ found - 2 * found @ wanted) / square + 1) ** 0.5
    if apart > FURTHEST:
        raise ValueError(
            f"the closest average to length {length:g} that {len(set(steps))} snapshots give is {apart:.0%} away from it; take"
            " more snapshots (a lower training.snapshot_every), or a length nearer to 0.05 ... 0.1"
        )
    return np.round(np.asarray(found / found.sum(), dtype=float), DIGITS)


def _product(t_a: NDArray, gamma_a: NDArray, t_b: NDArray, gamma_b: NDArray) -> NDArray[np.float64]:
    """Returns the integral over x of f_a(x) f_b(x), with f(x) = (gamma + 1) x^gamma / t^(gamma + 1) for 0 <= x <= t, else 0."""
    ratio, later = np.minimum(t_a, t_b) / np.maximum(t_a, t_b), np.maximum(t_a, t_b)
    power = np.where(t_a < t_b, gamma_b, gamma_a)
    constant = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return np.asarray(constant * ratio**power / later)


def combined(snapshots: Iterable[Mapping[str, Tensor]], factors: Sequence[float]) -> dict[str, Tensor]:
    """Returns the linear combination of snapshots, float32. Adds up in float64, since the factors have both signs."""
    total: dict[str, Tensor] = {}
    for snapshot, factor in zip(snapshots, factors, strict=True):
        for name, tensor in snapshot.items():
            part = tensor.double() * factor
            total[name] = total[name].add_(part) if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}
