"""OPTIMIZERS: the rules by which gradients change the weights. The moments are tensors that can be saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MOMENTUM = 0.95  # momentum of Muon


class Adam:
    """Adam, or AdamW with a weight decay: Kingma & Ba 2015, algorithm 1, and Loshchilov & Hutter 2019, algorithm 2.

    The constants are the papers' defaults. The class calls torch's fused kernel directly, because the first step of
    torch.optim.Adam imports torch's compiler. With that import, the start of every training took 2.0 to 2.4 s, instead of
    0.1 to 0.25 s.

    Args:
        parameters: the weights, which change in place.
        weight_decay: each step subtracts learning rate x weight_decay x weight.

    Attributes:
        moments: numbers of steps, first moments and second moments: three lists of tensors, in the order of the parameters.
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
        """Takes one step with the weights that have gradients."""
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
        torch.autograd.graph.increment_version(changed)  # the kernel does not raise the versions of the tensors itself


def as_matrix(weight: Tensor) -> Tensor:
    """Returns a view of a weight of two or more dimensions as a matrix, with a row for each output. The memory is shared."""
    if weight.ndim > 2 and not weight.is_contiguous():  # convolutions in channels_last
        weight = weight.movedim(1, -1)
    return weight.view(len(weight), -1)


class Muon:
    """Muon (Jordan et al. 2024) for weights of two or more dimensions, and Adam for the others.

    The class uses torch.optim.Muon, which computes in bfloat16. Updates are scaled to the size of Adam's updates (Liu et al.
    2025, section 2.2), so that Adam's learning rates suit Muon too.

    Args:
        parameters: the weights, which change in place.
        weight_decay: the same for both optimisers, see `Adam`.

    Attributes:
        moments: lists of tensors, in the order of the parameters: Muon's momentum, and Adam's moments. A list has None for
            the parameters of the other optimiser.
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
        """Takes one step with the weights that have gradients."""
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
