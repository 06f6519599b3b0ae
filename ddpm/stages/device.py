"""Where torch computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddpm.stages.errors import InputError

# What errors say that are no OutOfMemoryError: of the CPU; of a GPU without room for its context or for pinned memory; of cuBLAS
# and its like without room for their own.
NO_MEMORY = ("allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def find_device(name: str) -> torch.device:
    """ "auto" takes the GPU where there is one. Raises InputError for "cuda" without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device is cuda, but torch finds no GPU here; set it to auto or cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


@contextmanager
def memory_errors(stage: str, remedy: str) -> Iterator[None]:
    """Raises InputError, one line that says what to lower, where the block finds no memory on the GPU or the CPU."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # most often the GPU's is an OutOfMemoryError
        text = " ".join(str(error).split())
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(said in text for said in NO_MEMORY):
            raise
        raise InputError(f"{stage}: out of memory: {remedy} ({text})") from None
