"""Joins the processes of one training. Each process reads its rank from torchrun's environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddpm.errors import InputError
from ddpm.training import parallel
from ddpm.training.parallel import ALONE, World

MEETING = "DDPM_RANKS_MEET"  # names a file through which processes of one machine meet; without it, MASTER_ADDR is used


def number() -> int:
    """Returns the rank of this process; 0 if it is the only process."""
    return int(os.environ["RANK"]) if started() else 0


def started() -> bool:
    """Returns whether torchrun's variables are set, which means that torchrun started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Joins the processes of a training. Yields the World, which describes them, and the device of this process.

    If `device` is a GPU, each process has its own GPU. Raises InputError if there are too few GPUs.
    """
    if not started() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE, device
        return
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise InputError(f"more processes than GPUs on this machine ({count}); lower compute.processes")
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    meeting = f"file://{os.environ[MEETING]}" if MEETING in os.environ else "env://"
    with parallel.joined(number(), int(os.environ["WORLD_SIZE"]), device, meeting) as world:
        yield world, device
