"""One piece of work as a child process: what it said, and how it ended."""

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
_HELD = "where no DVC runs, a killed one left this: delete .dvc/tmp/rwlock"

_uncommitted: set[tuple[Path, str]] = set()  # stages whose outputs found no room in DVC's cache


def reproduce(stage: str, root: Path, watcher: Watcher, *how: str) -> Outcome:
    """`dvc repro` of one stage; DVC decides whether there is anything to do. Raises children.FlowStopped.

    DVC exits with 0 when its cache has no room for a folder. The stage fails here then, and when it is tried again
    `dvc commit` puts its outputs into the cache, so that the stage does not run twice.

    how: options of `dvc repro` other than --single-item.
    """
    if (root, stage) in _uncommitted and (outcome := _commit(stage, root, watcher)):
        return outcome
    said, ended = _dvc(stage, root, watcher, "repro", *(how or ("--single-item",)), stage)
    if ended.untransferred:
        _uncommitted.add((root, stage))
    return _failure(said, ended) if ended.code or ended.untransferred else _success(stage, said, ended)


def _commit(stage: str, root: Path, watcher: Watcher) -> Outcome | None:
    """Puts outputs into DVC's cache that found no room there. None where the stage has to run again."""
    said, ended = _dvc(stage, root, watcher, "commit", stage)
    if ended.killed or ended.full:
        return _failure(said, ended)
    _uncommitted.discard((root, stage))
    return None if ended.code or ended.errors else Outcome("Completed", "done; its outputs are in DVC's cache now")


def _success(stage: str, said: list[str], ended: Ended) -> Outcome:
    if stage not in ended.changed:
        return Outcome("Unchanged", "unchanged")
    if stage not in ended.ran:
        return Outcome("Restored", "restored from DVC's cache")
    return Outcome("Completed", said[-1].removeprefix(f"{stage}: ") if said else "done")


def _failure(said: list[str], ended: Ended) -> Outcome:
    if ended.killed:
        return Outcome("Killed", "killed; out of memory?")
    if ended.busy:
        return Outcome("Busy", f"{ended.errors[-1]}; {_HELD}")
    if ended.full:
        text = f"DVC found no room on the disk ({ended.full}): free some space and run this again"
        return Outcome("Full", text)
    left_out = [f"not in DVC's cache: {line}" for line in ended.errors if ended.untransferred]
    return Outcome("Failed", (left_out or said or ended.errors or ["dvc failed"])[-1])


class RemoteAway(InputError):
    """The DVC remote does not answer as it should."""


def exchange(verb: str, name: str, root: Path, watcher: Watcher, *stages: str) -> None:
    """The run-cache and outputs, to ("push") or from ("fetch") the DVC remote. Raises RemoteAway, children.FlowStopped.

    stages: whose outputs; by default those of the stage `name`.
    What dvc.lock names and the remote lacks is no error of a fetch: the stage has changed, and the run-cache says how.
    """
    said, ended = _dvc(name, root, watcher, verb, "--run-cache", *(stages or (name,)))
    if ended.code:
        raise RemoteAway(f"{name}: dvc {verb}: {(ended.errors or said or ['killed'])[-1]}")


def run(
    name: str, command: tuple[str, ...], root: Path, watcher: Watcher, standard_input: int = subprocess.DEVNULL
) -> Outcome:
    """A command that is no DVC stage. Raises children.FlowStopped."""
    code, said, _ = _run(name, command, root, watcher, standard_input)
    if code == 0:
        return Outcome("Completed", said[-1] if said else "done")
    text = said[-1] if said else f"'{' '.join(command)}' ended with exit code {code}"
    return Outcome("Unreachable" if _UNREACHABLE.search(text) else "Failed", text)


def _dvc(name: str, root: Path, watcher: Watcher, *arguments: str) -> tuple[list[str], Ended]:
    """Runs a DVC command. Returns the last lines that the stage printed, and how the command ended."""
    code, said, ended = _run(name, (*dvc_command.COMMAND, "--wait-for-lock", *arguments), root, watcher)
    if ended is None:  # the process that runs DVC was killed before it could report
        ended = Ended(code or 1, killed=code in dvc_command.KILLED)
    for line in ended.errors:
        watcher.line(name, f"ERROR: {line}")
    return said, ended


def _run(
    name: str, command: tuple[str, ...], root: Path, watcher: Watcher, standard_input: int = subprocess.DEVNULL
) -> tuple[int, list[str], Ended | None]:
    """Runs a command. Returns the exit code, the last lines that it printed, and how DVC ended if it reported that."""
    said: list[str] = []
    ended: Ended | None = None

    def on_line(line: str) -> None:
        nonlocal ended
        if not (report := _report(line)):
            said[:] = [*said[-1:], line]
            watcher.line(name, line)
        elif found := Ended.read(report):
            ended = found
        else:
            watcher.progress(name, report)

    watcher.started(name)
    return children.run(command, root, on_line, standard_input), said, ended


def _report(line: str) -> dict[str, Any]:
    """Parses a line of JSON. Returns {} for any other line, also for one that another text got into."""
    if not line.startswith(display.PREFIX):
        return {}
    try:
        report = json.loads(line.removeprefix(display.PREFIX))
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}
