"""Is a model memorising? How near its samples lie to training images, and how near images lie that it never saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # N,C,H,W

CHUNK = 64 * 2**20  # bytes of training images, as float64, at a time
AFFORDED = 5e11  # products of pixels in one search: half a minute of two cores


@dataclass(frozen=True)
class Copying:
    """closer: how often, in pairs of a sample and an unseen image, the sample is the one nearer to the training images:
    0.5 where samples are as new as unseen images, 1 where all are copies. z: that, as a Mann-Whitney statistic: how many
    standard errors away from 0.5. copies: samples at distance 0.
    """

    closer: float
    z: float
    copies: int


def nearest(images: Images, train: Images, mirrored: bool = False) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The training image nearest to each of `images`, and how far: root mean square difference in grey levels, 0 ... 255.

    images, train: uint8 N,C,H,W -> int64 [N], float64 [N]; of equals the first. mirrored: mirrored training images count too.
    Sums of integers, which float64 holds exactly: every machine finds the same ones. Raises ValueError without training images.
    """
    if not len(train) or images.shape[1:] != train.shape[1:]:
        raise ValueError(f"no images of shape {images.shape[1:]} to compare with: train is {train.shape}")
    turned = [images, images[..., ::-1]] if mirrored else [images]
    wanted = np.stack([version.reshape(len(images), -1) for version in turned]).astype(np.float64)
    best = np.full(len(images), np.inf)
    index = np.zeros(len(images), np.int64)
    rows = max(1, CHUNK // (8 * wanted.shape[-1]))
    for start in range(0, len(train), rows):
        part = train[start : start + rows].reshape(-1, wanted.shape[-1]).astype(np.float64)
        squares = (wanted**2).sum(-1)[..., None] + (part**2).sum(-1) - 2 * (wanted @ part.T)
        distance = squares.min(axis=0)
        found = distance.argmin(axis=1)
        distance = distance[np.arange(len(images)), found]
        better = distance < best
        best[better], index[better] = distance[better], found[better] + start
    return index, np.sqrt(best / wanted.shape[-1])


def affordable(images: int, train: Images) -> int:
    """How many of so many images to seek neighbours of: all, unless that would take minutes."""
    return min(images, max(1, int(AFFORDED / train.size)))


def copying(samples: NDArray[np.float64], unseen: NDArray[np.float64]) -> Copying:
    """From the distances of samples and of unseen images to their nearest training images (Meehan et al. 2020, A
    Non-Parametric Test to Detect Data-Copying in Generative Models; here z > 0 means nearer). Raises ValueError for none.
    """
    m, n = len(samples), len(unseen)
    if not m or not n:
        raise ValueError("a comparison takes samples and unseen images")
    both = np.sort(unseen)
    wins = (n - np.searchsorted(both, samples, "right") + (n - np.searchsorted(both, samples, "left"))).sum() / 2
    closer = float(wins / (m * n))
    return Copying(closer, (closer - 0.5) / float(np.sqrt((m + n + 1) / (12 * m * n))), int((samples == 0).sum()))
