"""Where torch computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddpm.stages.errors import InputError


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
    except (RuntimeError, MemoryError) as error:  # the GPU's is an OutOfMemoryError, the CPU's a plain RuntimeError
        text = " ".join(str(error).split())
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in text:
            raise
        raise InputError(f"{stage}: out of memory: {remedy} ({text})") from None
