"""Algorithm 1 of Ho et al. 2020, as a generator: one optimiser step, one small record; the caller logs and saves.

Every step's randomness is a function of (seed, step) alone, and nothing depends on how many steps will follow, so stopping
after any step and going on later gives the weights of training straight through.
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
    """Mixed precision for "bfloat16", nothing for "float32"."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def derived_seed(*parts: object) -> int:
    """A 32-bit seed (all that torch's CPU generator uses) that depends on every part."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


@dataclass(frozen=True)
class Step:
    """What one optimiser step did. step counts from 1; loss and gradient_norm (before clipping) stay on the device."""

    step: int
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float


class TrainingState:
    """Everything that training changes: the network, its exponential moving average, and Adam's moments.

    net is the network to train, on its device; `step` is how many steps were done.
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
        """All that training changes, by name, where it lies. Detached: what writes to `.data` raises no parameter's version."""
        tensors = {f"net.{name}": parameter.detach() for name, parameter in self.net.named_parameters()}
        tensors |= {f"ema.{name}": parameter.detach() for name, parameter in self.ema.named_parameters()}
        for index, (name, _) in enumerate(self.net.named_parameters()):
            tensors |= {f"{key}.{name}": moments[index] for key, moments in self.moments.items()}
        return tensors

    @torch.no_grad()
    def adam(self, learning_rate: float) -> None:
        """Changes the network by its gradients as Adam does: Kingma & Ba 2015, algorithm 1, with its defaults.

        torch.optim.Adam's fused kernel without torch.optim, whose first step imports the compiler: 1.5 s of every start.
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
        torch.autograd.graph.increment_version(
            changed
        )  # the kernel does not; ddpm.networks.winograd keeps what it made of weights

    def tensors(self) -> dict[str, Tensor]:
        """A copy of the state on the CPU; with `step`, all that is needed to go on."""
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.live().items()}

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` gave. Raises ValueError where names or shapes differ."""
        live = self.live()
        if live.keys() != tensors.keys() or any(live[name].shape != tensors[name].shape for name in live):
            raise ValueError("the saved training state is of another network")
        for name, tensor in tensors.items():
            live[name].copy_(tensor)  # in place, keeping the memory layout, so that results stay bit for bit the same
        self.step = step


def _indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Which images step number `step` (from 0) sees: each epoch is a permutation of its own."""
    start, parts = step * batch, []
    while start < (step + 1) * batch:
        epoch, offset = divmod(start, count)
        part = _epoch(count, epoch, seed)[offset : offset + (step + 1) * batch - start]
        parts.append(part)
        start += len(part)
    return torch.cat(parts)


@lru_cache(maxsize=2)  # two meet in a batch
def _epoch(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch)))


def _taken(images: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """images[rows] on the device; what lies elsewhere is copied there without waiting for it."""
    if images.device == device:
        return images[rows.to(device, non_blocking=device.type == "cuda")]
    return images[rows].pin_memory().to(device, non_blocking=True)


def scaled(images: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float32 -1 ... 1 (section 3.3 of Ho et al. 2020); other data is floating point, and stays."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def told(net: Callable[..., Tensor], labels: Tensor | None) -> Callable[..., Tensor]:
    """net(x, t) that is told the labels, int64 [B]; the network itself where there are none."""
    return net if labels is None else lambda x, t: net(x, t, labels)


def _check_parts(batch: int, accumulate: int, world: World) -> None:
    if batch % accumulate:
        raise ValueError(f"a batch of {batch} does not divide into {accumulate} equal parts")
    if batch // accumulate % world.size:
        raise ValueError(f"{batch // accumulate} images at once do not divide among {world.size} processes")


def _classes(labels: Tensor | None, rows: Tensor, dropout: float, generator: torch.Generator) -> Tensor | None:
    """The labels of a batch, each withheld with probability `dropout`; None where there are none."""
    if labels is None:
        return None
    withheld = torch.rand(len(rows), device=generator.device, generator=generator) < dropout
    return _taken(labels, rows, generator.device).masked_fill(withheld, NO_LABEL)


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
    """Trains for as long as the caller asks for steps.

    state: changed in place; its `step` is where training goes on. images: uint8 [N, C, H, W] on the network's device, or on the
    CPU, from which each batch is then copied; or float [N, ...] for data of another kind.
    objective: of the schedule and target. learning_rate: after a linear warm-up over `warmup` steps. clip: of the gradient's
    norm. ema: decay of the average, warmed up as min(ema, (1 + k) / (10 + k)). flip: mirror every other image at random.
    precision: "float32" or "bfloat16" (autocast). forward: what computes net(x, t) instead of the network itself, such as
    its compiled form. labels: int64 [N], there or there, for a conditional network; each is withheld with probability
    label_dropout, so that the network also learns to predict without (algorithm 1 of Ho & Salimans 2022). accumulate: the
    batch goes through the network in that many equal parts, whose gradients add up to the same mean with less memory.
    world: the processes that share this training, each with an equal share of every part and the same arguments; everything
    is drawn for the whole batch, so that their number changes nothing but rounding. `forward` is then made of world.module.
    While it runs, torch's global seed is set at each step if the network has dropout. Raises ValueError.
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
            rows = rows.pin_memory()  # so that their copy to the device is not waited for
        mirrored = torch.rand(batch, 1, 1, 1, device=device, generator=generator) < 0.5 if flip else None
        t = torch.randint(len(objective.a), (batch,), device=device, generator=generator)
        eps = torch.randn(batch, *images.shape[1:], device=device, generator=generator)
        classes = _classes(labels, rows, label_dropout, generator)  # drawn last: without labels all else is the same

        for parameter in parameters:
            parameter.grad = None
        loss = torch.zeros((), device=device)
        for start in range(0, batch, batch // accumulate):
            part = world.rows(slice(start, start + batch // accumulate))
            x_0 = scaled(_taken(images, rows[part], device))
            if mirrored is not None:
                x_0 = torch.where(mirrored[part], x_0.flip(-1), x_0)
            these = None if classes is None else classes[part]
            with world.averaging(net, last=start + batch // accumulate == batch):
                with autocast(device, precision):
                    mean = objective.losses(told(net, these), x_0, t[part], eps[part]).mean()
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
