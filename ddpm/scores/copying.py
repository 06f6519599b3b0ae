"""Measures whether a model memorises: compares how near samples and unseen images are to the training images.

`copying` compares all samples with all unseen images, which reveals a model that copies often. `suspect` finds single samples
that may be copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm.scores.intervals import CONFIDENCE

Images = NDArray[np.uint8]  # N,C,H,W

CHUNK = 64 * 2**20  # bytes of training images compared at once, as float64
AFFORDED = 5e11  # most products of two pixels in a search; so many take half a minute on two cores


@dataclass(frozen=True)
class Copying:
    """Tells how near samples are to the training images, compared with unseen images.

    Args:
        closer: each sample and each unseen image has a distance to its nearest training image. This is the share of pairs of
            a sample and an unseen image in which the sample's distance is smaller, with ties counted by half: 0.5 if
            samples are as new as unseen images, 1 if all samples are copies.
        z: distance of `closer` from 0.5 in standard errors (the Mann-Whitney test).
        copies: number of samples at distance 0 from a training image.
    """

    closer: float
    z: float
    copies: int


def nearest(images: Images, train: Images, mirrored: bool = False) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Finds the training image nearest to each image.

    Distances are sums of integers, which float64 holds exactly, so every machine finds the same images.

    Args:
        images: uint8 [N, C, H, W].
        train: uint8 [M, C, H, W].
        mirrored: whether to compare with mirrored training images too.

    Returns:
        The index of each nearest training image, int64 [N]; in a tie, the lowest index. And the distance to this image,
            float64 [N]: the root mean square difference in grey levels, 0 ... 255.

    Raises:
        ValueError: there are no training images, or their shape differs.
    """
    if not len(train) or images.shape[1:] != train.shape[1:]:
        raise ValueError(f"expected training images of shape {images.shape[1:]}, found {train.shape}")
    versions = [images, images[..., ::-1]] if mirrored else [images]
    pixels = np.stack([version.reshape(len(images), -1) for version in versions]).astype(np.float64)
    best = np.full(len(images), np.inf)
    index = np.zeros(len(images), np.int64)
    rows = max(1, CHUNK // (8 * pixels.shape[-1]))
    for start in range(0, len(train), rows):
        part = train[start : start + rows].reshape(-1, pixels.shape[-1]).astype(np.float64)
        squares = (pixels**2).sum(-1)[..., None] + (part**2).sum(-1) - 2 * (pixels @ part.T)
        distance = squares.min(axis=0)
        nearest_row = distance.argmin(axis=1)
        distance = distance[np.arange(len(images)), nearest_row]
        better = distance < best
        best[better], index[better] = distance[better], nearest_row[better] + start
    return index, np.sqrt(best / pixels.shape[-1])


def affordable(images: int, train: Images) -> int:
    """Returns how many of `images` images can be compared with all training images in AFFORDED operations, at least 1."""
    return min(images, max(1, int(AFFORDED / train.size)))


def copying(samples: NDArray[np.float64], unseen: NDArray[np.float64]) -> Copying:
    """Compares the distances [M] of samples and [N] of unseen images to their nearest training images.

    The test is that of Meehan et al. 2020, A Non-Parametric Test to Detect Data-Copying in Generative Models. Here z > 0 means
    that samples are nearer. Raises ValueError if either set is empty.
    """
    m, n = len(samples), len(unseen)
    if not m or not n:
        raise ValueError("the test for copies needs at least one sample and one image to compare with")
    ordered = np.sort(unseen)
    wins = (n - np.searchsorted(ordered, samples, "right") + (n - np.searchsorted(ordered, samples, "left"))).sum() / 2
    closer = float(wins / (m * n))
    return Copying(closer, (closer - 0.5) / float(np.sqrt((m + n + 1) / (12 * m * n))), int((samples == 0).sum()))


@dataclass(frozen=True)
class Suspects:
    """The samples that lie nearer to a training image than any unseen image does.

    If M samples and N unseen images come from one distribution, all orders of their distances are equally likely. Then
    each sample is suspected with probability 1/(N + 1). At least k samples are suspected if the k nearest of all M + N
    images are samples. This has the probability prod_{j<k} (M - j)/(M + N - j). The number of suspected samples is
    beta-binomial: a share p ~ Beta(1, N) of all new images lies below the threshold that the N unseen images set.

    Args:
        samples: the indices of the suspected samples, nearest first.
        threshold: the smallest distance of an unseen image. Samples at smaller distances are suspected.
        rate_low, rate_high: the interval of p, the share of new images below this threshold.
        expected: the mean number of suspected samples if all samples are new: M/(N + 1).
        most: the largest count that chance explains. If all samples are new, a larger count has a probability of at most
            1 - confidence.
    """

    samples: tuple[int, ...]
    threshold: float
    rate_low: float
    rate_high: float
    expected: float
    most: int

    @property
    def beyond_chance(self) -> bool:
        """Whether more samples are suspected than chance explains."""
        return len(self.samples) > self.most


def suspect(samples: NDArray[np.float64], unseen: NDArray[np.float64], confidence: float = CONFIDENCE) -> Suspects:
    """Finds suspected copies from the distances [M] of samples and [N] of unseen images to their nearest training images.

    Raises ValueError if either set is empty.
    """
    m, n = len(samples), len(unseen)
    if not m or not n:
        raise ValueError("the test for copies needs at least one sample and one image to compare with")
    order = np.argsort(samples, kind="stable")
    threshold = float(unseen.min())
    most, chance = 0, m / (m + n)  # `chance` is the probability that more than `most` samples are suspected
    while chance > 1 - confidence:
        most += 1
        chance *= (m - most) / (m + n - most)
    low, high = (1 - (0.5 + side * confidence / 2) ** (1 / n) for side in (1, -1))
    suspected = tuple(int(i) for i in order[samples[order] < threshold])
    return Suspects(suspected, threshold, low, high, m / (n + 1), most)
