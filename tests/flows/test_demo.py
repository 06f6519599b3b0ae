"""Checks that the demo, `python -m flows` in a fresh clone, makes digits that an independent classifier recognises."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ddpm.files.dataset import read_dataset
from ddpm.files.samples import read_samples

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1800)]

EPOCHS = 25


def scaled(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(images)).float() / 127.5 - 1


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Shifts each image by up to two pixels."""
    padded = nn.functional.pad(x, (2, 2, 2, 2), value=-1.0)
    rows, columns = (torch.randint(0, 5, (len(x), 1)) + torch.arange(28) for _ in range(2))
    return padded[torch.arange(len(x))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


@pytest.fixture(scope="module")
def classifier() -> Callable[[Path], Callable[[np.ndarray], torch.Tensor]]:
    """Returns classifier(root), which trains a network on the real images of a checkout.

    classifier(root) returns a function images -> probabilities [N, 10].
    """

    def train(root: Path) -> Callable[[np.ndarray], torch.Tensor]:
        dataset = read_dataset(root)
        x, y = scaled(dataset.train), torch.from_numpy(np.array(dataset.train_labels))
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(100):
                loss = nn.functional.cross_entropy(net(shifted(x[rows])), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        net.eval()

        @torch.inference_mode()
        def probabilities(images: np.ndarray) -> torch.Tensor:
            return net(scaled(images)).softmax(1)

        real = probabilities(dataset.test)
        assert float((real.argmax(1) == torch.from_numpy(np.array(dataset.test_labels))).float().mean()) > 0.96
        return probabilities

    return train


def test_the_demos_champion_makes_all_ten_digits(
    tmp_path: Path,
    clone_maker: Callable[[Path], Any],
    classifier: Callable[[Path], Callable[[np.ndarray], torch.Tensor]],
) -> None:
    clone = clone_maker(tmp_path)
    try:
        done = clone.run(sys.executable, "-m", "flows")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        (point,) = set(re.findall(r"champion: version 1 \((\S+)\): ", done.stdout))
        judge = classifier(clone.root)
        found = judge(read_samples(clone.root / "samples" / f"{point}.npz").images)
        print(
            f"{point}: confidence {found.amax(1).mean():.3f}, of each digit {found.argmax(1).bincount(minlength=10).tolist()}"
        )
        assert found.argmax(1).unique().numel() == 10
        assert float(found.amax(1).mean()) > 0.9
        noise = np.random.default_rng(0).integers(0, 256, (400, 1, 28, 28), np.uint8)
        assert judge(noise).argmax(1).unique().numel() < 10  # the classifier does not see ten different digits in noise
    finally:
        clone.end()
