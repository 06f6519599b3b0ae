"""One training on several processes: each takes its rows of the same batch, and gradients are averaged while backward runs
(DistributedDataParallel, Li et al. 2020, "PyTorch Distributed").

torch.distributed is reached only where there is more than one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """The processes of one training, of which this is number `rank` (from 0) of `size`. Number 0 writes and reports.

    Where there is one process, it has all rows, and every method gives back what it got. Where there are more, all of them must
    make the same calls in the same order.
    """

    rank: int = 0
    size: int = 1

    def rows(self, part: slice) -> slice:
        """This process's equal share of a part of the batch."""
        share = (part.stop - part.start) // self.size
        return slice(part.start + self.rank * share, part.start + (self.rank + 1) * share)

    def module(self, net: nn.Module) -> nn.Module:
        """What computes net(x, t) and averages the gradients. The network is changed: its dropout is the whole batch's."""
        if self.size == 1:
            return net
        for module in list(net.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Dropout and child.p > 0:
                    setattr(module, name, _Dropout(child.p, self))
        return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    def averaging(self, net: Callable[..., Tensor], last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a part of the batch: only the last one averages, the others add up."""
        if self.size == 1 or last:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = net.no_sync()  # type: ignore[attr-defined]
        return context

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, on the device that `value` is on."""
        if self.size > 1:
            torch.distributed.all_reduce(value)  # gloo has no average
            value = value / self.size
        return value

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers, agreed on by their CPUs: no GPU is waited for."""
        if self.size == 1:
            return number
        agreed = torch.tensor(number)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        return int(agreed)

    def told(self, thing: Any) -> Any:
        """What process 0 has: any plain data."""
        if self.size == 1:
            return thing
        things = [thing]
        torch.distributed.broadcast_object_list(things, device=torch.device("cpu"))
        return things[0]

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors with those of process 0."""
        for tensor in tensors if self.size > 1 else ():
            torch.distributed.broadcast(tensor, 0)


ALONE = World()


@contextlib.contextmanager
def joined(rank: int, size: int, device: torch.device, meeting: str = "env://") -> Iterator[World]:
    """The World of `size` processes, in each of them, for the block. Waits until all are there.

    device: what this one computes on. meeting: torch.distributed's init_method; by default, what torchrun's variables say.
    """
    from torch import distributed

    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", meeting, rank=rank, world_size=size
    )
    yield World(rank, size)
    distributed.destroy_process_group()  # not after an error: it would wait for the others


class _Dropout(nn.Dropout):
    """The rows of this process of the mask that one process would draw for the whole part of the batch: as many draws as
    that, of which one share is kept.
    """

    def __init__(self, p: float, world: World) -> None:
        super().__init__(p)
        self.world = world

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape, strides = (len(x) * self.world.size, *x.shape[1:]), (x[0].numel(), *x.stride()[1:])
        ones = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).fill_(1)
        mask = F.dropout(ones, self.p)
        return x * mask[self.world.rows(slice(0, len(mask)))]
