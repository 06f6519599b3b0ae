"""Fork server: saves each stage the imports of torch, Inception and MLflow.

On a slow machine, where these imports take 9 s together, the smoke recipe took 60 to 68 s with the fork server, and 95 to 99 s
without it (two pairs of runs). The standard library's fork server does not fit: it would import everything before the first
stage starts, keep its own environment, and pass on no output.

A flow starts one process that only imports modules, `python -m flows.processes.fork_server`, while its Prefect server starts.
A request waits until the modules that it needs are imported. The fork server forks for every `dvc repro`. For a stage whose
command is `python -B -m ddpm ...`, DVC in that fork forks once more instead of starting an interpreter. Apart from its imports,
a fork is like a new process: it has its own arguments, environment, output and exit code, and the same signals end it.

A stage starts an interpreter if the ddpm/ in its folder is not the imported package, or was edited since the import. The fork
server runs on Linux only, since system libraries of other systems do not allow a fork after an import.
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
from flows.processes import dvc_command, dvc_graph

DVC, GRAPH, DDPM = dvc_command.COMMAND, dvc_graph.COMMAND, ("python", "-B", "-m", "ddpm")
FORKED = (DVC, GRAPH, DDPM)  # a command that begins with one of these can be a fork
PLAIN = re.compile(r"[\w./@=-]+( [\w./@=-]+)*")  # matches commands that need no shell

# Modules in the order in which a run needs them. After a colon follows a function to call. The modules after OF_PUBLISHING
# are not imported before a stage has to run.
IMPORTS = (
    "dvc.repo.reproduce",
    "dvc.repo.stage",
    "dvc.data_cloud",
    "dvc.parsing.interpolate",
    "dvc.utils.strictyaml",
    "dvc.rwlock",
    "dvc_data.hashfile.status",
    "dvc_data.hashfile.db.local",
    "scmrepo.git",
    "dulwich.worktree",
    "ruamel.yaml",
    "dvc.cli.parser:get_main_parser",
    "ddpm.cli",
    "ddpm.tracking",
    "ddpm.tracking.place:import_mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "ddpm.provenance.run_record",
    "ddpm.stages.prepare",
    "ddpm.stages.train",
    "ddpm.stages.probe",
    "ddpm.tools.preview",
    "ddpm.stages.sample",
    "ddpm.stages.likelihood",
    "ddpm.stages.evaluate",
    "torch_fidelity.feature_extractor_inceptionv3",
    "ddpm.stages.report",
    "ddpm.reporting.page",
    "matplotlib.backends.backend_agg",
)
OF_DVC = "dvc.cli.parser:get_main_parser"
OF_PUBLISHING = "mlflow.store.model_registry.sqlalchemy_store"
# The last import that a stage or command needs. All other commands need only DVC's imports.
NEEDED = {
    "publish": OF_PUBLISHING,
    "promote": OF_PUBLISHING,
    "prepare": "ddpm.stages.prepare",
    "probe": "ddpm.stages.probe",
    "train": "ddpm.tools.preview",
    "sample": "ddpm.stages.sample",
    "likelihood": "ddpm.stages.likelihood",
    "evaluate": "torch_fidelity.feature_extractor_inceptionv3",
    "report": IMPORTS[-1],
}
TITLE_SPACE = 100 * "."  # an argument that a fork overwrites with its title, so that `ps` and `top` show the title
MAX_REQUEST = 1 << 17  # the largest size in bytes of a request, with its arguments and environment
_LOST = -signal.SIGKILL  # the exit code of a child whose fork server was killed


def can_run(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Returns whether a command runs DVC or ddpm with the interpreter of this environment."""
    if sys.platform != "linux" or not _begins(command, DDPM):
        return sys.platform == "linux" and any(_begins(command, words) for words in FORKED)
    found, own = shutil.which(command[0], path=environment.get("PATH")), Path(sys.executable).with_name(command[0])
    # Compares the folders too, because the `python` of several environments may link to the same interpreter.
    return found is not None and own.exists() and own.samefile(found) and own.parent.samefile(Path(found).parent)


def _begins(command: Sequence[str], words: tuple[str, ...]) -> bool:
    return tuple(command[: len(words)]) == words


def _imports_needed(command: Sequence[str]) -> int:
    """Returns the number n of imports that a command needs: the first n of IMPORTS.

    The number depends on the subcommand, or on the stage that `dvc repro` runs.
    """
    word = command[-1] if "repro" in command else command[len(DDPM)] if len(command) > len(DDPM) else ""
    return _count(NEEDED.get(word.partition("@")[0], OF_DVC))


def _count(last: str) -> int:
    return IMPORTS.index(last) + 1


class Child:
    """A forked process, with the part of subprocess.Popen's interface that is used here. `pid` leads its own process group."""

    def __init__(self, reply: socket.socket, output: int) -> None:
        self._reply = reply.makefile("r", encoding="ascii")
        reply.close()
        self.stdout = open(output, encoding="utf-8", errors="replace")  # noqa: SIM115 - a file descriptor
        line = self._reply.readline()
        # a negative number is an exit code: the fork was killed before it sent its pid
        if not line or line.startswith("-"):
            self.stdout.close()
            raise ConnectionError("the fork server has ended")
        self.pid = int(line)
        self._code: int | None = None

    def poll(self) -> None:
        """Does nothing, because the fork server reaps the process."""

    def wait(self) -> int:
        """Waits until the process has ended. Returns its exit code, or minus the signal that ended it."""
        if self._code is None:
            line = self._reply.readline()
            self._code = int(line) if line else _LOST
        return self._code


class ForkServer:
    """Starts the fork server, which runs until close(), or until this process has ended.

    Args:
        root: the checkout whose code the fork server imports.
        environment: environment variables of the fork server.
    """

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        self._control, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.processes.fork_server", str(server_end.fileno()), TITLE_SPACE],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=root,
                # Other processes read this environment. setproctitle would overwrite it without SPT_NOENV.
                env={**environment, "SPT_NOENV": "1"},
                pass_fds=(server_end.fileno(),),
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def spawn(self, command: Sequence[str], root: Path, environment: Mapping[str, str], standard_input: int) -> Child:
        """Starts a command that can_run() allows.

        Args:
            command: the program and its arguments.
            root: the folder in which the command runs.
            environment: all variables of the command.
            standard_input: a file descriptor, or subprocess.DEVNULL.

        Returns:
            The child. Its `stdout` gives standard output and error.

        Raises:
            OSError: the fork server has ended. With errno E2BIG, arguments and environment are too large for a request.
        """
        request = json.dumps([list(command), str(root), dict(environment)]).encode()
        if len(request) > MAX_REQUEST:
            raise OSError(errno.E2BIG, "arguments and environment", len(request))
        reply, server_end = socket.socketpair()
        output, write = os.pipe()
        devnull = os.open(os.devnull, os.O_RDONLY)
        try:
            source = devnull if standard_input == subprocess.DEVNULL else standard_input
            socket.send_fds(self._control, [request], [source, write, server_end.fileno()])
        except OSError:
            os.close(output)
            reply.close()
            raise
        finally:
            os.close(devnull)
            os.close(write)
            server_end.close()
        return Child(reply, output)

    def close(self) -> None:
        """Kills the fork server. Its forks keep running."""
        self._control.close()
        self._process.kill()
        self._process.wait()


def serve(control: socket.socket) -> None:
    """Imports modules and forks for every request, until the other end of `control` is closed."""
    setproctitle.setproctitle("flows.processes.fork_server: stages are forks of this")
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    done, wanted = 0, _count(OF_PUBLISHING)  # numbers of imports
    replies: dict[int, socket.socket] = {}
    waiting: list[tuple[int, bytes, list[int]]] = []  # number of imports needed, request, files
    while True:
        ready, _, _ = select.select([control, wake], [], [], 0 if done < wanted else None)
        if wake in ready:
            wake.recv(1024)
            _reap(replies)
        if control in ready:
            request, files, _, _ = socket.recv_fds(control, MAX_REQUEST, 3)
            if not request:
                signal.set_wakeup_fd(
                    -1
                )  # else a child that ends while this process exits writes an error to its output
                return
            command = json.loads(request)[0]
            waiting.append((_imports_needed(command), request, files))
            wanted = len(IMPORTS) if "repro" in command else wanted
        if not ready:
            _import(IMPORTS[done])
            done += 1
        for needed, request, files in [item for item in waiting if item[0] <= done]:
            waiting.remove((needed, request, files))
            _fork(request, files, replies)


def _fork(request: bytes, files: list[int], replies: dict[int, socket.socket]) -> None:
    """Forks a process that runs the request. Adds the socket that receives its exit code to `replies`."""
    pid = os.fork()
    if not pid:
        _run_forked(partial(_begin, request, *files))
    replies[pid] = socket.socket(fileno=files[2])
    os.close(files[0])
    os.close(files[1])


def _import(name: str) -> None:
    module, _, function = name.partition(":")
    try:
        imported = importlib.import_module(module)
        if function:
            getattr(imported, function)()
        if module.startswith("ddpm.stages."):
            code.files(module)  # parses the sources once, because the stage hashes them into its cache keys
    except Exception:
        # A stage that needs this module gets the same error and reports it.
        logging.getLogger(__name__).debug("could not import %s ahead", name, exc_info=True)


def _reap(replies: dict[int, socket.socket]) -> None:
    """Sends the exit code of each ended child to the process that waits for it."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        with replies.pop(pid) as reply, contextlib.suppress(BrokenPipeError):  # the waiting process is gone
            reply.send(b"%d\n" % os.waitstatus_to_exitcode(status))


def _begin(request: bytes, standard_input: int, output: int, reply: int) -> None:
    """Turns a new fork into the requested process, and runs its command."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.write(reply, b"%d\n" % os.getpid())  # sent first, since an exit code must not come before the pid
    command, root, environment = json.loads(request)
    for source, target in ((standard_input, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(root)
    _program(command, environment)()


def _program(command: Sequence[str], environment: Mapping[str, str]) -> Callable[[], Any]:
    """Sets up the arguments and environment of a command. Returns the function that runs it in the working folder."""
    is_ddpm, is_graph = _begins(command, DDPM), _begins(command, GRAPH)
    # DVC records the files in this folder as the source. If other files were imported, a new interpreter must run them.
    if is_ddpm and (not checkout.is_own(Path.cwd()) or code.hashes() != code.AT_IMPORT):
        return partial(os.execve, Path(sys.executable).with_name(command[0]), list(command), dict(environment))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ("ddpm" if is_ddpm else "dvc graph" if is_graph else "dvc", *command[len(DDPM) :])
    setproctitle.setproctitle(" ".join(sys.argv))
    if not is_ddpm:
        return dvc_graph.main if is_graph else _dvc
    # imported by name, since flows itself never imports torch
    main: Callable[[], Any] = importlib.import_module("ddpm.__main__").main
    return main


def _dvc() -> NoReturn:
    """Runs the DVC command in sys.argv, with its stages as forks."""
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # tqdm must start no thread, because _forking forks only without other threads
    sys.exit(dvc_command.main(sys.argv[1:], _forking))


def _forking(start: dvc_command.Run) -> dvc_command.Run:
    """Returns a function that runs the command of a stage in a fork if possible, and otherwise by calling `start`."""
    import dvc.stage.run

    def run(executable: str | None, command: str, **options: Any) -> None:
        words = command.split() if PLAIN.fullmatch(command) else [""]
        # A fork copies only the calling thread. A lock that another thread holds would stay locked in the fork for ever.
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


def _run_forked(function: Callable[[], Any]) -> NoReturn:
    """Calls `function` and then exits as an interpreter would, so that a fork never returns to its parent's code."""
    atexit._clear()  # the functions registered so far belong to the parent
    code: Any = 1
    try:
        function()
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 - printed as an interpreter prints it
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
