"""Forks the stages of a flow from one process that has imported what they need.

torch, Inception and MLflow take two to seven seconds to import, which is most of what a small stage lasts. So a flow starts one
process that only imports, `python -m flows.processes.fork_server`. It forks for every `dvc repro`, and that DVC forks once more
where a stage's command is `python -B -m ddpm ...`, instead of starting an interpreter. Everything else is as with a new process:
a session of its own, the environment and the arguments, the output, the exit code, the signals that end it. A stage in a folder
whose ddpm/ is not the imported one starts an interpreter.

Linux alone: elsewhere system libraries do not allow a fork after an import.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import setproctitle

from ddpm.provenance import checkout, code
from flows.processes import dvc_command

DVC, DDPM = dvc_command.COMMAND, ("python", "-B", "-m", "ddpm")  # how the commands begin that can be forks
PLAIN = re.compile(r"[\w./@=-]+( [\w./@=-]+)*")  # a command that needs no shell

# In the order in which a run needs them, some with a function to call. A request that comes meanwhile waits for the import
# at hand, not for those after it.
IMPORTS = (
    "dvc.commands.repro",
    "dvc.repo.reproduce",
    "dvc.data_cloud",
    "scmrepo.git",
    "ddpm.cli",
    "ddpm.provenance.run_record",
    "ddpm.stages.prepare",
    "ddpm.stages.train",
    "ddpm.tools.preview",
    "ddpm.tracking.place:import_mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "ddpm.stages.sample",
    "ddpm.stages.likelihood",
    "ddpm.stages.evaluate",
    "torch_fidelity.feature_extractor_inceptionv3",
    "ddpm.stages.report",
    "ddpm.reporting.page",
    "matplotlib.backends.backend_agg",
)
ROOM = 100 * "."  # an argument where a fork writes what it does, for `ps` and `top`
LARGEST = 1 << 17  # bytes of a request: arguments and environment
_LOST = -signal.SIGKILL  # the exit code of a child whose warm process was killed


def can_run(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a command is this environment's DVC, or ddpm with a PATH that leads to this environment."""
    if sys.platform != "linux" or not _begins(command, DDPM):
        return sys.platform == "linux" and _begins(command, DVC)
    found, own = shutil.which(command[0], path=environment.get("PATH")), Path(sys.executable).with_name(command[0])
    # Folders too: environments share an interpreter, to which their links lead.
    return found is not None and own.exists() and own.samefile(found) and own.parent.samefile(Path(found).parent)


def _begins(command: Sequence[str], words: tuple[str, ...]) -> bool:
    return tuple(command[: len(words)]) == words


class Child:
    """A forked program, with what is used of a subprocess.Popen. `pid` leads a process group of its own."""

    def __init__(self, reply: socket.socket, output: int) -> None:
        self._reply = reply.makefile("r", encoding="ascii")
        reply.close()
        self.stdout = open(output, encoding="utf-8", errors="replace")  # noqa: SIM115 - a file descriptor
        line = self._reply.readline()
        if not line or line.startswith("-"):  # an exit code: the fork was killed before it could say which it is
            self.stdout.close()
            raise ConnectionError("the process that stages are forked from has ended")
        self.pid = int(line)
        self._code: int | None = None

    def poll(self) -> None:
        """Nothing to reap: its parent does."""

    def wait(self) -> int:
        """The exit code, or minus the signal that ended it."""
        if self._code is None:
            line = self._reply.readline()
            self._code = int(line) if line else _LOST
        return self._code


class Warm:
    """The process, from here on until close(), or the end of the one that made it."""

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.processes.fork_server", str(theirs.fileno()), ROOM],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=root,  # whose code it imports
                env={**environment, "SPT_NOENV": "1"},  # setproctitle leaves alone what others read of the environment
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def spawn(self, command: Sequence[str], root: Path, environment: Mapping[str, str], standard_input: int) -> Child:
        """Starts a command that can_run() allows; its standard output and error are the child's `stdout`.

        Raises OSError, and has started none; also where arguments and environment are too large for a message.
        """
        request = json.dumps([list(command), str(root), dict(environment)]).encode()
        if len(request) > LARGEST:
            raise OSError(errno.E2BIG, "arguments and environment", len(request))
        reply, theirs = socket.socketpair()
        output, write = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            given = nothing if standard_input == subprocess.DEVNULL else standard_input
            socket.send_fds(self._control, [request], [given, write, theirs.fileno()])
        except OSError:
            os.close(output)
            reply.close()
            raise
        finally:
            os.close(nothing)
            os.close(write)
            theirs.close()
        return Child(reply, output)

    def close(self) -> None:
        """Ends the process at once; what was forked of it goes on."""
        self._control.close()
        self._process.kill()
        self._process.wait()


def serve(control: socket.socket) -> None:
    """Imports, and forks for every request, until the other end of `control` is closed."""
    setproctitle.setproctitle("flows.processes.fork_server: stages are forks of this")
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    imports = list(IMPORTS)
    replies: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, wake], [], [], 0 if imports else None)
        if wake in ready:
            wake.recv(1024)
            _reap(replies)
        if control in ready:
            request, files, _, _ = socket.recv_fds(control, LARGEST, 3)
            if not request:
                return
            pid = os.fork()
            if not pid:
                _run_forked(partial(_begin, request, *files))
            replies[pid] = socket.socket(fileno=files[2])
            os.close(files[0])
            os.close(files[1])
        if not ready:
            _import(imports.pop(0))


def _import(name: str) -> None:
    module, _, function = name.partition(":")
    try:
        imported = importlib.import_module(module)
        if function:
            getattr(imported, function)()
    except Exception:
        # The stage that needs it meets the same error, and says so where it is seen.
        logging.getLogger(__name__).debug("no %s to import ahead", name, exc_info=True)


def _reap(replies: dict[int, socket.socket]) -> None:
    """Tells the exit codes of the children that have ended to those who wait for them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        with replies.pop(pid) as reply, contextlib.suppress(BrokenPipeError):  # nobody waits any more
            reply.send(b"%d\n" % os.waitstatus_to_exitcode(status))


def _begin(request: bytes, standard_input: int, output: int, reply: int) -> None:
    """In the new process: becomes what was asked for."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.write(reply, b"%d\n" % os.getpid())  # before anything may fail: the exit code comes after it
    command, root, environment = json.loads(request)
    for source, target in ((standard_input, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(root)
    _program(command, environment)()


def _program(command: Sequence[str], environment: Mapping[str, str]) -> Callable[[], Any]:
    """What the command calls in the working directory, with its arguments and environment in place."""
    ddpm = _begins(command, DDPM)
    # DVC would record edited files, not those that were imported here.
    if ddpm and (not checkout.is_own(Path.cwd()) or code.hashes() != code.AT_IMPORT):
        return partial(os.execve, Path(sys.executable).with_name(command[0]), list(command), dict(environment))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ("ddpm" if ddpm else "dvc", *command[len(DDPM) :])
    setproctitle.setproctitle(" ".join(sys.argv))
    if not ddpm:
        return _dvc
    main: Callable[[], Any] = importlib.import_module("ddpm.__main__").main  # by name: flows itself never imports torch
    return main


def _dvc() -> NoReturn:
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # no thread of its own: see _forking
    sys.exit(dvc_command.main(sys.argv[1:], _forking))


def _forking(start: dvc_command.Run) -> dvc_command.Run:
    """Returns the function that starts the command of a stage: by a fork where that is possible, or else by `start`."""
    import dvc.stage.run

    def run(executable: str | None, command: str, **options: Any) -> None:
        words = command.split() if PLAIN.fullmatch(command) else [""]
        # A fork has one thread; a lock that another held would be held in it for ever.
        if not can_run(words, options["env"]) or threading.active_count() > 1:
            return start(executable, command, **options)
        pid = os.fork()
        if not pid:
            os.chdir(options["cwd"])
            _run_forked(_program(words, options["env"]))
        _, status = os.waitpid(pid, 0)
        if status:
            raise dvc.stage.run.StageCmdFailedError(command, os.waitstatus_to_exitcode(status))
        return None

    return run


def _run_forked(work: Callable[[], Any]) -> NoReturn:
    """Calls `work` and ends the process as an interpreter would, without going back to what its parent was doing."""
    atexit._clear()  # the parent's business
    code: Any = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 - shown as an interpreter shows it
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
