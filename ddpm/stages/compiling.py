"""What `compile: true` of a section does."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ddpm import native
from ddpm.stages.errors import InputError

Network = TypeVar("Network", bound=nn.Module)


def compiled(net: Network, section: str) -> Network:
    """native.compiled; InputError, where there is no C compiler, names the section whose key asks for it."""
    try:
        return native.compiled(net)
    except native.NoCompiler as error:
        raise InputError(f"{section}.compile: {error}; install one (gcc), or set it to false") from None
