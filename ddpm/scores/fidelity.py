"""How close two sets of images are, from their features: FID with its error, KID, precision and recall, Inception Score.

FID (Heusel et al. 2017, arXiv:1706.08500, eq. 6) fits a Gaussian to each set:
|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). It falls as sets grow, so it means little without N and the layer.
KID (Binkowski et al. 2018, arXiv:1801.01401, section 4) is an unbiased estimate of the squared maximum mean discrepancy
under the kernel (x.y / D + 1)^3. Precision and recall are those of Kynkaanniemi et al. 2019 (arXiv:1904.06991, eq. 1), the
Inception Score that of Salimans et al. 2016 (arXiv:1606.03498). All have torch-fidelity's definitions.

The error of FID comes from the jackknife: FID_(-i), the distance without image i, for every i, against a reference that stays
as it is. With d_i = x_i - m1, a = (N - 1)/(N - 2) and b = N/((N - 1)(N - 2)),

    m_(-i) = m1 - d_i/(N - 1),    C_(-i) = a C1 - b d_i d_i^T.

So with C2 = R R^T and v_i = R^T d_i, M = R^T C1 R becomes a M - b v_i v_i^T. The trace of its root follows from
sqrt(z) = (1/2pi) integral_0^inf s^(-1/2) log(1 + z/s) ds and the determinant of a change of rank one:

    tr (a M - b v v^T)^(1/2) = sqrt(a) tr M^(1/2) + (1/2pi) integral_0^inf s^(-1/2) log(1 - b v^T (s + a M)^(-1) v) ds.

One eigendecomposition of M serves all images, and in its axes the integral is a matrix product; with fewer images than features
that of an N x N matrix does. Nothing is inverted and nothing linearised: with fewer images than features, where the derivative of
the root would give half the true error, it stays exact.

l_i = (N - 1) (mean_j FID_(-j) - FID_(-i)) are the influence values (see intervals.py), and (N - 1) (mean_j FID_(-j) - FID) is
the bias to first order in 1/N (Quenouille 1956): FID less that is an estimate for infinitely many images, the same limit as Chong
and Forsyth's (2020, arXiv:1911.07023) line in 1/N, without their random subsets. It needs more images than features.

KID has no bias. Its subsets estimate the sum over all pairs of images, U = sum_{i != j} k(x_i, x_j) / (N (N - 1))
- 2 sum_ij k(x_i, y_j) / (N M) + a part of the reference alone. Leaving out image i takes its row out of both sums, so with
r_i = sum_{j != i} k(x_i, x_j) and c_i = sum_j k(x_i, y_j) the influence values are, exactly,

    l_i = 2 (r_i - mean r)/(N - 2) - 2 (c_i - mean c)/M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.scores.copying import Copying, copying
from ddpm.scores.intervals import standard_error

Features = NDArray[np.float32]  # N,D
Device = torch.device | str

NEIGHBOURS = 3  # of precision and recall
SUBSETS = 100  # of KID
SUBSET_SIZE = 1000
SPLITS = 10  # of the Inception Score
_ROWS = 2048  # at once, where every row meets a whole set


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features, in float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """R [D, D] with R R^T = covariance: Cholesky's, or the eigenvectors' where rounding leaves an eigenvalue below 0."""
        covariance = torch.from_numpy(self.covariance)
        lower, failed = torch.linalg.cholesky_ex(covariance)
        if not failed:
            return lower.numpy()
        values, vectors = torch.linalg.eigh(covariance)
        return (vectors * values.clamp_min(0).sqrt()).numpy()


def statistics(features: Features, device: Device = "cpu") -> Statistics:
    """Raises ValueError for fewer than two rows."""
    if len(features) < 2:
        raise ValueError(f"a covariance takes two images or more, found {len(features)}")
    x = torch.from_numpy(features).to(device, torch.float64, copy=True)
    mean = x.mean(0)
    x -= mean
    return Statistics(mean.cpu().numpy(), (_gram(x) / (len(x) - 1)).cpu().numpy())


def _gram(x: Tensor) -> Tensor:
    """x^T x [D, D] for x [N, D], of which only one of two equal halves is computed."""
    product, step = x.new_empty(x.shape[1], x.shape[1]), 256
    for start in range(0, x.shape[1], step):
        rows, upto = slice(start, start + step), slice(0, start + step)
        block = x[:, rows].T @ x[:, upto]
        product[rows, upto], product[upto, rows] = block, block.T
    return product


def fid(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two Gaussians, squared as is usual. Never below 0.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of R^T C1 R, C2 = R R^T, which is symmetric: nothing is
    inverted, so fewer images than features do no harm. Rounding leaves about 1e-8 of the largest variance per dimension.
    """
    root = torch.from_numpy(b.root)
    values = torch.linalg.eigvalsh(root.T @ torch.from_numpy(a.covariance) @ root)
    shift = a.mean - b.mean
    cross = float(values.clamp_min(0).sqrt().sum())
    return max(0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance)) - 2 * cross)


@dataclass(frozen=True)
class Jackknife:
    """FID, the influence values [N] of its images (mean 0), and its bias: what N images add to the FID of infinitely many."""

    fid: float
    influence: NDArray[np.float64]
    bias: float


def jackknife(features: Features, reference: Statistics, device: Device = "cpu") -> Jackknife:
    """FID of features [N, D] against a reference that stays as it is, and what each image did to it.

    Raises ValueError for fewer than three rows.
    """
    count = len(features)
    if count < 3:
        raise ValueError(f"an error of FID takes three images or more, found {count}")
    root = torch.from_numpy(reference.root).to(device)
    means = torch.from_numpy(features).mean(0, dtype=torch.float64)
    mean, shift = means.to(device), (means - torch.from_numpy(reference.mean)).to(device)
    few = count <= features.shape[1]
    if few:  # M = Y^T Y has no more positive eigenvalues than the smaller Y Y^T, with Y = d R (N - 1)^(-1/2)
        d = torch.from_numpy(features).to(device, torch.float64) - mean
        values, vectors = torch.linalg.eigh(_gram((d @ root).T) / (count - 1))
        trace = float(d.square().sum()) / (count - 1)
    else:
        ours = torch.from_numpy(statistics(features, device).covariance).to(device)
        values, vectors = torch.linalg.eigh(root.T @ ours @ root)
        trace = float(ours.trace())
    cross = float(values.clamp_min(0).sqrt().sum())  # of all: where many are small, they add up
    values = torch.where(values > values[-1] * len(values) * torch.finfo(values.dtype).eps, values, 0.0)
    # d_i @ axes: v_i in M's own axes, without those that are rounding. With few images they come from Y Y^T's vectors.
    axes = vectors * ((count - 1) * values).sqrt() if few else root @ vectors * (values > 0)
    a, b = (count - 1) / (count - 2), count / ((count - 1) * (count - 2))
    changes = []
    for start in range(0, count, _ROWS):
        part = torch.from_numpy(features[start : start + _ROWS])
        d = part.to(device, torch.float64) - mean
        squared = d.square().sum(1)
        change = squared * (1 / (count - 1) ** 2 - b) - d @ shift * (2 / (count - 1))
        change += (a - 1) * trace - 2 * (math.sqrt(a) - 1) * cross
        along = axes[start : start + _ROWS].square() if few else (d @ axes).square_()
        changes.append(change - 2 * _root_change(along, values, a, b))
    changed = torch.cat(changes).cpu().numpy()  # FID_(-i) - FID
    mean_change = float(changed.mean())
    fid = max(0.0, float(shift @ shift) + trace + float(np.trace(reference.covariance)) - 2 * cross)
    return Jackknife(fid, (count - 1) * (mean_change - changed), (count - 1) * mean_change)


def _root_change(squares: Tensor, values: Tensor, a: float, b: float) -> Tensor:
    """The integral of the module's docstring for v with these squares [N, D] along M's axes, eigenvalues [D] -> [N].

    By the trapezoidal rule in log s, which converges exponentially: the integrand is analytic for |Im log s| < pi, so a step h
    leaves exp(-2 pi^2 / h). It decays like sqrt(s) to one side and 1/sqrt(s) to the other.
    """
    largest = float(values[-1])
    if largest <= 0:
        return squares.new_zeros(len(squares))
    step = 0.7
    s = largest * torch.arange(-50.0, 50.0, step, dtype=squares.dtype, device=squares.device).exp()
    remains = 1 - b * (squares @ (1 / (s + a * values[:, None])))
    return remains.clamp_min_(1e-13).log_() @ s.sqrt() * (step / (2 * math.pi))


def precision_recall(
    fake: Features, real: Features, neighbours: int = NEIGHBOURS, device: Device = "cpu"
) -> tuple[float, float]:
    """The share of fake images that lie within reach of a real one, and the reverse. Both in 0 ... 1, higher is better.

    An image reaches as far as its `neighbours`-th neighbour in its own set. Raises ValueError for sets too small for that.
    """
    if min(len(fake), len(real)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours take {neighbours + 1} images, found {min(len(fake), len(real))}")
    centre = real.mean(0, dtype=np.float64).astype(np.float32)  # distances keep more digits near the origin
    a, b = (torch.from_numpy(part - centre).to(device) for part in (fake, real))
    return _share_within(a, b, neighbours), _share_within(b, a, neighbours)


def _share_within(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Of the points [N, D], those within reach of a centre [M, D]."""
    reach = torch.cat([torch.cdist(part, centres).kthvalue(neighbours + 1)[0] for part in centres.split(_ROWS)])
    return sum(int((torch.cdist(part, centres) <= reach).any(1).sum()) for part in points.split(_ROWS)) / len(points)


def nearest_distances(
    fake: Features, real: Features, device: Device = "cpu"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far it is from each fake image to the nearest real one [N], and from each real image to the nearest other one [M].

    Real images are drawn as unseen ones would be, so that the second is what new images of the data would have, but for one real
    image fewer to be near to. Raises ValueError for fewer than two real images.
    """
    if len(real) < 2:
        raise ValueError(f"a nearest other image takes two images or more, found {len(real)}")
    centre = real.mean(0, dtype=np.float64).astype(np.float32)
    a, b = (torch.from_numpy(part - centre).to(device) for part in (fake, real))
    found = [
        torch.cat([torch.cdist(part, b).kthvalue(nth)[0] for part in points.split(_ROWS)])
        for points, nth in ((a, 1), (b, 2))
    ]
    return found[0].double().cpu().numpy(), found[1].double().cpu().numpy()


def inception_score(logits: NDArray[np.float32], splits: int = SPLITS, seed: int = 2020) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)) over `splits` parts of the shuffled images: its mean and standard deviation.

    logits: [N, classes]. Higher is better, at least 1. Raises ValueError for fewer images than parts.
    """
    if len(logits) < splits:
        raise ValueError(f"an Inception Score of {splits} parts takes as many images, found {len(logits)}")
    order = np.random.RandomState(seed).permutation(len(logits))  # torch-fidelity's
    log_p = torch.from_numpy(logits[order]).double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(logits) // splits : (i + 1) * len(logits) // splits]
        p = part.exp()
        scores.append(float((p * (part - p.mean(0).log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(
    a: Features,
    b: Features,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
    device: Device = "cpu",
) -> tuple[float, float]:
    """Mean and standard deviation of the estimate over `subsets` random subsets of both sets, drawn as torch-fidelity does.

    The deviation is that between subsets, not the error of the mean (see kid_influence). The mean may fall below 0 where the
    sets agree. Raises ValueError when a set is smaller than a subset.
    """
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f"KID subsets of {subset_size} images don't fit sets of {len(a)} and {len(b)}")
    first, second = (torch.from_numpy(part).to(device, torch.float64) for part in (a, b))
    random = np.random.RandomState(seed)  # torch-fidelity's, whose stream numpy promises to keep
    estimates = []
    for _ in range(subsets):
        rows = (torch.from_numpy(random.choice(len(part), subset_size, replace=False)) for part in (a, b))
        x, y = (part[these.to(device)] for part, these in zip((first, second), rows, strict=True))
        estimates.append(float(_squared_mmd(x, y)))
    return float(np.mean(estimates)), float(np.std(estimates))


def kid_influence(fake: Features, real: Features, device: Device = "cpu") -> NDArray[np.float64]:
    """The influence values [N] of fake images [N, D] on KID (mean 0), against a reference [M, D] that stays as it is.

    Raises ValueError for fewer than three fake images.
    """
    count = len(fake)
    if count < 3:
        raise ValueError(f"an error of KID takes three images or more, found {count}")
    x, y = (torch.from_numpy(part).to(device, torch.float64) for part in (fake, real))
    rows = []
    for part in x.split(_ROWS):
        itself = (part.square().sum(1) / x.shape[1] + 1) ** 3
        within, across = _kernel(part, x).sum(1) - itself, _kernel(part, y).sum(1)
        rows.append(within / (count - 2) - across / len(y))
    influence = 2 * torch.cat(rows)
    return (influence - influence.mean()).cpu().numpy()


def _kernel(p: Tensor, q: Tensor) -> Tensor:
    return (p @ q.T).div_(p.shape[1]).add_(1).pow_(3)


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased, for two sets of equal size [N, D]: no image is paired with itself."""
    count = len(x)

    def within(p: Tensor) -> Tensor:
        k = _kernel(p, p)
        return (k.sum() - k.trace()) / (count * (count - 1))

    return within(x) + within(y) - 2 * _kernel(x, y).mean()


@dataclass(frozen=True)
class Sets:
    """Two sets of images as their features, and what metrics compute from them, each part once.

    Args:
        fake: features [N, D] of the samples.
        real: features [M, D] of the reference images.
        reference: the statistics of `real`.
        logits: of the samples [N, classes], where the extractor has a classifier.
        device: where to compute.
    """

    fake: Features
    real: Features
    reference: Statistics
    logits: NDArray[np.float32] | None = None
    device: Device = "cpu"

    @cached_property
    def jackknife(self) -> Jackknife:
        return jackknife(self.fake, self.reference, self.device)

    @cached_property
    def kid(self) -> tuple[float, float]:
        """Mean and deviation over subsets of at most half a set: larger ones would all be alike."""
        size = max(2, min(SUBSET_SIZE, len(self.fake) // 2, len(self.real) // 2))
        return kid(self.fake, self.real, subset_size=size, device=self.device)

    @cached_property
    def kid_error(self) -> float:
        """The luck of the images, and that of the subsets, which would move the mean over them."""
        images = standard_error(kid_influence(self.fake, self.real, self.device))
        return math.hypot(images, self.kid[1] / math.sqrt(SUBSETS))

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        return precision_recall(self.fake, self.real, device=self.device)

    @cached_property
    def inception_score(self) -> tuple[float, float] | None:
        """Mean and deviation over SPLITS parts; None without logits or with too few images."""
        if self.logits is None or len(self.logits) < SPLITS:
            return None
        return inception_score(self.logits, SPLITS)

    @cached_property
    def copying(self) -> Copying:
        return copying(*nearest_distances(self.fake, self.real, self.device))
