"""Checks that training on two real processes (gloo, on the CPU) equals training on one process.

The processes compute in float64, where the two orders of summation differ by about 1e-16 of a gradient. Adam divides by the
size of the gradient. Where the true gradient is zero (the keys' bias, which softmax ignores), this noise divided by Adam's
epsilon of 1e-8 moves a weight by 1e-8 of the learning rate per step. So the tolerance is 1e-9 for the weights and 1e-12 for
the losses. Masks, noise, times, flips or labels of other rows would change both by 1e-3 or more.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm import NoiseSchedule, UNet
from ddpm.networks import winograd
from ddpm.training.fit import TrainingState, fit
from ddpm.training.objective import Objective
from ddpm.training.parallel import ALONE, World, joined
from ddpm.training.times import LossAware


def trained(world: World, fast: bool = False) -> dict[str, torch.Tensor]:
    """Trains with options that may depend on the batch row: dropout, flips, classes, accumulation, loss-aware times, pairing.

    fast: uses winograd.py's convolutions, which compute in float32.
    """
    torch.manual_seed(0)
    schedule = NoiseSchedule.named("cosine", 2)  # there are few times, so each has ten losses after some steps
    net = UNet(1, 8, 8, (1, 2), 1, (4,), dropout=0.2, classes=3).to(memory_format=torch.channels_last)
    state = TrainingState(net, times=LossAware(schedule))
    images = torch.randn(20, 1, 8, 8)
    objective = Objective.of(schedule, "eps")

    def pair(x_0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return x_0.flatten(1).sum(1).argsort()

    about: dict[str, Any] = {"batch": 8, "learning_rate": 1e-2, "seed": 3, "warmup": 2, "flip": True, "accumulate": 2}
    labels = torch.arange(20) % 3
    shared = world.module(state.net)
    forward = winograd.compiled(shared) if fast else shared
    assert fast == any(type(module) is winograd.Convolution for module in shared.modules())
    how = {**about, "labels": labels, "world": world, "forward": forward, "pair": pair}
    steps = list(islice(fit(state, images, objective, **how), 5))
    assert state.times is not None and state.times.weights(torch.arange(2)).unique().numel() == 2
    return {**state.tensors(), "loss": torch.stack([step.loss for step in steps])}


def main(rank: int, folder: Path, fast: bool) -> None:
    torch.set_default_dtype(torch.float32 if fast else torch.float64)
    torch.set_num_threads(1)
    with joined(rank, 2, torch.device("cpu"), f"file://{folder / 'meeting'}") as world:
        assert world.largest(3 + rank) == 4 and world.broadcast(f"of {rank}") == "of 0"
        torch.save(trained(world, fast), folder / f"{rank}.pt")


def one_and_two(folder: Path, fast: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Runs the same training on one process and on two. Asserts that the two end with the same bits."""
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder), *["fast"] * fast]) for rank in range(2)
    ]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if fast else torch.float64)
    try:
        alone = trained(ALONE, fast)
    finally:
        torch.set_default_dtype(before)
    assert [process.wait(120) for process in started] == [0, 0]
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    for name in alone:
        assert torch.equal(first[name], second[name]), name
    return alone, first


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    alone, both = one_and_two(tmp_path, fast=False)
    for name, value in alone.items():
        assert (both[name] - value).abs().max() < (1e-12 if name == "loss" else 1e-9), name


def test_two_processes_train_as_one_with_our_convolutions(tmp_path: Path) -> None:
    """In float32, Adam turns any noise into a step of full size (see above), so only the losses must agree."""
    alone, both = one_and_two(tmp_path, fast=True)
    torch.testing.assert_close(both["loss"], alone["loss"], rtol=1e-4, atol=0)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    objective = Objective.of(NoiseSchedule.named("cosine", 50), "eps")
    state = TrainingState(UNet(1, 8, 8, (1,), 1, ()))
    with pytest.raises(ValueError, match=r"^4 images at once do not divide among 3 processes"):
        next(
            fit(
                state,
                torch.zeros(8, 1, 8, 8),
                objective,
                batch=8,
                learning_rate=1.0,
                seed=0,
                accumulate=2,
                world=World(0, 3),
            )
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), fast="fast" in sys.argv[3:])
