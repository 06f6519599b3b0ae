"""Compiles a network if `compile: true` stands in a section of params.yaml, and finds out what `auto` means on this machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from ddpm.errors import InputError
from ddpm.files.params import Params
from ddpm.networks import winograd
from ddpm.networks.winograd import multiplies_bfloat16
from ddpm.parameters import AUTO, Auto
from ddpm.runtime.progress import Progress, Report

AGAIN = "dvc repro --force --single-item probe"  # resolves `auto` again


def compiled(net: Any, section: str) -> Any:
    """Returns winograd.compiled(net). Without a working C compiler, raises an InputError that names the section."""
    try:
        return winograd.compiled(net)
    except winograd.NoCompiler as error:
        raise InputError(
            f"{section}.compile: {error}; repair that (install gcc if no C compiler is found), or set it to false; if it is"
            f" {AUTO}, `{AGAIN}` resolves it for this machine"
        ) from None


@cache
def probe(device: torch.device) -> tuple[Auto, str]:
    """Returns what `auto` means on this machine, and the reason in a few words.

    A network is compiled if that works. bfloat16 is used where it is faster than float32: on a GPU with units for it, and on
    a CPU in the compiled kernels.
    """
    problem = _obstacle(device)
    if device.type == "cuda":
        kind, units, there = "GPU", "bfloat16 units", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        kind, units, there = "CPU", "AVX512-BF16", multiplies_bfloat16()
    faster = there and (device.type == "cuda" or not problem)
    reason = f"this {kind} has {units}" if there else f"this {kind} has no {units}"
    if problem:
        reason = f"nothing can be compiled here ({problem}); install gcc, then run `{AGAIN}`"
    return Auto(precision="bfloat16" if faster else "float32", compile=not problem), reason


def resolved(params: Params, section: str, device: torch.device, root: Path, report: Report) -> Params:
    """Returns `params` with the values of auto.json in place of `auto`. Raises InputError.

    Reports a line if `auto` would mean something else on this machine, which then follows the one that ran `ddpm probe`.
    section: "training" or "sampling".
    """
    found = params.resolved(root)
    asked, used = getattr(params, section), getattr(found, section)
    if asked != used and (here := probe(device)[0].within(asked)) != used:
        values = [f"precision: {each.precision}, compile: {str(each.compile).lower()}" for each in (used, here)]
        line = (
            f"{values[0]}, as {AUTO} was resolved for this sweep; on this machine it would be {values[1]} (`{AGAIN}`)"
        )
        report(Progress(0, 0, "", message=line))
    return found


def _obstacle(device: torch.device) -> str:
    """Compiles a small network and runs it. Returns why that fails, or "" if it works.

    A compiler that is installed may lack headers, and torch.compile says so only when the network first runs.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            net = winograd.compiled(torch.nn.Conv2d(8, 8, 3, padding=1).to(device))
            net(torch.zeros(1, 8, 8, 8, device=device))
    except winograd.NoCompiler as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - torch.compile raises many types
        return f"torch.compile: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""
