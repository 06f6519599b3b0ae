"""Runs child processes, each in its own process group, and ends them with the flow."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpm.runtime import ending, watchdog
from ddpm.runtime.display import SAID_LATER
from flows.processes import fork_server

Child = subprocess.Popen[str] | fork_server.Child

_running: set[Child] = set()
_server: list[fork_server.ForkServer] = []  # the fork server, once there is one
_lock, _starting = threading.Lock(), threading.Lock()  # for _running, and for _server
_stopped = threading.Event()


class FlowStopped(Exception):
    """The flow is ending: its child processes were stopped, and no new one may start."""


def start() -> None:
    """Allows child processes to start, also after an earlier stop(). A flow calls this function at its start."""
    _stopped.clear()


def import_ahead(root: Path) -> None:
    """Starts the fork server early, so that it imports modules while the caller waits for a Prefect server."""
    if sys.platform == "linux":
        _fork_server(root)


def stopping() -> bool:
    """Returns whether the flow is ending, in which case no child process may start."""
    return _stopped.is_set()


def run(
    command: Sequence[str], root: Path, on_line: Callable[[str], None], standard_input: int = subprocess.DEVNULL
) -> int:
    """Runs a command and returns its exit code.

    Returns once every process that holds the output pipe has exited. If the command is DVC and DVC is killed, this function
    still waits for the stage that DVC started.

    Args:
        command: the program and its arguments.
        root: the folder in which the command runs.
        on_line: called with each line of standard output and error as it arrives.
        standard_input: a file descriptor, which the caller closes. By default, standard input is empty.

    Raises:
        FlowStopped: stop() was called before the command started, or it was called later and the command failed.
    """
    child = _spawn(command, root, standard_input)
    with _lock:
        _running.add(child)
        stopped = _stopped.is_set()
    try:
        if stopped:  # stop() was called while the child started
            raise FlowStopped
        assert child.stdout is not None
        for line in child.stdout:
            on_line(line.rstrip())
        code = child.wait()
    except BaseException:  # an error in on_line must end the child
        ending.end_groups([child], ending.STAGE)
        raise
    finally:
        with _lock:
            _running.discard(child)
    if _stopped.is_set() and code != 0:
        raise FlowStopped
    return code


def _spawn(command: Sequence[str], root: Path, standard_input: int) -> Child:
    if _stopped.is_set():
        raise FlowStopped
    environment = _environment()
    if fork_server.can_run(command, environment):
        server = _fork_server(root)
        try:
            return server.spawn(command, root, environment, standard_input)
        except OSError as error:
            if error.errno != errno.E2BIG:  # the fork server has just been killed, so the next command starts a new one
                _close(server)
        if _stopped.is_set():
            raise FlowStopped
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
    """Ends the process groups of all children with SIGTERM, and with SIGKILL after the grace time. Also ends the fork server."""
    with _lock:
        _stopped.set()
        children = list(_running)
    ending.end_groups(children, ending.STAGE)
    for server in list(_server):
        _close(server)


def _fork_server(root: Path) -> fork_server.ForkServer:
    """Returns the fork server. Starts one if there is none."""
    with _starting:
        if not _server or not _server[0].alive():
            _server[:] = [fork_server.ForkServer(root, _environment())]
        return _server[0]


def _close(server: fork_server.ForkServer) -> None:
    with _starting:
        server.close()
        if server in _server:
            _server.remove(server)


def _environment() -> dict[str, str]:
    """Returns the environment of a child, with settings that make it end with this process and print progress lines."""
    return {
        **os.environ,
        "PATH": path(),
        "DDPM_FOLLOWED": "1",
        SAID_LATER: "1",
        "PYTHONUNBUFFERED": "1",
        "DDPM_PROGRESS": "lines",
        watchdog.VARIABLE: str(os.getpid()),
    }


def path() -> str:
    """Returns PATH, with this interpreter's folder first unless PATH contains it. So users need not activate the environment."""
    own, given = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return given if own in given.split(os.pathsep) else os.pathsep.join((own, given))


def end_with_the_worker() -> None:
    """Makes this process end together with the Prefect worker that started it. Does nothing without a worker."""
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        os.environ.setdefault(watchdog.VARIABLE, str(os.getppid()))
        watchdog.start()
