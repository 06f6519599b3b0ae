"""Runs one DVC command in this process and reports how it ended as data: `python -m flows.processes.dvc_command repro ...`.

DVC's own command line tells this in text alone. Here a stage's output goes through unchanged, and DVC's text is replaced by one
JSON line at the end.
"""

from __future__ import annotations

import errno
import json
import logging
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ddpm.provenance import atomic_lock
from ddpm.runtime import display

COMMAND = (sys.executable, "-B", "-m", "flows.processes.dvc_command")  # how the command begins
KEY = "dvc"  # of the JSON line
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # as an exit code: of a process, and of a shell for its child
LOGGERS = ("dvc", "dvc_data", "dvc_objects")
Run = Callable[..., None]  # (executable, command, **options of subprocess.Popen)


@dataclass(frozen=True)
class Ended:
    """How a DVC command ended.

    Args:
        code: 0, or 1 where it failed.
        ran: the stages whose commands were started.
        changed: the stages that `dvc repro` ran or took from the cache.
        killed: whether a stage was ended by SIGKILL.
        busy: whether another DVC holds the repository or an output.
        full: why nothing could be written, such as "No space left on device"; or "".
        untransferred: whether a file did not get into the cache or out of it. DVC may still exit with 0.
        errors: what DVC says went wrong, a line for each error.
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
        """Returns what a JSON line says, or None for another line."""
        return cls(**report[KEY]) if isinstance(report.get(KEY), dict) else None


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
        self.lines.append(" ".join(": ".join(filter(None, (message, *map(str, causes)))).split()))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def main(arguments: list[str], runs: Callable[[Run], Run] = lambda run: run) -> int:
    """Runs a DVC command and prints the JSON line. Returns the exit code.

    Args:
        arguments: of the command line, such as ["repro", "train@linear"].
        runs: makes the function that starts the command of a stage out of DVC's own function.
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

    atomic_lock.write_at_once()
    dvc.stage.run._run, dvc.stage.run.StageCmdFailedError, Repo.reproduce = run, StageFailed, reproduced
    for name in LOGGERS:
        logging.getLogger(name).handlers[:] = [errors]
    sys.argv[:] = ["dvc", *arguments]  # the name under which DVC holds files
    code = 0
    try:
        parsed = parse_args(arguments)
        code = parsed.func(parsed).do_run()
    except Exception as error:  # noqa: BLE001 - reported as data
        errors.add("", error)
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
    print(display.PREFIX + json.dumps({KEY: asdict(ended)}), flush=True)
    return ended.code


def _no_room(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return error.strerror or str(error)
    full = isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return str(error) if full else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
