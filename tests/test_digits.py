"""A network trained on real digits makes digits that a classifier of real digits recognises: every target, every sampler.

The classifier knows ten digits and nothing else, so how sure it is tells digits from noise: it is sure (0.9 or more) of
nearly every real digit and of no noise.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from ddpm import SAMPLERS, TARGETS, Denoiser, NoiseSchedule, UNet, fit, gaussian, sample
from ddpm.objective import Objective
from ddpm.training import TrainingState

IMAGES, STEPS = 200, 20
SURE = 0.9


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Real 8x8 digits, uint8 [1797, 1, 8, 8], and which they are."""
    images, labels = load_digits(return_X_y=True)
    return (images * (255 / 16)).round().astype(np.uint8).reshape(-1, 1, 8, 8), labels


@pytest.fixture(scope="module")
def classifier(digits: tuple[np.ndarray, np.ndarray]) -> SVC:
    """Trained on every other digit."""
    images, labels = digits
    return SVC(C=10, gamma=0.02, probability=True, random_state=0).fit(flat(images[::2]), labels[::2])


def flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 127.5 - 1


def recognised(classifier: SVC, images: np.ndarray) -> tuple[float, int]:
    """-> the share that the classifier is sure of, and how many different digits there are among those."""
    probability = classifier.predict_proba(flat(images))
    sure = probability.max(1) >= SURE
    return float(sure.mean()), len(set(probability.argmax(1)[sure]))


def trained(images: np.ndarray, target: str, steps: int) -> Denoiser:
    """A small network after `steps` steps on real digits."""
    schedule = NoiseSchedule.named("cosine", 1000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(1, 8, channels=24, multipliers=(1, 2), blocks=1, attention=())
    state = TrainingState(net)
    settings = {"batch": 64, "learning_rate": 3e-3, "seed": 0, "warmup": 30, "ema": 0.99}
    for _ in islice(fit(state, torch.from_numpy(images), Objective.of(schedule, target), **settings), steps):
        pass
    return Denoiser(state.ema, schedule, target, clip=True)


def drawn(denoiser: Denoiser, sampler: str) -> np.ndarray:
    def noise(k: int) -> torch.Tensor:
        return gaussian(0, range(IMAGES), k, (1, 8, 8))

    x_0 = sample(denoiser, noise(0), sampler, STEPS, "trailing", noise=lambda k: noise(k + 1))
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
