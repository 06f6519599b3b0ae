"""Chooses the device that torch computes on, and turns out-of-memory errors into one line."""

from __future__ import annotations

import errno
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddpm.errors import InputError

# Messages of out-of-memory errors other than torch.OutOfMemoryError. They come from the CPU's allocator, from oneDNN (which hides
# the cause), from a GPU without room for its context or pinned memory, and from cuBLAS and similar libraries.
NO_MEMORY = re.compile(
    r"allocate memory|could not (create|execute) a primitive(?! descriptor)|CUDA error: out of memory|_STATUS_ALLOC_FAILED"
)
PROBE = 2**26  # bytes; a process that cannot allocate so much is out of memory


def find_device(name: str) -> torch.device:
    """Returns the device for "auto" (the GPU if there is one), "cpu" or "cuda". Raises InputError for "cuda" without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device is cuda, but torch finds no GPU here; set it to auto or cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


@contextmanager
def memory_errors(stage: str, remedy: str) -> Iterator[None]:
    """Turns an out-of-memory error in the block, on the GPU or the CPU, into InputError.

    The message starts with `stage`. `remedy` is the change that helps, such as "lower sampling.batch".
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:  # OutOfMemoryError is a RuntimeError
        if not _is_out_of_memory(error):
            raise
        raise InputError(f"{stage}: out of memory: {remedy} ({' '.join(str(error).split())})") from None


def _is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that memory ran out.

    If the error's text does not tell, allocates PROBE bytes on trial. So call this function in the `except` block, where the
    error's frames still hold their memory.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY.search(str(error)):
        return True
    try:
        mmap.mmap(-1, PROBE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return True
    return False
