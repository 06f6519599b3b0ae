"""One piece of work as a child process: what it said, and how it ended."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.runtime import display
from flows.processes import children
from flows.watch import Outcome, Watcher

# What DVC itself prints around a stage, once errors are set aside.
_DVC = re.compile(
    r"$|Running stage '|> |(Stage )?'.*' (didn't change|is cached)|(Updating|Generating) lock file '|Data and pipelines are"
    r"|To (track the changes|enable auto staging)|\t|Use `dvc push`|Checking out|WARNING: Process '"
)
_BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock")
_UNREACHABLE = re.compile(r"MLflow at .* (cannot be reached|is in use by another process)")
_EXIT = re.compile(r"exited with (-?\d+)$")
_KILLED = {-9, 137}
_NOT_IN_CACHE = "failed to transfer"
_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|disk is full")

_uncommitted: set[tuple[Path, str]] = set()  # stages whose outputs found no room in DVC's cache


def reproduce(stage: str, root: Path, watcher: Watcher, *how: str) -> Outcome:
    """`dvc repro` of one stage; DVC decides whether there is anything to do. Raises children.Stopped.

    DVC exits with 0 when its cache has no room for a folder. The stage fails here then, and when it is tried again
    `dvc commit` puts its outputs into the cache, so that the stage does not run twice.

    how: options of `dvc repro` other than --single-item.
    """
    if (root, stage) in _uncommitted and (outcome := _commit(stage, root, watcher)):
        return outcome
    command = ("dvc", "--wait-for-lock", "repro", *(how or ("--single-item",)), stage)
    code, said, dvc = _run(stage, command, root, watcher)
    errors = _errors(dvc)
    if any(line.startswith(_NOT_IN_CACHE) for line in errors):
        _uncommitted.add((root, stage))
        code = code or 1
    return _failure(code, said, errors) if code else _success(stage, said, dvc)


def _commit(stage: str, root: Path, watcher: Watcher) -> Outcome | None:
    """Puts outputs into DVC's cache that found no room there. None where the stage has to run again."""
    code, said, dvc = _run(stage, ("dvc", "--wait-for-lock", "commit", stage), root, watcher)
    errors = _errors(dvc)
    if code in _KILLED:
        return _failure(code, said, errors)
    if full := _full(errors):
        return full
    _uncommitted.discard((root, stage))
    return None if code or errors else Outcome("Completed", "done; its outputs are in DVC's cache now")


def _success(stage: str, said: list[str], dvc: list[str]) -> Outcome:
    ran = any(line.startswith(f"Running stage '{stage}'") for line in dvc)  # whatever came of those before it
    if not ran and any("didn't change, skipping" in line for line in dvc):
        return Outcome("Unchanged", "unchanged")
    if not ran and any("is cached - skipping run" in line for line in dvc):
        return Outcome("Restored", "restored from DVC's cache")
    return Outcome("Completed", said[-1].removeprefix(f"{stage}: ") if said else "done")


def _failure(code: int, said: list[str], errors: list[str]) -> Outcome:
    ended = _EXIT.search(errors[-1]) if errors else None
    if code in _KILLED or (ended and int(ended[1]) in _KILLED):
        return Outcome("Killed", "killed; out of memory?")
    if any(_BUSY.search(line) for line in errors):
        return Outcome("Busy", next(line for line in errors if _BUSY.search(line)))
    if full := _full(errors):
        return full
    left_out = [f"not in DVC's cache: {line}" for line in errors if line.startswith(_NOT_IN_CACHE)]
    return Outcome("Failed", (left_out or said or errors or [f"dvc ended with exit code {code}"])[-1])


def _full(errors: list[str]) -> Outcome | None:
    found = next(filter(None, map(_FULL.search, errors)), None)
    return found and Outcome("Full", f"DVC found no room on the disk ({found[0]}): free some space and run this again")


def _errors(dvc: list[str]) -> list[str]:
    return [line.removeprefix("ERROR: ") for line in dvc if line.startswith("ERROR: ")]


class RemoteAway(InputError):
    """The DVC remote does not answer as it should."""


def exchange(verb: str, name: str, root: Path, watcher: Watcher, *stages: str) -> None:
    """The run-cache and outputs, to ("push") or from ("fetch") the DVC remote. Raises RemoteAway, children.Stopped.

    stages: whose outputs; by default those of the stage `name`.
    What dvc.lock names and the remote lacks is no error of a fetch: the stage has changed, and the run-cache says how.
    """
    command = ("dvc", "--wait-for-lock", verb, "--run-cache", *(stages or (name,)))
    code, said, dvc = _run(name, command, root, watcher)
    if code:
        raise RemoteAway(f"{name}: dvc {verb}: {(dvc or said or [f'exit code {code}'])[-1]}")


def run(
    name: str, command: tuple[str, ...], root: Path, watcher: Watcher, standard_input: int = subprocess.DEVNULL
) -> Outcome:
    """A command that is no DVC stage. Raises children.Stopped."""
    code, said, _ = _run(name, command, root, watcher, standard_input)
    if code == 0:
        return Outcome("Completed", said[-1] if said else "done")
    text = said[-1] if said else f"'{' '.join(command)}' ended with exit code {code}"
    return Outcome("Unreachable" if _UNREACHABLE.search(text) else "Failed", text)


def _run(
    name: str, command: tuple[str, ...], root: Path, watcher: Watcher, standard_input: int = subprocess.DEVNULL
) -> tuple[int, list[str], list[str]]:
    """-> the exit code, the last lines that the work printed, and those that DVC printed."""
    said: list[str] = []
    dvc: list[str] = []

    def on_line(line: str) -> None:
        if report := _report(line):
            watcher.progress(name, report)
        elif _DVC.match(line):
            dvc.append(line)
        elif line.startswith("ERROR: "):
            dvc.append(line)
            watcher.line(name, line)
        else:
            said[:] = [*said[-1:], line]
            watcher.line(name, line)

    watcher.started(name)
    return children.run(command, root, on_line, standard_input), said, dvc


def _report(line: str) -> dict[str, Any]:
    """Of the progress, if the line is one. Where another text got into it, it is a line like others."""
    if not line.startswith(display.PREFIX):
        return {}
    try:
        report = json.loads(line.removeprefix(display.PREFIX))
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}
