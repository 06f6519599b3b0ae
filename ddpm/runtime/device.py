"""Where torch computes."""

from __future__ import annotations

import errno
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddpm.errors import InputError

# What errors of memory say that are no OutOfMemoryError: of the CPU's allocator; of oneDNN, which hides the reason; of a GPU
# without room for its context or for pinned memory; of cuBLAS and its like without room for their own.
NO_MEMORY = re.compile(
    r"allocate memory|could not (create|execute) a primitive(?! descriptor)|CUDA error: out of memory|_STATUS_ALLOC_FAILED"
)
PROBE = 2**26  # bytes; a process that cannot have as many more is out of memory, whatever an error says


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
    except (RuntimeError, MemoryError, OSError) as error:  # most often the GPU's is an OutOfMemoryError
        if not _is_of_memory(error):
            raise
        raise InputError(f"{stage}: out of memory: {remedy} ({' '.join(str(error).split())})") from None


def _is_of_memory(error: Exception) -> bool:
    """Whether memory ran out. Asked while the error is handled, before what its frames hold is freed."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY.search(str(error)):
        return True
    try:
        mmap.mmap(-1, PROBE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return True
    return False
