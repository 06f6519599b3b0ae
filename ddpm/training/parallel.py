"""Shares one training among several processes. Each process takes its rows of every batch, and gradients are averaged.

Averaging runs during backward (DistributedDataParallel: Li et al. 2020, "PyTorch Distributed"). A single process does
not use torch.distributed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm.networks.layers import SharedDropout


@dataclass(frozen=True)
class World:
    """The processes of one training.

    A single process has all rows, and every method returns its argument. Several processes must all make the same calls
    in the same order.

    Args:
        rank: number of this process, from 0. Process 0 writes and reports.
        size: how many processes there are.
    """

    rank: int = 0
    size: int = 1

    def rows(self, part: slice) -> slice:
        """Returns this process's equal share of a part of the batch."""
        share = (part.stop - part.start) // self.size
        return slice(part.start + self.rank * share, part.start + (self.rank + 1) * share)

    def module(self, net: nn.Module) -> nn.Module:
        """Wraps the network to average its gradients. Changes its dropout layers to draw for the whole batch."""
        if self.size == 1:
            return net
        for module in list(net.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Dropout and child.p > 0:
                    setattr(module, name, SharedDropout(child.p, self.rank, self.size))
        return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    def averaging(self, net: Callable[..., Tensor], last: bool) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for forward and backward of a part. Gradients are summed over parts and averaged in the last one."""
        if self.size == 1 or last:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = net.no_sync()  # type: ignore[attr-defined]
        return context

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean over the processes, on `value`'s device."""
        if self.size > 1:
            torch.distributed.all_reduce(value)  # the backend gloo cannot average
            value = value / self.size
        return value

    def largest(self, number: int) -> int:
        """Returns the largest of the processes' numbers. Exchanges them between CPUs, without synchronising a GPU."""
        if self.size == 1:
            return number
        agreed = torch.tensor(number)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        return int(agreed)

    def broadcast(self, thing: Any) -> Any:
        """Returns process 0's argument, any plain data, in every process."""
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
    """Joins the processes of a training during the block. Waits until all have joined.

    Args:
        rank: number of this process, from 0.
        size: how many processes there are.
        device: the device of this process.
        meeting: torch.distributed's init_method; by default the environment variables that torchrun sets.
    """
    from torch import distributed

    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", meeting, rank=rank, world_size=size
    )
    yield World(rank, size)
    distributed.destroy_process_group()  # skipped after an error, since it would wait for the other processes
