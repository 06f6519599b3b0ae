"""Compiles a network, as `compile: true` in a section of params.yaml asks."""

from __future__ import annotations

from typing import Any

from ddpm.errors import InputError
from ddpm.networks import winograd


def compiled(net: Any, section: str) -> Any:
    """Calls winograd.compiled. Without a C compiler, raises InputError that names the section."""
    try:
        return winograd.compiled(net)
    except winograd.NoCompiler as error:
        raise InputError(f"{section}.compile: {error}; install one (gcc), or set it to false") from None
