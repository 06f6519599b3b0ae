"""Shares one training among several processes. Each process computes the gradient on an equal share of every batch.

The gradients are averaged during backward (DistributedDataParallel: Li et al. 2020, "PyTorch Distributed"). A training with a
single process does not use torch.distributed.
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

    A single process takes the whole batch, and the methods exchange nothing. Several processes must all call the same methods
    in the same order.

    Args:
        rank: the index of this process, from 0. Process 0 writes and reports.
        size: the number of processes.
    """

    rank: int = 0
    size: int = 1

    def rows(self, part: slice) -> slice:
        """Returns this process's equal share of a part of the batch."""
        share = (part.stop - part.start) // self.size
        return slice(part.start + self.rank * share, part.start + (self.rank + 1) * share)

    def module(self, net: nn.Module) -> nn.Module:
        """Wraps the network so that gradients are averaged. Replaces dropout layers by SharedDropout, in place."""
        if self.size == 1:
            return net
        for module in list(net.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Dropout and child.p > 0:
                    setattr(module, name, SharedDropout(child.p, self.rank, self.size))
        return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    def averaging(self, net: Callable[..., Tensor], last: bool) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for forward and backward of one micro-batch.

        Gradients add up over the micro-batches. In the last micro-batch, they are averaged over the processes.
        """
        if self.size == 1 or last:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = net.no_sync()  # type: ignore[attr-defined]
        return context

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean over the processes, on the value's device."""
        if self.size > 1:
            torch.distributed.all_reduce(value)  # the backend gloo cannot average
            value = value / self.size
        return value

    def largest(self, number: int) -> int:
        """Returns the largest of the processes' numbers. The CPUs exchange the numbers, so no GPU is synchronised."""
        if self.size == 1:
            return number
        maximum = torch.tensor(number)
        torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX)
        return int(maximum)

    def broadcast(self, value: Any) -> Any:
        """Returns, in every process, the value that process 0 passes. The value must be picklable."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors with the tensors of process 0."""
        for tensor in tensors if self.size > 1 else ():
            torch.distributed.broadcast(tensor, 0)


ALONE = World()


@contextlib.contextmanager
def joined(rank: int, size: int, device: torch.device, meeting: str = "env://") -> Iterator[World]:
    """Joins the processes of a training during the block. Waits until all processes have joined.

    Args:
        rank: the index of this process, from 0.
        size: the number of processes.
        device: the device of this process.
        meeting: torch.distributed's init_method; by default the environment variables that torchrun sets.
    """
    from torch import distributed

    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", meeting, rank=rank, world_size=size
    )
    yield World(rank, size)
    distributed.destroy_process_group()  # skipped after an error, because the call would wait for the other processes
