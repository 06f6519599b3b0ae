"""Child processes, each in a process group of its own, that end with the flow."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpm.runtime import ending, watchdog
from flows.processes import fork_server

Child = subprocess.Popen[str] | fork_server.Child

_running: set[Child] = set()
_warm: list[fork_server.Warm] = []  # the one there is, if any
_lock = threading.Lock()
_stopped = threading.Event()


class FlowStopped(Exception):
    """The flow is ending: nothing starts any more, and what ran was stopped."""


def start() -> None:
    """Lets children run (again): called once when a flow begins."""
    _stopped.clear()


def stopping() -> bool:
    """Whether nothing starts any more."""
    return _stopped.is_set()


def run(
    command: Sequence[str], root: Path, on_line: Callable[[str], None], standard_input: int = subprocess.DEVNULL
) -> int:
    """Runs a command in `root`, gives each line of its output to `on_line` as it comes, and returns its exit code.

    standard_input: a file descriptor, which the caller closes; by default there is nothing to read.
    Its end is the end of everything that holds its output: a stage whose DVC was killed is waited for.
    Raises FlowStopped when stop() was called before or meanwhile.
    """
    with _lock:
        if _stopped.is_set():
            raise FlowStopped
        child = _spawn(command, root, standard_input)
        _running.add(child)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            on_line(line.rstrip())
        code = child.wait()
    except BaseException:  # on_line's, and nobody else would end the child
        ending.end_groups([child], ending.STAGE)
        raise
    finally:
        with _lock:
            _running.discard(child)
    if _stopped.is_set() and code != 0:
        raise FlowStopped
    return code


def _spawn(command: Sequence[str], root: Path, standard_input: int) -> Child:
    environment = _environment()
    if fork_server.can_run(command, environment):
        if not _warm or not _warm[0].alive():
            _warm[:] = [fork_server.Warm(root, environment)]
        try:
            return _warm[0].spawn(command, root, environment, standard_input)
        except OSError as error:
            if error.errno != errno.E2BIG:  # it was killed just now: the next one makes another
                _warm.pop().close()
    return subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdin=standard_input,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def stop() -> None:
    """Ends every child and all that it started: SIGTERM, then SIGKILL for what is left after the grace time."""
    with _lock:
        _stopped.set()
        children = list(_running)
    ending.end_groups(children, ending.STAGE)
    while _warm:
        _warm.pop().close()


def _environment() -> dict[str, str]:
    """As `dvc repro` in the same shell would have it, plus what ties the child to this process and shows its progress."""
    return {
        **os.environ,
        "PATH": path(),
        "DDPM_FOLLOWED": "1",
        "PYTHONUNBUFFERED": "1",
        "DDPM_PROGRESS": "lines",
        watchdog.VARIABLE: str(os.getpid()),
    }


def path() -> str:
    """PATH, with this interpreter's own programs first if it lacks them: the environment need not be activated."""
    own, given = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return given if own in given.split(os.pathsep) else os.pathsep.join((own, given))


def end_with_the_worker() -> None:
    """A flow run that a worker started ends with it."""
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        os.environ.setdefault(watchdog.VARIABLE, str(os.getppid()))
        watchdog.start()
