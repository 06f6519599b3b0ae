"""OPTIMIZERS: how gradients change the weights. An optimiser keeps its moments as tensors, so that a training can resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MOMENTUM = 0.95  # of Muon


class Adam:
    """Adam, or AdamW with a weight decay: Kingma & Ba 2015, algorithm 1, and Loshchilov & Hutter 2019, algorithm 2.

    Their default constants. Uses the fused kernel directly, because the first step of torch.optim.Adam imports torch's
    compiler: measured 2.0 to 2.4 s at the start of every training, against 0.1 to 0.25 s.

    Args:
        parameters: the weights, which change in place.
        weight_decay: the part of each weight that a step takes away, divided by the learning rate.

    Attributes:
        moments: steps, first and second moments: a list of tensors each, in the order of the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float = 0.0) -> None:
        self.parameters, self.weight_decay = list(parameters), weight_decay
        self.moments = {
            "step": [torch.zeros((), dtype=torch.float32, device=parameter.device) for parameter in parameters],
            "exp_avg": [torch.zeros_like(parameter) for parameter in parameters],
            "exp_avg_sq": [torch.zeros_like(parameter) for parameter in parameters],
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Changes the weights that have gradients."""
        used = [index for index, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not used:
            return
        steps, averages, squares = ([moments[index] for index in used] for moments in self.moments.values())
        changed: list[Tensor] = [self.parameters[index] for index in used]
        torch._foreach_add_(steps, 1)
        (torch._fused_adamw_ if self.weight_decay else torch._fused_adam_)(
            changed,
            [gradient for parameter in self.parameters if (gradient := parameter.grad) is not None],
            averages,
            squares,
            [],
            steps,
            lr=learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=self.weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        torch.autograd.graph.increment_version(changed)  # the kernel itself does not raise the versions


def as_matrix(weight: Tensor) -> Tensor:
    """Returns a weight of two or more dimensions as a matrix, a row for each output, that shares the weight's memory."""
    if weight.ndim > 2 and not weight.is_contiguous():  # convolutions in channels_last
        weight = weight.movedim(1, -1)
    return weight.view(len(weight), -1)


class Muon:
    """Muon (Jordan et al. 2024) for weights of two or more dimensions, and Adam for the others.

    torch.optim.Muon, with updates scaled to the size of Adam's (Liu et al. 2025, section 2.2), so that Adam's learning
    rates suit it. Its arithmetic is in bfloat16.

    Args: as for Adam, whose weight decay is the same.

    Attributes:
        moments: of the matrices, a momentum each; of the others, what Adam keeps. A list holds None where there is none.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float = 0.0) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.ndim >= 2]
        self.others = Adam([parameter for parameter in parameters if parameter.ndim < 2], weight_decay)
        momenta = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.matrices = [as_matrix(parameter.detach()) for parameter in self.parameters]
        self.muon = torch.optim.Muon(
            self.matrices, weight_decay=weight_decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
        )
        for matrix, momentum in zip(self.matrices, momenta, strict=True):
            self.muon.state[matrix]["momentum_buffer"] = as_matrix(momentum)
        places: dict[int, int] = {id(parameter): index for index, parameter in enumerate(parameters)}
        self.moments: dict[str, list[Tensor | None]] = {"momentum": [None] * len(parameters)}
        for parameter, momentum in zip(self.parameters, momenta, strict=True):
            self.moments["momentum"][places[id(parameter)]] = momentum
        for key, moments in self.others.moments.items():
            self.moments[key] = [None] * len(parameters)
            for parameter, moment in zip(self.others.parameters, moments, strict=True):
                self.moments[key][places[id(parameter)]] = moment

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Changes the weights that have gradients."""
        self.others.step(learning_rate)
        for parameter, matrix in zip(self.parameters, self.matrices, strict=True):
            gradient = parameter.grad
            if gradient is not None and parameter.stride() != gradient.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
            matrix.grad = None if gradient is None else as_matrix(gradient)
        for group in self.muon.param_groups:
            group["lr"] = learning_rate
        self.muon.step()


Optimizer = Adam | Muon
# name -> (parameters, weight_decay) -> optimiser
OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter], float], Optimizer]] = {
    "adam": Adam,
    "adamw": Adam,
    "muon": Muon,
}
