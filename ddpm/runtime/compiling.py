"""Compiles networks for the stages, and resolves the value `auto` of `precision` and `compile` for this machine."""

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

RESOLVE_AGAIN = "dvc repro --force --single-item probe"  # the command that resolves `auto` again


def compiled(net: Any, section: str) -> Any:
    """Compiles a network with winograd.compiled. Raises InputError if no C compiler works.

    section: "training" or "sampling", the section of params.yaml that the error names.
    """
    try:
        return winograd.compiled(net)
    except winograd.NoCompiler as error:
        raise InputError(
            f"{section}.compile: {error}; repair that (install gcc if no C compiler is found), or set {section}.compile to false;"
            f" if the value is {AUTO}, `{RESOLVE_AGAIN}` chooses again for this machine"
        ) from None


@cache
def probe(device: torch.device) -> tuple[Auto, str]:
    """Returns the values that `auto` gets on this machine, and the reason in a few words.

    Networks are compiled if compilation works. The precision is bfloat16 if bfloat16 is faster than float32: on a GPU with
    bfloat16 units, and on a CPU with AVX512-BF16 if networks are compiled.
    """
    problem = _obstacle(device)
    if device.type == "cuda":
        kind, units, has_units = "GPU", "bfloat16 units", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        kind, units, has_units = "CPU", "AVX512-BF16", multiplies_bfloat16()
    faster = has_units and (device.type == "cuda" or not problem)
    reason = f"this {kind} has {units}" if has_units else f"this {kind} has no {units}"
    if problem:
        reason = f"nothing can be compiled here ({problem}); install gcc, then run `{RESOLVE_AGAIN}`"
    return Auto(precision="bfloat16" if faster else "float32", compile=not problem), reason


def resolved(params: Params, section: str, device: torch.device, root: Path, report: Report) -> Params:
    """Replaces `auto` by the values in auto.json, which the machine that ran `ddpm probe` wrote.

    Reports a line if `auto` would get other values on this machine.

    Args:
        params: the parameters.
        section: "training" or "sampling".
        device: the device of this stage.
        root: the project's folder, with auto.json.
        report: gets the line.

    Returns:
        The parameters without `auto`.

    Raises:
        InputError: auto.json is needed, and missing or wrong.
    """
    result = params.resolved(root)
    given, used = getattr(params, section), getattr(result, section)
    if given != used and (local := probe(device)[0].within(given)) != used:
        values = [f"precision: {auto.precision}, compile: {str(auto.compile).lower()}" for auto in (used, local)]
        line = (
            f"{values[0]}, as {AUTO} was resolved for this sweep; on this machine it would be {values[1]}"
            f" (`{RESOLVE_AGAIN}` resolves it again)"
        )
        report(Progress(0, 0, "", message=line))
    return result


def _obstacle(device: torch.device) -> str:
    """Compiles and runs a small network. Returns the error message, or "" if both work.

    The network must run, because torch.compile reports a compiler without headers only when the network first runs.
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
