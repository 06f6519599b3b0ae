"""Compares two sets of images by their features: FID with its error, KID, CMMD, precision and recall, Inception Score.

FID (Heusel et al. 2017, arXiv:1706.08500, eq. 6) fits a Gaussian to each set. The distance is
|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). FID falls as N grows and depends on the layer, so an FID means little
without its N and layer.
KID (Binkowski et al. 2018, arXiv:1801.01401, section 4) is an unbiased estimate of the squared maximum mean discrepancy
under the kernel (x.y / D + 1)^3. Precision and recall are defined by Kynkaanniemi et al. 2019 (arXiv:1904.06991, eq. 1), and
the Inception Score by Salimans et al. 2016 (arXiv:1606.03498). All definitions agree with torch-fidelity.

The error of FID comes from the jackknife. FID_(-i), the distance without image i, is computed for every i, against a fixed
reference. With d_i = x_i - m1, a = (N - 1)/(N - 2) and b = N/((N - 1)(N - 2)),

    m_(-i) = m1 - d_i/(N - 1),    C_(-i) = a C1 - b d_i d_i^T.

So with C2 = R R^T and v_i = R^T d_i, M = R^T C1 R becomes a M - b v_i v_i^T. The trace of its root follows from
sqrt(z) = (1/2pi) integral_0^inf s^(-1/2) log(1 + z/s) ds and the determinant of a rank-one update:

    tr (a M - b v v^T)^(1/2) = sqrt(a) tr M^(1/2) + (1/2pi) integral_0^inf s^(-1/2) log(1 - b v^T (s + a M)^(-1) v) ds.

A single eigendecomposition of M serves all images, and in M's eigenvectors the integral is a matrix product. With fewer
images than features, an N x N matrix is decomposed instead. Nothing is inverted or linearised, so the result is exact
even then. A linearised root would give half the true error with fewer images than features.

FID itself is computed in float64. With MANY or more images per feature, the images are rotated into M's eigenvectors in
float32, which takes half the time. This changes an influence value by less than 1e-4 of the largest influence value, even if
C1 is singular, an image is an outlier or FID is near 0.

The influence values are l_i = (N - 1) (mean_j FID_(-j) - FID_(-i)) (see intervals.py). The bias, to first order in 1/N, is
(N - 1) (mean_j FID_(-j) - FID) (Quenouille 1956). FID minus this bias estimates the FID of infinitely many images.
Chong and Forsyth (2020, arXiv:1911.07023) estimate the same limit by fitting a line in 1/N to random subsets. The
correction here needs no subsets, but several images per feature. In simulations with Gaussian features (D = 16 ... 256,
equal or falling variances), the share of the bias that the correction leaves depends only on N/D:

    N/D     1.03   1.5    2      3      5      8
    left    0.25   0.11   0.075  0.043  0.025  0.015

The bias grows like D and the error like sqrt(D). So near N = D, the remaining bias outweighs the error: at D = 64 and
N = 66, 0.64 becomes -1.3. Therefore the correction requires ENOUGH = 5 images per feature, and the interval counts 3% of the
bias as a further error (`Jackknife.infinity`). The bias from the finite number of reference images is not corrected.

KID has no bias. KID is the mean over random subsets, which estimates a sum over all pairs of images:

    U = sum_{i != j} k(x_i, x_j) / (N (N - 1)) - 2 sum_ij k(x_i, y_j) / (N M) + a term of the reference alone.

Leaving out image i removes its row from both sums. With r_i = sum_{j != i} k(x_i, x_j) and c_i = sum_j k(x_i, y_j), the
influence values are exactly

    l_i = 2 (r_i - mean r)/(N - 2) - 2 (c_i - mean c)/M.

CMMD (Jayasumana et al. 2024, arXiv:2401.09603) is 1000 U over all images, with CLIP's embeddings of unit length and the kernel
exp(-|x - y|^2 / (2 10^2)). The authors' code computes the biased form, in which images are also paired with themselves. The
biased form is larger by 1000 (1 - mean k)/N for each set, at most 10/N.

Density and coverage are defined by Naeem et al. 2020 (arXiv:2002.09797). For precision and recall, every image has a reach, the
distance of a near neighbour. For density and coverage, only real images have a reach, so a fake outlier covers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.scores.copying import Copying, copying
from ddpm.scores.intervals import Estimate, standard_error

Features = NDArray[np.float32]  # N,D
Device = torch.device | str

NEIGHBOURS = 3  # for precision and recall: the number of the neighbour that bounds an image's reach
REACH = 5  # the same for density and coverage
SUBSETS = 100  # number of subsets for KID
SUBSET_SIZE = 1000  # images in each subset for KID
CMMD_WIDTH, CMMD_SCALE = 10, 1000  # width of the Gaussian kernel, and factor of the score
SPLITS = 10  # parts for the Inception Score
ENOUGH = 5  # fewest images per feature for the extrapolation of FID to infinitely many images
REMAINING_BIAS = 0.03  # largest share of FID's bias that the extrapolation leaves
MANY = 2  # fewest images per feature for the rotation into M's eigenvectors in float32
_ROWS = 2048  # images that are compared with a whole set at once
_PART = 1024  # images that are centred at once
_STRIP = 256  # rows of a covariance that are computed at once


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features, in float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """R [D, D], lower triangular, with R R^T = covariance.

        Computed by Cholesky's method, or from eigenvectors if an eigenvalue is rounded below 0.
        """
        covariance = torch.from_numpy(self.covariance)
        lower, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            values, vectors = torch.linalg.eigh(covariance)
            lower = torch.linalg.qr((vectors * values.clamp_min(0).sqrt()).T, mode="r").R.T
        return lower.numpy()


def statistics(features: Features, device: Device = "cpu") -> Statistics:
    """Returns the mean and covariance of features [N, D]. Raises ValueError if N < 2."""
    if len(features) < 2:
        raise ValueError(f"a covariance takes two images or more, found {len(features)}")
    mean = torch.from_numpy(features.mean(0, dtype=np.float64)).to(device)
    covariance = _gram(_centred(features, mean)) / (len(features) - 1)
    return Statistics(mean.cpu().numpy(), covariance.cpu().numpy())


def _centred(features: Features, mean: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Yields features minus their mean in parts of _PART rows, to avoid a float64 copy of all features.

    In float32, the mean is subtracted in two terms. So rounding of the mean adds no error to the differences.
    """
    high = mean.to(dtype)
    low = (mean - high).to(dtype)
    for start in range(0, len(features), _PART):
        part = torch.from_numpy(features[start : start + _PART]).to(mean.device, dtype, copy=True).sub_(high)
        yield part if dtype == torch.float64 else part.sub_(low)


def _gram(parts: Iterable[Tensor]) -> Tensor:
    """Returns the sum of x^T x [D, D] over the parts x [N, D], computing only one of its two symmetric halves."""
    total = torch.empty(0)
    for x in parts:
        if not len(total):
            total = x.new_zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], _STRIP):
            rows, upto = slice(start, start + _STRIP), slice(0, start + _STRIP)
            total[rows, upto].addmm_(x[:, rows].T, x[:, upto])
    return total.tril() + total.tril(-1).T


def _between(root: Tensor, covariance: Tensor) -> Tensor:
    """Returns the lower half of R^T C R [D, D] for a lower triangular R. This half determines the eigenvalues."""
    right, product = torch.zeros_like(root), torch.zeros_like(root)
    for start in range(0, len(root), _STRIP):
        strip, below, upto = slice(start, start + _STRIP), slice(start, None), slice(0, start + _STRIP)
        right[below, strip] = covariance[below, below] @ root[below, strip]
        product[strip, upto] = root[below, strip].T @ right[below, upto]
    return product


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rising eigenvalues [D] and eigenvectors [D, D] of a symmetric matrix. Reads only its lower half.

    On a CPU, numpy computes them: on AMD's processors, numpy's OpenBLAS takes about half the time of torch's MKL.
    """
    if matrix.device.type != "cpu":
        return torch.linalg.eigh(matrix)
    values, vectors = np.linalg.eigh(matrix.numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


def fid(a: Statistics, b: Statistics) -> float:
    """Returns the squared Fréchet distance of two Gaussians, at least 0.

    tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric R^T C1 R, where C2 = R R^T.
    Nothing is inverted, so fewer images than features do no harm. The rounding error is about 1e-8 times the number of
    features times the largest variance.
    """
    root = torch.from_numpy(b.root)
    values = torch.linalg.eigvalsh(_between(root, torch.from_numpy(a.covariance)))
    shift = a.mean - b.mean
    cross = float(values.clamp_min(0).sqrt().sum())
    return max(0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance)) - 2 * cross)


@dataclass(frozen=True)
class Jackknife:
    """FID of N images, with the quantities that follow from leaving out each image.

    Args:
        fid: the distance, at least 0.
        influence: the influence value of each image, [N], with mean 0.
        bias: how much larger FID is for N images than for infinitely many.
    """

    fid: float
    influence: NDArray[np.float64]
    bias: float

    def infinity(self, features: int) -> Estimate | None:
        """Returns the FID of infinitely many images, at least 0, or None for fewer than ENOUGH images per feature.

        The error combines FID's error with the part of the bias that the correction may leave.
        """
        if len(self.influence) < ENOUGH * features:
            return None
        error = math.hypot(standard_error(self.influence), REMAINING_BIAS * self.bias)
        return Estimate(max(0.0, self.fid - self.bias), error)


def jackknife(features: Features, reference: Statistics, device: Device = "cpu") -> Jackknife:
    """Returns the FID of features [N, D] against a fixed reference, and the influence of each image.

    Raises ValueError if N < 3.
    """
    count = len(features)
    if count < 3:
        raise ValueError(f"an error of FID takes three images or more, found {count}")
    root = torch.from_numpy(reference.root).to(device)
    mean = torch.from_numpy(features.mean(0, dtype=np.float64)).to(device)
    shift = mean - torch.from_numpy(reference.mean).to(device)
    few = count <= features.shape[1]
    if few:  # M = Y^T Y has no more positive eigenvalues than the smaller Y Y^T, with Y = d R (N - 1)^(-1/2)
        d = torch.cat(list(_centred(features, mean)))
        values, vectors = _eigenvectors(_gram([(d @ root).T]) / (count - 1))
        trace = float(d.square().sum()) / (count - 1)
    else:
        covariance = _gram(_centred(features, mean)) / (count - 1)
        values, vectors = _eigenvectors(_between(root, covariance))
        trace = float(covariance.trace())
    cross = float(values.clamp_min(0).sqrt().sum())  # over all eigenvalues, since many small roots add up
    largest = float(values[-1].clamp_min(torch.finfo(values.dtype).tiny))
    values = values / largest
    values = torch.where(values > len(values) * torch.finfo(values.dtype).eps, values, 0.0)
    # d_i @ axes is v_i along M's eigenvectors, divided by the root of the largest eigenvalue. Eigenvectors whose eigenvalue is
    # only rounding error get 0. With few images, the result comes from the eigenvectors of Y Y^T.
    axes = vectors * ((count - 1) * values).sqrt() if few else root @ vectors * (values > 0) / math.sqrt(largest)
    rotation = axes.float() if count >= MANY * features.shape[1] else axes
    a, b = (count - 1) / (count - 2), count / ((count - 1) * (count - 2))
    weights = torch.where(values > 0, b / (a * values), 0.0).to(rotation.dtype)
    changes = []
    for index, d in enumerate(_centred(features, mean, rotation.dtype)):
        rows = slice(index * _PART, (index + 1) * _PART)
        squares = (axes[rows] if few else d @ rotation).square()
        root_change = _root_change(squares, values, a, b)
        # If an eigenvalue vanishes without the image, v^T (a M)^(-1) v comes close to 1 / b. Then float32 is too inaccurate.
        critical = squares @ weights > 0.99
        if rotation is not axes and critical.any():
            precise = torch.from_numpy(features[rows]).to(device, torch.float64)[critical] - mean
            root_change[critical] = _root_change((precise @ axes).square(), values, a, b)
        change = d.square().sum(1) * (1 / (count - 1) ** 2 - b) - d @ shift.to(d.dtype) * (2 / (count - 1))
        change = change.double() + (a - 1) * trace - 2 * (math.sqrt(a) - 1) * cross
        changes.append(change - 2 * math.sqrt(largest) * root_change)
    changed = torch.cat(changes).cpu().numpy()  # FID_(-i) - FID
    mean_change = float(changed.mean())
    fid = max(0.0, float(shift @ shift) + trace + float(np.trace(reference.covariance)) - 2 * cross)
    return Jackknife(fid, (count - 1) * (mean_change - changed), (count - 1) * mean_change)


def _root_change(squares: Tensor, values: Tensor, a: float, b: float) -> Tensor:
    """Computes (1/2pi) integral_0^inf s^(-1/2) log(1 - b v^T (s + a M)^(-1) v) ds for each v: float64 [N].

    The trapezoidal rule in log s converges exponentially. The integrand is analytic for |Im log s| < pi, so a step h
    has an error of exp(-2 pi^2 / h). The integrand decays like sqrt(s) to one side and 1/sqrt(s) to the other.

    Args:
        squares: squared components of v along M's eigenvectors, divided by M's largest eigenvalue, [N, D].
        values: M's eigenvalues, divided by the largest, [D]. The result is divided by the root of the largest.
        a: (N - 1)/(N - 2), as in the module's docstring.
        b: N/((N - 1)(N - 2)), as in the module's docstring.
    """
    step = 1.0
    s = torch.arange(-40.0, 40.0, step, dtype=values.dtype, device=values.device).exp()
    reduction = (squares @ (b / (s + a * values[:, None])).to(squares.dtype)).double()
    return reduction.neg_().clamp_min_(1e-13 - 1).log1p_() @ s.sqrt() * (step / (2 * math.pi))


def precision_recall(
    fake: Features, real: Features, neighbours: int = NEIGHBOURS, device: Device = "cpu"
) -> tuple[float, float]:
    """Returns precision and recall, each in 0 ... 1. Higher is better.

    Precision is the share of fake images within reach of a real image. Recall is the share of real images within reach of a
    fake image. An image reaches as far as its `neighbours`-th nearest neighbour in its own set.

    Args:
        fake: features of samples, [N, D].
        real: features of reference images, [M, D].
        neighbours: which nearest neighbour bounds an image's reach: 3 for the third nearest.
        device: where to compute.

    Raises:
        ValueError: a set has no more than `neighbours` images.
    """
    if min(len(fake), len(real)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours take {neighbours + 1} images, found {min(len(fake), len(real))}")
    centre = real.mean(0, dtype=np.float64).astype(np.float32)  # distances keep more digits near the origin
    a, b = (torch.from_numpy(part - centre).to(device) for part in (fake, real))
    return _share_within(a, b, neighbours), _share_within(b, a, neighbours)


def _share_within(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Returns the share of points [N, D] within reach of a centre [M, D].

    A centre reaches as far as its `neighbours`-th nearest centre.
    """
    reach = torch.cat([torch.cdist(part, centres).kthvalue(neighbours + 1)[0] for part in centres.split(_ROWS)])
    return sum(int((torch.cdist(part, centres) <= reach).any(1).sum()) for part in points.split(_ROWS)) / len(points)


def density_coverage(
    fake: Features, real: Features, neighbours: int = REACH, device: Device = "cpu"
) -> tuple[float, float]:
    """Returns density (at least 0, about 1 for perfect samples) and coverage (0 ... 1). Higher is better.

    A real image reaches as far as its `neighbours`-th nearest real neighbour. Density is the mean number of real images that
    reach a fake image, divided by `neighbours`. Coverage is the share of real images that reach at least one fake image.

    Args:
        fake: features of samples, [N, D].
        real: features of reference images, [M, D].
        neighbours: which nearest neighbour bounds an image's reach: 3 for the third nearest.
        device: where to compute.

    Raises:
        ValueError: there are no more than `neighbours` real images.
    """
    if len(real) <= neighbours:
        raise ValueError(f"{neighbours} neighbours take {neighbours + 1} images, found {len(real)}")
    centre = real.mean(0, dtype=np.float64).astype(np.float32)
    a, b = (torch.from_numpy(part - centre).to(device) for part in (fake, real))
    within = covered = 0
    for part in b.split(_ROWS):
        reach = torch.cdist(part, b).kthvalue(neighbours + 1)[0]
        reached = (torch.cdist(part, a) < reach[:, None]).sum(1)
        within, covered = within + int(reached.sum()), covered + int((reached > 0).sum())
    return within / (neighbours * len(fake)), covered / len(real)


def nearest_distances(
    fake: Features, real: Features, device: Device = "cpu"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the distance of each fake image to the nearest real image [N], and of each real image to the nearest other [M].

    The distances [M] stand for the distances of unseen images, which come from the same distribution. The only difference: a real
    image is compared with one real image fewer, because not with itself. Raises ValueError for fewer than two real images.
    """
    if len(real) < 2:
        raise ValueError(f"the distances between reference images take two images or more, found {len(real)}")
    centre = real.mean(0, dtype=np.float64).astype(np.float32)
    a, b = (torch.from_numpy(part - centre).to(device) for part in (fake, real))
    fake_distances, real_distances = (
        torch.cat([torch.cdist(part, b).kthvalue(nth)[0] for part in points.split(_ROWS)]).double().cpu().numpy()
        for points, nth in ((a, 1), (b, 2))  # the real image nearest to a real image is the image itself
    )
    return fake_distances, real_distances


def inception_score(logits: NDArray[np.float32], splits: int = SPLITS, seed: int = 2020) -> tuple[float, float]:
    """Returns mean and standard deviation of the Inception Score, exp E[KL(p(y|x) || p(y))], over parts of the images.

    The score is at least 1, and higher is better.

    Args:
        logits: [N, classes].
        splits: the number of parts of the shuffled images.
        seed: the seed of the shuffling. The default is torch-fidelity's seed.

    Raises:
        ValueError: there are fewer images than parts.
    """
    if len(logits) < splits:
        raise ValueError(f"an Inception Score of {splits} parts takes at least one image per part, found {len(logits)}")
    order = np.random.RandomState(seed).permutation(len(logits))  # the order of torch-fidelity
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
    """Returns mean and standard deviation of KID over random subsets of both sets, drawn as torch-fidelity does.

    The deviation is the deviation between subsets, not the error of the mean (see `kid_influence`). If the sets agree, the
    mean may be below 0.

    Args:
        a: features, [N, D].
        b: features, [M, D].
        subsets: the number of subsets.
        subset_size: images in each subset, at least 2 and at most N and M.
        seed: the seed of the subsets.
        device: where to compute.

    Raises:
        ValueError: the subset size is out of range.
    """
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f"KID subsets of {subset_size} images don't fit sets of {len(a)} and {len(b)}")
    first, second = (torch.from_numpy(part).to(device, torch.float64) for part in (a, b))
    random = np.random.RandomState(seed)  # torch-fidelity's generator; numpy guarantees its stream
    estimates = []
    for _ in range(subsets):
        rows = (torch.from_numpy(random.choice(len(part), subset_size, replace=False)) for part in (a, b))
        x, y = (part[subset.to(device)] for part, subset in zip((first, second), rows, strict=True))
        estimates.append(float(_squared_mmd(x, y)))
    return float(np.mean(estimates)), float(np.std(estimates))


def kid_influence(fake: Features, real: Features, device: Device = "cpu") -> NDArray[np.float64]:
    """Returns the influence values [N], with mean 0, of fake images [N, D] on KID, against a fixed reference [M, D].

    Raises ValueError if N < 3.
    """
    x, y = (torch.from_numpy(part).to(device, torch.float64) for part in (fake, real))
    return _influence(*_sums(x, y, _kernel), len(y))


def cmmd(fake: Features, real: Features, device: Device = "cpu") -> tuple[float, NDArray[np.float64]]:
    """Returns CMMD of fake images [N, D] against a fixed reference [M, D], and the images' influence values [N], with mean 0.

    If the sets agree, CMMD may be below 0. Raises ValueError if N < 3 or M < 2.
    """
    if len(real) < 2:
        raise ValueError(f"CMMD takes two reference images or more, found {len(real)}")
    x, y = (torch.from_numpy(part).to(device, torch.float64) for part in (fake, real))
    (within, across), (others, _) = _sums(x, y, _gaussian), _sums(y, y[:1], _gaussian)
    n, m = len(x), len(y)
    squared = within.sum() / (n * (n - 1)) + others.sum() / (m * (m - 1)) - 2 * across.sum() / (n * m)
    return CMMD_SCALE * float(squared), CMMD_SCALE * _influence(within, across, m)


def _sums(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Sums the kernel over pairs. Returns for each x_i the sum over all other x, [N], and the sum over all y, [N]."""
    within, across = [], []
    for start in range(0, len(x), _ROWS):
        part = x[start : start + _ROWS]
        square = kernel(part, x)
        within.append(square.sum(1) - square.diagonal(start))
        across.append(kernel(part, y).sum(1))
    return torch.cat(within), torch.cat(across)


def _influence(within: Tensor, across: Tensor, reference: int) -> NDArray[np.float64]:
    """Returns the influence values [N] on the squared MMD, from the results of `_sums` and the number of reference images."""
    count = len(within)
    if count < 3:
        raise ValueError(f"an error of KID or CMMD takes three images or more, found {count}")
    influence = 2 * (within / (count - 2) - across / reference)
    return (influence - influence.mean()).cpu().numpy()


def _gaussian(p: Tensor, q: Tensor) -> Tensor:
    """Returns exp(-|p - q|^2 / (2 CMMD_WIDTH^2)) of all pairs: [N, M] for p [N, D] and q [M, D]."""
    squares = (p @ q.T).mul_(-2).add_(p.square().sum(1)[:, None]).add_(q.square().sum(1))
    return squares.clamp_min_(0).mul_(-1 / (2 * CMMD_WIDTH**2)).exp_()


def _kernel(p: Tensor, q: Tensor) -> Tensor:
    """Returns (p.q / D + 1)^3 of all pairs: [N, M] for p [N, D] and q [M, D]."""
    return (p @ q.T).div_(p.shape[1]).add_(1).pow_(3)


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Returns the unbiased squared MMD of two sets of equal size [N, D], in which no image is paired with itself."""
    count = len(x)

    def within(p: Tensor) -> Tensor:
        k = _kernel(p, p)
        return (k.sum() - k.trace()) / (count * (count - 1))

    return within(x) + within(y) - 2 * _kernel(x, y).mean()


@dataclass(frozen=True)
class Sets:
    """Features of two sets of images, and quantities that several metrics share. Each quantity is computed once.

    Args:
        fake: features [N, D] of the samples.
        real: features [M, D] of the reference images.
        reference: the statistics of `real`.
        logits: the logits of the samples, [N, classes]; None if the extractor has no classifier.
        device: where to compute.
    """

    fake: Features
    real: Features
    reference: Statistics
    logits: NDArray[np.float32] | None = None
    device: Device = "cpu"

    @cached_property
    def jackknife(self) -> Jackknife:
        """FID of the samples, with the influence of each sample."""
        return jackknife(self.fake, self.reference, self.device)

    @cached_property
    def kid(self) -> tuple[float, float]:
        """Mean and deviation of KID over subsets of at most half of a set, since larger subsets would hardly differ."""
        size = max(2, min(SUBSET_SIZE, len(self.fake) // 2, len(self.real) // 2))
        return kid(self.fake, self.real, subset_size=size, device=self.device)

    @cached_property
    def kid_error(self) -> float:
        """Standard error of KID, from the choice of the images and the choice of the subsets."""
        images = standard_error(kid_influence(self.fake, self.real, self.device))
        return math.hypot(images, self.kid[1] / math.sqrt(SUBSETS))

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """Precision and recall with NEIGHBOURS neighbours."""
        return precision_recall(self.fake, self.real, device=self.device)

    @cached_property
    def cmmd(self) -> tuple[float, NDArray[np.float64]]:
        """CMMD, with the influence of each sample."""
        return cmmd(self.fake, self.real, self.device)

    @cached_property
    def density_coverage(self) -> tuple[float, float] | None:
        """Density and coverage with REACH neighbours. None if there are no more than REACH reference images."""
        return density_coverage(self.fake, self.real, device=self.device) if len(self.real) > REACH else None

    @cached_property
    def inception_score(self) -> tuple[float, float] | None:
        """Mean and deviation of the Inception Score over SPLITS parts. None without logits or with fewer images than parts."""
        if self.logits is None or len(self.logits) < SPLITS:
            return None
        return inception_score(self.logits, SPLITS)

    @cached_property
    def copying(self) -> Copying:
        """Compares how near samples and reference images are to their nearest reference images, by their features."""
        return copying(*nearest_distances(self.fake, self.real, self.device))
