"""Trains a network by algorithm 1 of Ho et al. 2020. A generator yields one small record per optimiser step.

The caller logs and saves. The randomness of a step is a function of (seed, step) alone, and nothing depends on the number
of later steps. So a training that stops after any step and resumes has the weights of an uninterrupted training.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ddpm.diffusion.denoiser import NO_LABEL
from ddpm.training.averages import PowerAverage
from ddpm.training.objective import Objective
from ddpm.training.optimizers import OPTIMIZERS
from ddpm.training.parallel import ALONE, World
from ddpm.training.times import Times

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Returns a context for mixed precision if `precision` is "bfloat16", or an empty context for "float32"."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def derived_seed(*parts: object) -> int:
    """Returns a seed of 32 bits that depends on every argument. torch's CPU generator uses no more bits."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


@dataclass(frozen=True)
class Step:
    """The record of one optimiser step.

    Args:
        step: the number of the step, counted from 1.
        loss: mean loss of the batch, a scalar on the network's device.
        gradient_norm: norm of the gradient before clipping, a scalar on the network's device.
        learning_rate: learning rate of this step.
    """

    step: int
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float


@dataclass(frozen=True)
class Descent:
    """How the learning rate falls at the end of a training.

    Args:
        first: the last step with the full learning rate, after which the rate falls.
        last: the last step of the training. The rate would reach its end value one step later.
        shape: "linear" or "cosine".
        to: the end value of the rate, as a share of the full rate.
    """

    first: int
    last: int
    shape: str = "linear"
    to: float = 0.0

    def part(self, step: int) -> float:
        """Returns the factor of the learning rate at a step, counted from 1."""
        done = min(max((step - self.first) / (self.last + 1 - self.first), 0.0), 1.0)
        remaining = (1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done
        return self.to + (1 - self.to) * remaining


class TrainingState:
    """Everything that training changes: the weights, their averages, the optimiser's moments, and the state of `times`.

    Args:
        net: the network to train, on its device.
        optimizer: a key of OPTIMIZERS.
        weight_decay: weight decay of the optimiser.
        times: how timesteps are drawn. None draws them uniformly.
        lengths: the power-function averages to keep, each given by its length (see `PowerAverage`).

    Attributes:
        ema: a copy of `net` with the exponential moving average of the weights.
        averages: the power-function averages, by length.
        step: the number of steps done.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        times: Times | None = None,
        lengths: Sequence[float] = (),
    ) -> None:
        self.net = net
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.step = 0
        self.optimizer = OPTIMIZERS[optimizer](list(net.parameters()), weight_decay)
        self.times = times
        self.averages = {length: PowerAverage(list(net.parameters()), length) for length in lengths}

    def live(self) -> dict[str, Tensor]:
        """Returns the tensors that training changes, by name, without copying them.

        Uses detach() instead of `.data`, so that a write to a tensor increments the version counter of its parameter.
        ddpm.networks.winograd notices a changed weight by this counter.
        """
        tensors = {f"net.{name}": parameter.detach() for name, parameter in self.net.named_parameters()}
        tensors |= {f"ema.{name}": parameter.detach() for name, parameter in self.ema.named_parameters()}
        for index, (name, _) in enumerate(self.net.named_parameters()):
            for key, moments in self.optimizer.moments.items():
                if (moment := moments[index]) is not None:
                    tensors[f"{key}.{name}"] = moment
        tensors |= {f"average.{name}": tensor for name, tensor in self.averaged().items()}
        times = {} if self.times is None else self.times.tensors()
        return tensors | {f"times.{name}": tensor for name, tensor in times.items()}

    def averaged(self) -> dict[str, Tensor]:
        """Returns the power-function averages by name, LENGTH.PARAMETER, without copying them."""
        names = [name for name, _ in self.net.named_parameters()]
        return {
            f"{length}.{name}": tensor
            for length, average in self.averages.items()
            for name, tensor in zip(names, average.tensors, strict=True)
        }

    def tensors(self) -> dict[str, Tensor]:
        """Returns a copy of the state on the CPU. These tensors and `step` are all that load() needs to resume the training."""
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.live().items()}

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Restores a state that tensors() returned after `step` steps. Raises ValueError if names or shapes differ."""
        live = self.live()
        if live.keys() != tensors.keys() or any(live[name].shape != tensors[name].shape for name in live):
            raise ValueError("the saved training state belongs to another network")
        for name, tensor in tensors.items():
            # In place, which keeps the memory layout, so that results stay bit for bit the same.
            live[name].copy_(tensor)
        self.step = step


def _indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Returns the indices of the images of a step, int64 [batch]. Each epoch is a new permutation of all images.

    Args:
        count: the number of images.
        batch: images per step.
        step: the number of the step, counted from 0.
        seed: the seed of the permutations.
    """
    start, parts = step * batch, []
    while start < (step + 1) * batch:
        epoch, offset = divmod(start, count)
        part = _epoch(count, epoch, seed)[offset : offset + (step + 1) * batch - start]
        parts.append(part)
        start += len(part)
    return torch.cat(parts)


@lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch(count: int, epoch: int, seed: int) -> Tensor:
    """Returns the permutation of `count` images in an epoch, counted from 0."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch)))


def _gather(images: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Returns images[rows] on the device. A copy from the CPU does not block."""
    if images.device == device:
        return images[rows.to(device, non_blocking=device.type == "cuda")]
    return images[rows].pin_memory().to(device, non_blocking=True)


def scaled(images: Tensor) -> Tensor:
    """Scales uint8 0 ... 255 to float32 -1 ... 1 (section 3.3 of Ho et al. 2020). Returns other data unchanged."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def conditioned(net: Callable[..., Tensor], labels: Tensor | None) -> Callable[..., Tensor]:
    """Returns a function (x, t) that calls net(x, t, labels), with labels int64 [B], or `net` itself without labels."""
    return net if labels is None else lambda x, t: net(x, t, labels)


@dataclass
class _Batch:
    """The random choices of one training step, with an entry for each of the B images, on the network's device.

    Args:
        rows: the indices of the images, int64 [B], on the CPU.
        mirrored: whether each image is flipped, bool [B, 1, 1, 1], or None for no flips.
        t: timesteps, int64 [B].
        weights: factors of the losses, [B], or None if all are 1.
        eps: standard normal noise, [B, ...].
        classes: the labels that the network gets, int64 [B], or None.
    """

    rows: Tensor
    mirrored: Tensor | None
    t: Tensor
    weights: Tensor | None
    eps: Tensor
    classes: Tensor | None = None

    def clean(self, images: Tensor, part: slice) -> Tensor:
        """Returns x_0 of a part of the batch."""
        x_0 = scaled(_gather(images, self.rows[part], self.t.device))
        return x_0 if self.mirrored is None else torch.where(self.mirrored[part], x_0.flip(-1), x_0)

    def conditioned(self, net: Callable[..., Tensor], part: slice) -> Callable[..., Tensor]:
        """Returns the network with the classes of a part of the batch, as a function of (x, t)."""
        return conditioned(net, None if self.classes is None else self.classes[part])


def _draw(times: Times | None, images: Tensor, rows: Tensor, T: int, flip: bool, generator: torch.Generator) -> _Batch:
    """Draws the random choices of a step, except the classes.

    Args:
        times: how timesteps are drawn, or None for uniform times.
        images: all images, [N, ...].
        rows: the indices of the step's images, int64 [B], on the CPU.
        T: the number of timesteps.
        flip: whether to mirror images.
        generator: the generator, on the device of the batch.
    """
    device, batch = generator.device, len(rows)
    if device.type == "cuda":
        rows = rows.pin_memory()  # so that the copy to the device does not block
    mirrored = torch.rand(batch, 1, 1, 1, device=device, generator=generator) < 0.5 if flip else None
    if times is None:
        t, weights = torch.randint(T, (batch,), device=device, generator=generator), None
    else:
        t = times.draw(batch, generator)
        weights = times.weights(t)
    eps = torch.randn(batch, *images.shape[1:], device=device, generator=generator)
    return _Batch(rows, mirrored, t, weights, eps)


def _check_parts(batch: int, accumulate: int, world: World) -> None:
    """Raises ValueError unless a batch divides into `accumulate` equal parts, and each part among the processes."""
    if batch % accumulate:
        raise ValueError(f"a batch of {batch} does not divide into {accumulate} equal parts")
    if batch // accumulate % world.size:
        raise ValueError(f"{batch // accumulate} images at once do not divide among {world.size} processes")


def _classes(labels: Tensor | None, rows: Tensor, dropout: float, generator: torch.Generator) -> Tensor | None:
    """Returns the labels of a batch, each replaced by NO_LABEL with a probability. Returns None without labels.

    Args:
        labels: the labels of all images, int64 [N], or None.
        rows: the indices of the batch's images, int64 [B], on the CPU.
        dropout: the probability of NO_LABEL.
        generator: the generator, on the device of the result.
    """
    if labels is None:
        return None
    withheld = torch.rand(len(rows), device=generator.device, generator=generator) < dropout
    return _gather(labels, rows, generator.device).masked_fill(withheld, NO_LABEL)


def fit(
    state: TrainingState,
    images: Tensor,
    objective: Objective,
    *,
    batch: int,
    learning_rate: float,
    seed: int,
    warmup: int = 0,
    clip: float = 1.0,
    ema: float = 0.9999,
    flip: bool = False,
    precision: str = "float32",
    forward: Callable[..., Tensor] | None = None,
    labels: Tensor | None = None,
    label_dropout: float = 0.1,
    accumulate: int = 1,
    world: World = ALONE,
    descent: Descent | None = None,
    pair: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[Step]:
    """Trains by algorithm 1 of Ho et al. 2020: takes one step for each record that the caller takes from the generator.

    If the network has dropout, each step sets torch's global seed.

    Args:
        state: the network and the other tensors of the training, which change in place. Training continues after
            `state.step`.
        images: uint8 [N, C, H, W], or float [N, ...] for other data. The images are on the network's device, or on the CPU,
            from which each batch is copied.
        objective: the loss, for a schedule and a target.
        batch: images per step.
        learning_rate: the learning rate between the linear warm-up and the descent.
        seed: the seed of all random numbers.
        warmup: the number of steps of the warm-up.
        clip: the largest norm of the gradient. Larger gradients are scaled down to it.
        ema: decay of the weights' moving average. After k steps the decay is min(ema, (1 + k) / (10 + k)).
        flip: whether to mirror each image left to right with probability 1/2.
        precision: "float32" or "bfloat16" (autocast).
        forward: a function that computes net(x, t), for example the compiled network. With several processes, it must be
            made from `world.module(state.net)`.
        labels: int64 [N], for a conditional network, on the network's device or on the CPU.
        label_dropout: probability of withholding a label, so that the network also learns to predict without a label:
            algorithm 1 of Ho & Salimans 2022.
        accumulate: number of equal parts in which the batch goes through the network, to save memory. The mean gradient
            stays the same.
        world: the processes that share this training. All have the same arguments, and each takes an equal share of every
            part. The number of processes changes results only by rounding, since random numbers are drawn for the whole batch.
        descent: how the learning rate falls at the end. None keeps the rate.
        pair: a function of x_0 and eps [B, ...] that returns the index of the eps for each image, int64 [B].

    Yields:
        The record of each step.

    Raises:
        ValueError: at the first step, if the batch does not divide into equal parts and shares.
    """
    _check_parts(batch, accumulate, world)
    device = next(state.net.parameters()).device
    generator = torch.Generator(device)
    net = world.module(state.net) if forward is None else forward
    parameters: list[Tensor] = list(state.net.parameters())
    averages: list[Tensor] = list(state.ema.parameters())
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in state.net.modules())
    state.net.train()
    while True:
        k = state.step
        generator.manual_seed(derived_seed(seed, "step", k))
        if has_dropout:
            torch.manual_seed(derived_seed(seed, "dropout", k))
        drawn = _draw(state.times, images, _indices(len(images), batch, k, seed), len(objective.a), flip, generator)
        # Drawn last, so that all other draws are the same as without labels.
        drawn.classes = _classes(labels, drawn.rows, label_dropout, generator)
        if pair is not None:
            order = pair(drawn.clean(images, slice(None)), drawn.eps)
            world.copy([order])  # process 0 decides for all, since different rounding could give different pairs
            drawn.eps = drawn.eps[order]
        for parameter in parameters:
            parameter.grad = None
        losses = torch.zeros(batch, device=device)
        loss = torch.zeros((), device=device)
        for start in range(0, batch, batch // accumulate):
            part = world.rows(slice(start, start + batch // accumulate))
            x_0 = drawn.clean(images, part)
            with world.averaging(net, last=start + batch // accumulate == batch):
                with autocast(device, precision):
                    part_losses = objective.losses(drawn.conditioned(net, part), x_0, drawn.t[part], drawn.eps[part])
                    mean = (part_losses if drawn.weights is None else part_losses * drawn.weights[part]).mean()
                (mean / accumulate).backward()
            loss = loss + mean.detach() / accumulate
            losses[part] = part_losses.detach()
        loss = world.mean(loss)
        if state.times is not None:
            state.times.observe(drawn.t, world.mean(losses) * world.size)
        norm = nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        rate = learning_rate * min(1.0, (k + 1) / (warmup + 1)) * (1 if descent is None else descent.part(k + 1))
        state.optimizer.step(rate)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(ema, (1 + k) / (10 + k)))
        for average in state.averages.values():
            average.update(k + 1, parameters)
        state.step = k + 1
        yield Step(k + 1, loss, norm.detach(), rate)
