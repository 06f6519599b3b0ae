"""Checks power-function averages of weights by their definition and against ema-pytorch, and their rebuilding from snapshots."""

import itertools

import numpy as np
import pytest
import torch
from ema_pytorch import post_hoc_ema
from torch import nn

from ddpm import NoiseSchedule, UNet
from ddpm.training import averages
from ddpm.training.averages import PowerAverage, coefficients, combined, exponent
from ddpm.training.fit import TrainingState, fit
from ddpm.training.objective import Objective


def walk(steps: int) -> torch.Tensor:
    """Returns the weights of a random walk, [steps, 7]."""
    return torch.randn(steps, 7, generator=torch.Generator().manual_seed(0)).cumsum(0)


def averaged(weights: torch.Tensor, length: float) -> torch.Tensor:
    average = PowerAverage([torch.full_like(weights[0], 1e3)], length)  # the weights before training do not count
    for step, row in enumerate(weights, 1):
        average.update(step, [row])
    return average.tensors[0]


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_the_length_is_the_standard_deviation_of_the_power_function(length: float) -> None:
    gamma = exponent(length)
    times = (np.arange(200_000) + 0.5) / 200_000
    density = (gamma + 1) * times**gamma
    mean = np.mean(density * times)
    assert np.sqrt(np.mean(density * (times - mean) ** 2)) == pytest.approx(length, rel=1e-6)


def test_the_published_exponents() -> None:
    """Karras et al. 2024, section 3.1."""
    assert [round(exponent(length), 2) for length in averages.LENGTHS] == [16.97, 6.94]


@pytest.mark.parametrize("length", [0.05, 0.2])
def test_weights_count_by_the_integral_of_the_power_function(length: float) -> None:
    weights, power = walk(50).double(), exponent(length) + 1
    edges = (torch.arange(51, dtype=torch.float64) / 50) ** power
    torch.testing.assert_close(averaged(weights, length), (edges.diff()[:, None] * weights).sum(0))


def test_an_average_is_that_of_ema_pytorch() -> None:
    """ema-pytorch counts the weights before the first update as a step."""
    net, weights = nn.Linear(7, 1, bias=False), walk(40)
    oracle = post_hoc_ema.KarrasEMA(net, sigma_rel=0.1, update_every=1)
    for row in weights:
        with torch.no_grad():
            net.weight.copy_(row[None])
        oracle.update()
    ours = averaged(torch.cat([weights[:1], weights]), 0.1)
    torch.testing.assert_close(oracle.ema_model.weight[0].detach(), ours)


@pytest.mark.parametrize("length", [0.04, 0.08, 0.15])
def test_coefficients_are_those_of_ema_pytorch(length: float) -> None:
    """Compares the resulting averages, since coefficients of nearly equal snapshots may differ."""
    taken = [(step, each) for step in (25, 50, 75, 100) for each in averages.LENGTHS]
    steps = torch.tensor([step for step, _ in taken], dtype=torch.float64)
    gammas = torch.tensor([exponent(each) for _, each in taken], dtype=torch.float64)
    theirs = post_hoc_ema.solve_weights(steps, gammas, torch.tensor([100.0]), torch.tensor([exponent(length)]).double())
    weights = walk(100).double()
    snapshots = torch.stack([averaged(weights[:step], each) for step, each in taken])
    ours = torch.from_numpy(coefficients(taken, 100, length)) @ snapshots
    torch.testing.assert_close(ours, theirs[:, 0] @ snapshots / theirs.sum(), rtol=1e-5, atol=1e-6)


def test_weights_that_do_not_change_are_their_own_average_however_few_snapshots() -> None:
    for count in (1, 2, 5):
        taken = [(10 * step, each) for step in range(1, count + 1) for each in averages.LENGTHS]
        for length in (0.045, 0.05, 0.1):
            assert coefficients(taken, 10 * count, length).sum() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize(("count", "length"), [(1, 0.02), (1, 0.2), (4, 0.2), (30, 0.01)])
def test_too_few_snapshots_for_a_length_are_refused(count: int, length: float) -> None:
    """The distance in the message is that of the factors, computed here on a grid."""
    taken = [(100 * step, each) for step in range(1, count + 1) for each in averages.LENGTHS]
    with pytest.raises(
        ValueError, match=f"closest average to length {length} that {count} snapshots give is"
    ) as caught:
        coefficients(taken, 100 * count, length)
    last = 100 * count
    x = (np.arange(200_000) + 0.5) / 200_000 * last

    def factors(step: int, each: float) -> np.ndarray:
        gamma = exponent(each)
        return np.where(x <= step, (gamma + 1) * (x / step) ** gamma / step, 0)

    kept, wanted = np.stack([factors(*each) for each in taken], 1), factors(last, length)
    nearest = kept @ np.linalg.lstsq(kept, wanted, rcond=None)[0]
    apart = np.linalg.norm(nearest - wanted) / np.linalg.norm(wanted)
    assert f" is {apart:.0%} away" in str(caught.value) and apart > 0.15


def test_a_training_counts_the_weights_of_each_step_once() -> None:
    torch.manual_seed(0)
    state, images = TrainingState(UNet(1, 8, 8, (1,), 1, ()), lengths=[0.1]), torch.zeros(8, 1, 8, 8)
    objective = Objective.of(NoiseSchedule.named("cosine", 50), "eps")
    weights = list[torch.Tensor]()
    for _ in itertools.islice(fit(state, images, objective, batch=4, learning_rate=1e-2, seed=0), 6):
        weights.append(torch.cat([each.detach().flatten() for each in state.net.parameters()]))
    found = torch.cat([tensor.flatten() for tensor in state.averages[0.1].tensors])
    torch.testing.assert_close(found, averaged(torch.stack(weights), 0.1))


def test_a_rebuilt_average_is_the_tracked_one_within_a_thousandth() -> None:
    """Trains a network and tracks an average of each length. The averages are rebuilt from snapshots of only two of them."""
    torch.manual_seed(0)
    lengths, every, steps = (0.01, 0.03, 0.075, 0.2), 10, 400
    state = TrainingState(UNet(1, 8, 8, (1, 2), 1, (4,)), lengths=(*averages.LENGTHS, *lengths))
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    objective = Objective.of(NoiseSchedule.named("cosine", 50), "eps")
    snapshots, taken = list[dict[str, torch.Tensor]](), list[tuple[int, float]]()
    for step in itertools.islice(fit(state, images, objective, batch=8, learning_rate=2e-3, seed=0), steps):
        if step.step % every == 0:
            for length in averages.LENGTHS:
                tensors = state.averages[length].tensors
                snapshots.append({str(index): tensor.clone() for index, tensor in enumerate(tensors)})
                taken.append((step.step, length))

    def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors])

    for length in (*averages.LENGTHS, *lengths):
        rebuilt = combined(snapshots, coefficients(taken, steps, length).tolist())
        tracked = flat(state.averages[length].tensors)
        apart = float((flat(list(rebuilt.values())) - tracked).norm() / tracked.norm())
        assert apart < (1e-6 if length in averages.LENGTHS else 1e-3), length
    # The averages of two lengths differ by more than the tolerance, so the comparison can fail.
    apart = flat(state.averages[0.01].tensors) - flat(state.averages[0.2].tensors)
    assert float(apart.norm() / flat(state.averages[0.2].tensors).norm()) > 1e-2
