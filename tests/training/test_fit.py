"""Checks training: the loss of a perfect network, Adam and EMA by hand, epochs, and resuming bit for bit."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ddpm import NoiseSchedule, UNet
from ddpm.training.fit import Descent, TrainingState, _indices, autocast, fit, scaled
from ddpm.training.objective import Objective
from ddpm.training.optimizers import OPTIMIZERS
from ddpm.training.times import TIMES


def images(count: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def small_state(dropout: float = 0.0) -> TrainingState:
    torch.manual_seed(0)
    return TrainingState(UNet(1, 8, 8, (1, 2), 1, (4,), dropout=dropout))


def steps(state: TrainingState, count: int, **options) -> list:
    schedule = options.pop("schedule", NoiseSchedule.named("cosine", 50))
    settings = {"batch": 6, "learning_rate": 1e-2, "seed": 3, "warmup": 3, **options}
    return list(itertools.islice(fit(state, images(), Objective.of(schedule, "eps"), **settings), count))


def test_scaled() -> None:
    assert scaled(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


@pytest.mark.parametrize("target", ["eps", "x0", "v", "mu", "flow"])
def test_loss_of_the_perfect_network_for_gaussian_data(target: str) -> None:
    """The loss is Var[x_0 | x_t] = v s^2 / (a^2 v + s^2) for x_0 ~ N(0, v), times the square of the target's slope in x_0."""
    schedule, v, t = NoiseSchedule.named("linear", 1000), 0.25, 300
    objective = Objective.of(schedule, target)
    a, s = float(schedule.alpha_bar[t + 1].sqrt()), float((1 - schedule.alpha_bar[t + 1]).sqrt())
    beta, before = float(schedule.betas[t]), float(schedule.alpha_bar[t])
    on_x0, on_x_t = math.sqrt(before) * beta / s**2, math.sqrt(1 - beta) * (1 - before) / s**2  # eq. 7 of Ho et al.
    generator = torch.Generator().manual_seed(0)
    x_0 = math.sqrt(v) * torch.randn(4000, 1, 8, 8, generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)

    def net(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        x0_hat = x * a * v / (a**2 * v + s**2)
        eps_hat = (x - a * x0_hat) / s
        found = {"eps": eps_hat, "x0": x0_hat, "v": a * eps_hat - s * x0_hat, "mu": on_x0 * x0_hat + on_x_t * x}
        return {**found, "flow": eps_hat - x0_hat}[target]

    posterior = v * s**2 / (a**2 * v + s**2)
    slopes = {"eps": a / s, "x0": 1.0, "v": a**2 / s + s, "mu": on_x0, "flow": a / s + 1}
    error = slopes[target] ** 2 * posterior
    losses = objective.losses(net, x_0, torch.full((4000,), t), eps)
    assert float(losses.mean()) == pytest.approx(error, rel=0.01)


def test_every_epoch_is_a_permutation() -> None:
    seen = torch.cat([_indices(20, 6, step, seed=1) for step in range(10)])
    for epoch in seen.view(3, 20):
        assert sorted(epoch.tolist()) == list(range(20))
    assert not torch.equal(seen[:20], seen[20:40])
    assert len(_indices(4, 11, 0, seed=1)) == 11  # the batch is larger than the dataset


def test_warm_up_and_clipping() -> None:
    done = steps(small_state(), 6)
    assert [step.learning_rate for step in done] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    # Adam's first step moves each weight by lr g / (|g| + eps'), so clipping the norm to almost nothing shrinks the step.
    free, clipped = small_state(), small_state()
    start = [parameter.clone() for parameter in free.net.parameters()]
    steps(free, 1)
    steps(clipped, 1, clip=1e-9)
    moved = [
        sum(float((now - then).detach().abs().sum()) for now, then in zip(state.net.parameters(), start, strict=True))
        for state in (free, clipped)
    ]
    assert moved[1] < moved[0] / 10


def test_the_average_by_hand() -> None:
    state = small_state()
    weights = [next(state.net.parameters()).detach().clone()]
    training = fit(
        state,
        images(),
        Objective.of(NoiseSchedule.named("linear", 50), "eps"),
        batch=6,
        learning_rate=1e-2,
        seed=3,
        ema=0.3,
    )
    for _ in range(8):
        next(training)
        weights.append(next(state.net.parameters()).detach().clone())
    average = weights[0]
    for k, weight in enumerate(weights[1:]):
        decay = min(0.3, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(next(state.ema.parameters()), average, atol=1e-7)


@pytest.mark.parametrize(
    ("dropout", "options"),
    [
        (0.0, {}),
        (0.3, {}),
        (0.0, {"optimizer": "adamw", "weight_decay": 0.1}),
        (0.0, {"optimizer": "muon"}),
        (0.0, {"times": "loss_aware"}),
    ],
)
def test_stopping_and_going_on_is_training_straight_through(dropout: float, options: dict[str, Any]) -> None:
    """T is 5, so that after a few steps `loss_aware` knows ten losses of every time and no longer draws uniformly."""
    schedule = NoiseSchedule.named("cosine", 5)

    def state() -> TrainingState:
        times = {key: TIMES[name](schedule, torch.device("cpu")) for key, name in options.items() if key == "times"}
        torch.manual_seed(0)
        return TrainingState(UNet(1, 8, 8, (1, 2), 1, (4,), dropout=dropout), **{**options, **times})

    how = {"schedule": schedule, "batch": 20, "descent": Descent(5, 9)}
    straight, first, second = state(), state(), state()
    whole = steps(straight, 9, **how)
    steps(first, 4, **how)
    second.load(first.step, first.tensors())
    rest = steps(second, 5, **how)
    if straight.times is not None:
        assert straight.times.probabilities().unique().numel() > 1
    assert [float(step.loss) for step in rest] == [float(step.loss) for step in whole[4:]]
    for name, tensor in straight.tensors().items():
        assert torch.equal(second.tensors()[name], tensor), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_have_the_precision_asked_for(precision: str) -> None:
    with autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, precision)


def test_a_state_of_another_network_is_refused() -> None:
    wider, state = TrainingState(UNet(1, 8, 16, (1, 2), 1, (4,))), small_state()
    for one, other in ((state, wider), (wider, state)):
        with pytest.raises(ValueError, match="another network"):
            one.load(1, other.tensors())


def test_flips_mirror_about_half_of_the_images() -> None:
    """A network records its inputs, which are images whose left half is dark."""
    picture = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    picture[..., 2:] = 255
    seen = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach())
            return x * self.weight

    clean = Objective.of(NoiseSchedule(torch.tensor([1e-12])), "x0")  # x_t equals x_0 up to a millionth
    next(fit(TrainingState(Recorder()), picture, clean, batch=200, learning_rate=0.0, seed=0, flip=True))
    mirrored = (seen[0][:, 0, 0, 0] > 0).float().mean()
    assert 0.35 < float(mirrored) < 0.65
    assert bool((seen[0][:, 0, :, 0] * seen[0][:, 0, :, 3] < 0).all())


def test_training_learns() -> None:
    state = small_state()
    done = steps(state, 150, batch=16, learning_rate=3e-3)
    assert float(sum(step.loss for step in done[-20:])) < 0.8 * float(sum(step.loss for step in done[:20]))


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int) -> None:
    """In float64, losses and later weights agree to rounding. Labels and flips stay with their images.

    The norms of the gradients are compared too, since clipping and Adam would hide a wrong scale of the gradients.
    """

    def train(accumulate: int) -> tuple[list[float], TrainingState]:
        torch.manual_seed(0)
        state = TrainingState(UNet(1, 8, 8, (1, 2), 1, (4,), classes=3).double())
        schedule = NoiseSchedule.named("cosine", 50)
        done = fit(
            state,
            images().double() / 127.5 - 1,
            Objective.of(schedule, "eps"),
            batch=6,
            learning_rate=1e-3,
            seed=3,
            flip=True,
            labels=torch.arange(20) % 3,
            label_dropout=0.3,
            accumulate=accumulate,
        )
        steps = itertools.islice(done, 5)
        return [float(value) for step in steps for value in (step.loss, step.gradient_norm)], state

    (whole, one), (summed, other) = train(1), train(parts)
    assert summed == pytest.approx(whole, rel=1e-5)
    for name, tensor in one.tensors().items():
        assert torch.allclose(tensor, other.tensors()[name], rtol=1e-4, atol=1e-6), name


def test_unequal_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 6 does not divide into 4 equal parts"):
        steps(small_state(), 1, accumulate=4)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimiser_is_torchs_bit_for_bit(name: str) -> None:
    """Includes parameters without a gradient, which are skipped, and kernels in both memory formats."""
    torch.manual_seed(0)
    decay = 0.1 if name == "adamw" else 0.01 if name == "muon" else 0.0
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 3).to(memory_format=torch.channels_last), nn.Linear(5, 7))
    state = TrainingState(net, name, decay)
    other = copy.deepcopy(net)
    flat = {
        id(parameter): nn.Parameter(parameter.detach().flatten(1))
        for parameter in other.parameters()
        if parameter.ndim > 1
    }
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    adam = kinds.get(name, torch.optim.AdamW)
    if name == "muon":
        theirs = [
            torch.optim.Muon(flat.values(), lr=0.01, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            adam([each for each in other.parameters() if each.ndim == 1], lr=0.01, fused=True, weight_decay=decay),
        ]
    else:
        theirs = [adam(other.parameters(), lr=0.01, fused=True, weight_decay=decay)]
    for k in range(4):
        for mine, its in zip(state.net.parameters(), other.parameters(), strict=True):
            mine.grad = None if k == 2 and mine.ndim == 1 else torch.randn(mine.shape)
            its.grad = None if mine.grad is None else mine.grad.clone()
            if id(its) in flat:
                flat[id(its)].grad = its.grad.flatten(1)
        state.optimizer.step(0.01)
        for each in theirs:
            each.step()
    for mine, its in zip(state.net.parameters(), other.parameters(), strict=True):
        expected = flat[id(its)].view(its.shape) if name == "muon" and its.ndim > 1 else its
        # A channels_last kernel has its columns in another order, so its products round differently.
        part = 1e-2 if name == "muon" and its.ndim > 2 else 0.0
        torch.testing.assert_close(mine, expected, rtol=0, atol=part * float(expected.detach().abs().max()))


def test_muon_steps_in_every_direction_alike() -> None:
    """A step adds a nearly orthogonal matrix with the size of Adam's step: Liu et al. 2025, section 2.2."""
    torch.manual_seed(0)
    net = nn.Linear(48, 32, bias=False)
    before, state = net.weight.detach().clone(), TrainingState(net, "muon")
    net.weight.grad = torch.randn(32, 48) * torch.logspace(0, -2, 32)[:, None]
    state.optimizer.step(1e-2)
    change = (before - net.weight.detach()) / 1e-2
    singular = torch.linalg.svdvals(change)
    assert float(singular.max() / singular.min()) < 2.5
    assert float(change.square().mean().sqrt()) == pytest.approx(0.2, rel=0.3)


def test_the_learning_rate_comes_down_by_hand() -> None:
    line, curve = Descent(6, 9, "linear", 0.2), Descent(6, 9, "cosine")
    assert [line.part(step) for step in (1, 6, 7, 8, 9)] == pytest.approx([1, 1, 0.8, 0.6, 0.4])
    assert [curve.part(step) for step in (6, 7, 8, 9)] == pytest.approx(
        [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    )
    rates = [step.learning_rate for step in steps(small_state(), 9, descent=line, warmup=3)]
    assert rates == pytest.approx([1e-2 * part for part in (0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4)])


def test_paired_noise_is_the_batchs_own_in_another_order() -> None:
    """Each image gets the noise that `pair` names. Pairing in the given order changes no bit of the training."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def turned(x_0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        seen.append((x_0, eps))
        return torch.arange(len(eps)).flip(0)

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.inputs: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self.inputs.append(x)
            return x * self.weight

    net, schedule = Recorder(), NoiseSchedule.named("cosine", 1000)
    only = replace(Objective.of(schedule, "eps"), a=torch.ones(1000), s=torch.full((1000,), 10.0))
    next(
        fit(
            TrainingState(net), images(), only, batch=6, learning_rate=0.0, seed=0, flip=True, pair=turned, accumulate=2
        )
    )
    ((x_0, eps),) = seen
    torch.testing.assert_close(torch.cat(net.inputs), x_0 + 10 * eps.flip(0))
    plain, same = small_state(), small_state()
    steps(plain, 2)
    steps(same, 2, pair=lambda x_0, eps: torch.arange(len(eps)))
    assert all(torch.equal(tensor, same.tensors()[name]) for name, tensor in plain.tensors().items())
