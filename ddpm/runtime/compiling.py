"""What `compile: true` of a section does."""

from __future__ import annotations

from typing import Any

from ddpm.errors import InputError
from ddpm.networks import winograd


def compiled(net: Any, section: str) -> Any:
    """native.compiled; InputError, where there is no C compiler, names the section whose key asks for it."""
    try:
        return winograd.compiled(net)
    except winograd.NoCompiler as error:
        raise InputError(f"{section}.compile: {error}; install one (gcc), or set it to false") from None
