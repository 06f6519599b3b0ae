"""Prints what the FID of a point means: beside it, the FID of noise, of a Gaussian fitted to the pixels, and of held-out images.

`python -m bench.yardsticks POINT` runs in a checkout after `dvc repro`. All sets have the same number of images and are compared
with the training images, by the extractor and layer of params.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm.files import paths
from ddpm.files.dataset import read_dataset
from ddpm.files.params import Params
from ddpm.files.samples import read_samples
from ddpm.parameters import Point
from ddpm.scores.features import extract, load
from ddpm.scores.fidelity import jackknife, statistics
from ddpm.scores.intervals import standard_error

Images = NDArray[np.uint8]


def gaussian(images: Images, count: int, random: np.random.Generator) -> Images:
    """Draws images from the Gaussian with the mean and the covariance of all pixels of `images`."""
    x = np.asarray(images).reshape(len(images), -1).astype(np.float32)
    mean = x.mean(0)
    weights = random.standard_normal((count, len(x)), np.float32) / np.float32(np.sqrt(len(x) - 1))
    drawn = weights @ (x - mean) + mean  # a sum of centred images with independent weights has their covariance
    return drawn.round().clip(0, 255).astype(np.uint8).reshape(count, *images.shape[1:])


def main(point: str) -> None:
    params, dataset = Params.load(), read_dataset()
    samples = read_samples(paths.samples_file(Point.parse(point))).images
    count, random = min(len(samples), len(dataset.test)), np.random.default_rng(0)
    sets = {
        "noise": random.integers(0, 256, (count, *dataset.train.shape[1:]), np.uint8),
        "Gaussian": gaussian(dataset.train, count, random),
        point: samples[:count],
        "held-out images": dataset.test[:count],
    }
    chosen = params.evaluation
    extractor = load(chosen.extractor, chosen.layer, Path(paths.CACHE) / "inception")
    reference = statistics(extract(extractor, dataset.train, chosen.batch))
    print(f"{count} images each, {len(dataset.train):,} training images, {chosen.extractor}, layer {chosen.layer}")
    for name, images in sets.items():
        found = jackknife(extract(extractor, images, chosen.batch), reference)
        print(f"{name:20} FID {found.fid:10.4g} ± {1.96 * standard_error(found.influence):.2g}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
