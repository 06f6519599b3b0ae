"""How close two sets of images are, from their features: FID and KID, with torch-fidelity's definitions.

FID (Heusel et al. 2017, arXiv:1706.08500, eq. 6) fits a Gaussian to each set:
|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). It falls as sets grow, so it means little without N and the layer.
KID (Binkowski et al. 2018, arXiv:1801.01401, section 4) is an unbiased estimate of the squared maximum mean discrepancy
under the kernel (x.y / D + 1)^3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Features = NDArray[np.float32]  # N,D


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features, in float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def statistics(features: Features) -> Statistics:
    """Raises ValueError for fewer than two rows."""
    if len(features) < 2:
        raise ValueError(f"a covariance takes two images or more, found {len(features)}")
    x = torch.from_numpy(features).to(torch.float64, copy=True)
    mean = x.mean(0)
    x -= mean
    return Statistics(mean.numpy(), (x.T @ x / (len(x) - 1)).numpy())


def fid(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two Gaussians, squared as is usual. Never below 0.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: nothing is
    inverted, so fewer images than features do no harm. Rounding leaves about 1e-8 of the largest variance per dimension.
    """
    first, second = torch.from_numpy(a.covariance), torch.from_numpy(b.covariance)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ second @ root).clamp_min(0).sqrt().sum()
    shift = torch.from_numpy(a.mean - b.mean)
    return max(0.0, float(shift @ shift + first.trace() + second.trace() - 2 * cross))


def kid(a: Features, b: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the estimate over `subsets` random subsets of both sets, drawn as torch-fidelity does.

    The mean may fall below 0 where the sets agree. Raises ValueError when a set is smaller than a subset.
    """
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f"KID subsets of {subset_size} images don't fit sets of {len(a)} and {len(b)}")
    first, second = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    random = np.random.RandomState(seed)  # torch-fidelity's, whose stream numpy promises to keep
    estimates = []
    for _ in range(subsets):
        x = first[random.choice(len(a), subset_size, replace=False)]
        y = second[random.choice(len(b), subset_size, replace=False)]
        estimates.append(float(_squared_mmd(x, y)))
    return float(np.mean(estimates)), float(np.std(estimates))


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased, for two sets of equal size [N, D]: no image is paired with itself."""
    count = len(x)

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return (p @ q.T / p.shape[1] + 1).pow_(3)

    def within(p: Tensor) -> Tensor:
        k = kernel(p, p)
        return (k.sum() - k.trace()) / (count * (count - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()
