"""Trains a network by algorithm 1 of Ho et al. 2020, as a generator of one small record per optimiser step.

The caller logs and saves. The randomness of a step is a function of (seed, step) alone, and nothing depends on the number
of later steps. So a training that stops after any step and resumes has the weights of an uninterrupted training.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ddpm.diffusion.denoiser import NO_LABEL
from ddpm.training.objective import Objective
from ddpm.training.parallel import ALONE, World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Returns a context for mixed precision if `precision` is "bfloat16", or an empty context if it is "float32"."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def derived_seed(*parts: object) -> int:
    """Returns a seed that depends on every argument. It has 32 bits, since torch's CPU generator uses no more."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


@dataclass(frozen=True)
class Step:
    """The record of one optimiser step.

    Args:
        step: number of the step, from 1.
        loss: mean loss of the batch, a scalar on the network's device.
        gradient_norm: norm of the gradient before clipping, a scalar on the network's device.
        learning_rate: learning rate of this step.
    """

    step: int
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float


class TrainingState:
    """Everything that training changes: the network, its exponential moving average, and Adam's moments.

    Attributes:
        net: the network to train, on its device.
        ema: a copy of `net` that holds the moving average.
        step: the number of steps that are done.
        moments: Adam's step counts, first and second moments: a list of tensors each, in the order of net.parameters().
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.step = 0
        parameters = list(net.parameters())
        self.moments = {
            "step": [torch.zeros((), dtype=torch.float32, device=parameter.device) for parameter in parameters],
            "exp_avg": [torch.zeros_like(parameter) for parameter in parameters],
            "exp_avg_sq": [torch.zeros_like(parameter) for parameter in parameters],
        }

    def live(self) -> dict[str, Tensor]:
        """Returns the tensors that training changes, by name, without copying them.

        Uses detach() instead of `.data`, so that a write to a tensor raises the version of its parameter. From that version,
        ddpm.networks.winograd notices a changed weight.
        """
        tensors = {f"net.{name}": parameter.detach() for name, parameter in self.net.named_parameters()}
        tensors |= {f"ema.{name}": parameter.detach() for name, parameter in self.ema.named_parameters()}
        for index, (name, _) in enumerate(self.net.named_parameters()):
            tensors |= {f"{key}.{name}": moments[index] for key, moments in self.moments.items()}
        return tensors

    @torch.no_grad()
    def adam(self, learning_rate: float) -> None:
        """Changes the network by one step of Adam: Kingma & Ba 2015, algorithm 1, with its default constants.

        Uses the fused kernel directly, because the first step of torch.optim.Adam imports torch's compiler: measured 2.0
        to 2.4 s at the start of every training, against 0.1 to 0.25 s.
        """
        parameters = list(self.net.parameters())
        used = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
        steps, averages, squares = ([moments[index] for index in used] for moments in self.moments.values())
        changed: list[Tensor] = [parameters[index] for index in used]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            changed,
            [gradient for parameter in parameters if (gradient := parameter.grad) is not None],
            averages,
            squares,
            [],
            steps,
            lr=learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        torch.autograd.graph.increment_version(changed)  # the kernel itself does not raise the versions; see live()

    def tensors(self) -> dict[str, Tensor]:
        """Returns a copy of the state on the CPU. load() needs only these tensors and `step` to resume the training."""
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.live().items()}

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Restores a state that tensors() returned after `step` steps. Raises ValueError if names or shapes differ."""
        live = self.live()
        if live.keys() != tensors.keys() or any(live[name].shape != tensors[name].shape for name in live):
            raise ValueError("the saved training state belongs to another network")
        for name, tensor in tensors.items():
            live[name].copy_(tensor)  # in place, keeping the memory layout, so that results stay bit for bit the same
        self.step = step


def _indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Returns the indices [batch] of the images of step `step`, counted from 0. Each epoch is a new permutation of all images."""
    start, parts = step * batch, []
    while start < (step + 1) * batch:
        epoch, offset = divmod(start, count)
        part = _epoch(count, epoch, seed)[offset : offset + (step + 1) * batch - start]
        parts.append(part)
        start += len(part)
    return torch.cat(parts)


@lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch)))


def _gather(images: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Returns images[rows] on the device. Copies from the CPU without blocking."""
    if images.device == device:
        return images[rows.to(device, non_blocking=device.type == "cuda")]
    return images[rows].pin_memory().to(device, non_blocking=True)


def scaled(images: Tensor) -> Tensor:
    """Scales uint8 0 ... 255 to float32 -1 ... 1 (section 3.3 of Ho et al. 2020). Returns other data unchanged."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def conditioned(net: Callable[..., Tensor], labels: Tensor | None) -> Callable[..., Tensor]:
    """Returns a function (x, t) that calls net(x, t, labels), with labels int64 [B], or `net` itself without labels."""
    return net if labels is None else lambda x, t: net(x, t, labels)


def _check_parts(batch: int, accumulate: int, world: World) -> None:
    if batch % accumulate:
        raise ValueError(f"a batch of {batch} does not divide into {accumulate} equal parts")
    if batch // accumulate % world.size:
        raise ValueError(f"{batch // accumulate} images at once do not divide among {world.size} processes")


def _classes(labels: Tensor | None, rows: Tensor, dropout: float, generator: torch.Generator) -> Tensor | None:
    """Returns the labels of a batch, each replaced by NO_LABEL with probability `dropout`; None without labels."""
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
) -> Iterator[Step]:
    """Trains by algorithm 1 of Ho et al. 2020: takes a step each time the caller asks for one.

    If the network has dropout, each step sets torch's global seed.

    Args:
        state: the network and the other tensors of the training, which change in place. Training continues after
            `state.step`.
        images: uint8 [N, C, H, W], or float [N, ...] for other data. On the network's device, or on the CPU, from which
            each batch is copied.
        objective: the loss, for a schedule and a target.
        batch: images per step.
        learning_rate: the learning rate after a linear warm-up.
        seed: the seed of everything that is drawn.
        warmup: the number of steps of the warm-up.
        clip: the largest norm of the gradient.
        ema: decay of the weights' moving average. After k steps the decay is min(ema, (1 + k) / (10 + k)).
        flip: whether to mirror each image left to right with probability 1/2.
        precision: "float32" or "bfloat16" (autocast).
        forward: a function that computes net(x, t), for example the compiled network. With several processes, it must be
            made from `world.module(state.net)`.
        labels: int64 [N], for a conditional network, on the network's device or on the CPU.
        label_dropout: probability of withholding a label, so that the network also learns to predict without a label:
            algorithm 1 of Ho & Salimans 2022.
        accumulate: number of equal parts in which the batch goes through the network, to save memory. The gradient's
            mean is the same.
        world: the processes that share this training. All have the same arguments, and each takes an equal share of every
            part. Their number changes results by rounding only, since everything is drawn for the whole batch.

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
        rows = _indices(len(images), batch, k, seed)
        if device.type == "cuda":
            rows = rows.pin_memory()  # so that the copy to the device does not block
        mirrored = torch.rand(batch, 1, 1, 1, device=device, generator=generator) < 0.5 if flip else None
        t = torch.randint(len(objective.a), (batch,), device=device, generator=generator)
        eps = torch.randn(batch, *images.shape[1:], device=device, generator=generator)
        classes = _classes(
            labels, rows, label_dropout, generator
        )  # drawn last, so that the other draws are the same as without labels

        for parameter in parameters:
            parameter.grad = None
        loss = torch.zeros((), device=device)
        for start in range(0, batch, batch // accumulate):
            part = world.rows(slice(start, start + batch // accumulate))
            x_0 = scaled(_gather(images, rows[part], device))
            if mirrored is not None:
                x_0 = torch.where(mirrored[part], x_0.flip(-1), x_0)
            these = None if classes is None else classes[part]
            with world.averaging(net, last=start + batch // accumulate == batch):
                with autocast(device, precision):
                    mean = objective.losses(conditioned(net, these), x_0, t[part], eps[part]).mean()
                (mean / accumulate).backward()
            loss = loss + mean.detach() / accumulate
        loss = world.mean(loss)
        norm = nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        rate = learning_rate * min(1.0, (k + 1) / (warmup + 1))
        state.adam(rate)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(ema, (1 + k) / (10 + k)))
        state.step = k + 1
        yield Step(k + 1, loss, norm.detach(), rate)
