"""Runs DVC and other commands in child processes, passes their output on, and returns how they ended."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.runtime import display
from flows.processes import children, dvc_command
from flows.processes.dvc_command import Ended
from flows.watch import Outcome, Watcher

_UNREACHABLE = re.compile(r"MLflow at .* (cannot be reached|is in use by another process)")
_HELD = "if no DVC is running, a killed DVC left this lock: delete .dvc/tmp/rwlock"

_uncommitted: set[tuple[Path, str]] = set()  # the stages whose outputs DVC could not copy into its cache


def reproduce(stage: str, root: Path, watcher: Watcher, *how: str) -> Outcome:
    """Runs `dvc repro` for one stage. DVC decides whether the stage must run.

    If a copy into DVC's cache fails, DVC may still exit with 0. This function fails the stage in that case. On the retry,
    `dvc commit` copies the outputs, so that the stage does not run twice.

    Args:
        stage: the stage's name in DVC.
        root: the checkout.
        watcher: receives output and progress.
        how: options of `dvc repro`, by default --single-item.

    Raises:
        children.FlowStopped: the flow is ending.
    """
    if (root, stage) in _uncommitted and (outcome := _commit(stage, root, watcher)):
        return outcome
    last_lines, ended = _dvc(stage, root, watcher, "repro", *(how or ("--single-item",)), stage)
    if ended.untransferred:
        _uncommitted.add((root, stage))
    return _failure(last_lines, ended) if ended.code or ended.untransferred else _success(stage, last_lines, ended)


def _commit(stage: str, root: Path, watcher: Watcher) -> Outcome | None:
    """Copies the outputs of a stage into DVC's cache after a failed copy. Returns None if the stage must run again."""
    last_lines, ended = _dvc(stage, root, watcher, "commit", stage)
    if ended.killed or ended.full:
        return _failure(last_lines, ended)
    _uncommitted.discard((root, stage))
    return None if ended.code or ended.errors else Outcome("Completed", "done; its outputs are in DVC's cache now")


def _success(stage: str, last_lines: list[str], ended: Ended) -> Outcome:
    if stage not in ended.changed:
        return Outcome("Unchanged", "unchanged")
    if stage not in ended.ran:
        return Outcome("Restored", "restored from DVC's cache")
    return Outcome("Completed", last_lines[-1].removeprefix(f"{stage}: ") if last_lines else "done")


def _failure(last_lines: list[str], ended: Ended) -> Outcome:
    if ended.killed:
        return Outcome("Killed", "the stage was killed, perhaps because memory ran out")
    if ended.busy:
        return Outcome("Busy", f"{ended.errors[-1]}; {_HELD}")
    if ended.full:
        text = f"DVC found no room on the disk ({ended.full}): free some space and run this again"
        return Outcome("Full", text)
    left_out = [f"not in DVC's cache: {line}" for line in ended.errors if ended.untransferred]
    return Outcome("Failed", (left_out or last_lines or ended.errors or ["dvc failed"])[-1])


class RemoteAway(InputError):
    """The DVC remote cannot be reached, or a transfer to or from it failed."""


def exchange(verb: str, name: str, root: Path, watcher: Watcher, *stages: str) -> None:
    """Pushes or fetches the run-cache and the outputs of stages to or from the DVC remote.

    A fetch does not fail if the remote lacks outputs that dvc.lock names. If a stage has changed, dvc.lock still names its old
    outputs, and DVC finds the new outputs through the run-cache.

    Args:
        verb: "push" or "fetch".
        name: the name under which `watcher` shows the transfer.
        root: the checkout.
        watcher: receives output and progress.
        stages: the stages whose outputs are transferred; by default the stage `name`.

    Raises:
        RemoteAway: the transfer failed.
        children.FlowStopped: the flow is ending.
    """
    last_lines, ended = _dvc(name, root, watcher, verb, "--run-cache", *(stages or (name,)))
    if ended.code:
        raise RemoteAway(f"{name}: dvc {verb}: {(ended.errors or last_lines or ['killed'])[-1]}")


def run(
    name: str, command: tuple[str, ...], root: Path, watcher: Watcher, standard_input: int = subprocess.DEVNULL
) -> Outcome:
    """Runs a command other than a DVC stage.

    Args:
        name: the name under which `watcher` shows the command.
        command: the program and its arguments.
        root: the folder in which the command runs.
        watcher: receives output and progress.
        standard_input: a file descriptor. By default, standard input is empty.

    Raises:
        children.FlowStopped: the flow is ending.
    """
    code, last_lines, _ = _run(name, command, root, watcher, standard_input)
    if code == 0:
        return Outcome("Completed", last_lines[-1] if last_lines else "done")
    text = last_lines[-1] if last_lines else f"'{' '.join(command)}' ended with exit code {code}"
    return Outcome("Unreachable" if _UNREACHABLE.search(text) else "Failed", text)


def _dvc(name: str, root: Path, watcher: Watcher, *arguments: str) -> tuple[list[str], Ended]:
    """Runs a DVC command. Returns the last lines that were printed, and DVC's report on how the command ended."""
    code, last_lines, ended = _run(name, (*dvc_command.COMMAND, "--wait-for-lock", *arguments), root, watcher)
    if ended is None:  # the process that runs DVC was killed before it could report
        ended = Ended(code or 1, killed=code in dvc_command.KILLED)
    for line in ended.errors:
        watcher.line(name, f"ERROR: {line}")
    return last_lines, ended


def _run(
    name: str, command: tuple[str, ...], root: Path, watcher: Watcher, standard_input: int = subprocess.DEVNULL
) -> tuple[int, list[str], Ended | None]:
    """Runs a command. Returns the exit code, the last printed lines, and DVC's report on how the command ended, if any."""
    last_lines: list[str] = []
    ended: Ended | None = None

    def on_line(line: str) -> None:
        nonlocal ended
        if not line:
            return
        if not (report := _report(line)):
            last_lines[:] = [*last_lines[-1:], line]
            watcher.line(name, line)
        elif found := Ended.read(report):
            ended = found
        else:
            watcher.progress(name, report)

    watcher.started(name)
    return children.run(command, root, on_line, standard_input), last_lines, ended


def _report(line: str) -> dict[str, Any]:
    """Parses a JSON line. Returns {} for any other line, and for JSON that is mixed with other text."""
    if not line.startswith(display.PREFIX):
        return {}
    try:
        report = json.loads(line.removeprefix(display.PREFIX))
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}
