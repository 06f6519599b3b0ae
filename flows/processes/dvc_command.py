"""Runs one DVC command in this process and prints the result as a JSON line.

For example: `python -m flows.processes.dvc_command repro train@linear`. DVC's own command line prints its result only as text.
Here a JSON line at the end replaces DVC's log. The output of stages stays unchanged.
"""

from __future__ import annotations

import errno
import json
import logging
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import click

from ddpm.provenance import atomic_lock
from ddpm.runtime import display

COMMAND = (sys.executable, "-B", "-m", "flows.processes.dvc_command")  # DVC's arguments follow
KEY = "dvc"  # in the JSON line
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# the exit codes of a killed process, and of a shell whose command was killed
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
LOGGERS = ("dvc", "dvc_data", "dvc_objects")
Run = Callable[..., None]  # (executable, command, **options of subprocess.Popen)


@dataclass(frozen=True)
class Ended:
    """The result of a DVC command.

    Args:
        code: 0 for success, 1 for failure.
        ran: the stages whose commands were started.
        changed: the stages that `dvc repro` ran or took from the cache.
        killed: SIGKILL ended a stage.
        busy: another DVC process holds a lock of the repository or of an output.
        full: the error message if the disk is full, such as "No space left on device"; otherwise "".
        untransferred: a file could not be copied into or out of the cache. DVC may still exit with 0.
        errors: DVC's error messages, one line each.
    """

    code: int
    ran: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    killed: bool = False
    busy: bool = False
    full: str = ""
    untransferred: bool = False
    errors: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> Ended | None:
        """Returns the report in a parsed JSON line, or None if the line is not a report."""
        found = report.get(KEY)
        known = {item.name for item in fields(cls)}
        return cls(**found) if isinstance(found, dict) and found.keys() == known else None


class _Errors(logging.Handler):
    """Collects the errors that DVC logs, with their exceptions."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []
        self.exceptions: list[BaseException] = []
        self.untransferred = False

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.add(record.getMessage(), error)
        self.untransferred |= record.name.startswith(("dvc_data", "dvc_objects"))

    def add(self, message: str, error: BaseException | None) -> None:
        causes = list(_causes(error))
        self.exceptions += causes
        text = click.unstyle(": ".join(filter(None, (message, *map(str, causes)))))
        self.lines.append(" ".join(text.split()))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def main(arguments: list[str], runs: Callable[[Run], Run] = lambda run: run) -> int:
    """Runs a DVC command and prints the JSON line. Returns the exit code.

    Args:
        arguments: DVC's arguments, such as ["repro", "train@linear"].
        runs: wraps DVC's function that runs the command of a stage. By default, the function is not wrapped.
    """
    import dvc.stage.run
    from dvc.cli import parse_args
    from dvc.lock import LockError
    from dvc.repo import Repo

    class StageFailed(dvc.stage.run.StageCmdFailedError):
        def __init__(self, cmd: str, status: int | None = None) -> None:
            super().__init__(cmd, status)
            self.status = status

    ran, changed, errors = list[str](), list[str](), _Errors()
    start, reproduce = runs(dvc.stage.run._run), Repo.reproduce

    def run(*arguments: Any, **options: Any) -> None:
        ran.append(options["env"]["DVC_STAGE"])
        start(*arguments, **options)

    def reproduced(*arguments: Any, **options: Any) -> Any:
        stages = reproduce(*arguments, **options)
        changed.extend(stage.addressing for stage in stages)
        return stages

    atomic_lock.patch()
    dvc.stage.run._run, dvc.stage.run.StageCmdFailedError, Repo.reproduce = run, StageFailed, reproduced
    for name in LOGGERS:
        logging.getLogger(name).handlers[:] = [errors]
    sys.argv[:] = ["dvc", *arguments]  # DVC writes these words into its lock file, to show the owner
    code = 0
    try:
        parsed = parse_args(arguments)
        code = parsed.func(parsed).do_run()
    except Exception as error:  # noqa: BLE001 - reported as data
        errors.add("", error)
        code = 1
    except KeyboardInterrupt:
        errors.add("interrupted", None)
        code = 1
    found = errors.exceptions
    ended = Ended(
        code=int(bool(code)),
        ran=ran,
        changed=changed,
        killed=any(getattr(error, "status", None) in KILLED for error in found),
        busy=any(isinstance(error, LockError) for error in found),
        full=next(filter(None, map(_no_room, found)), ""),
        untransferred=errors.untransferred,
        errors=errors.lines,
    )
    # the output of a stage may end without a line break
    print(f"\n{display.PREFIX}{json.dumps({KEY: asdict(ended)})}", flush=True)
    return ended.code


def _no_room(error: BaseException) -> str:
    """Returns the error's message if it means that the disk is full, otherwise ""."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return error.strerror or str(error)
    full = isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return str(error) if full else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
