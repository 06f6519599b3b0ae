"""Compiles a network for a section of params.yaml with `compile: true`."""

from __future__ import annotations

from typing import Any

from ddpm.errors import InputError
from ddpm.networks import winograd


def compiled(net: Any, section: str) -> Any:
    """Returns winograd.compiled(net). Without a working C compiler, raises an InputError that names the section."""
    try:
        return winograd.compiled(net)
    except winograd.NoCompiler as error:
        raise InputError(
            f"{section}.compile: {error}; repair that (install gcc if no C compiler is found), or set it to false"
        ) from None
