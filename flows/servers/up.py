"""Runs the servers and the worker of Procfile under one supervisor until Ctrl-C: `python -m flows.servers.up`.

`python -m flows.servers.up mlflow` starts MLflow alone. HOST=<address> opens the servers to other machines (access.py).
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.request import Request

import psutil
from honcho.environ import parse_procfile
from honcho.manager import Manager
from honcho.printer import Message, Printer

from ddpm.databases import mlflow_file, sqlite
from ddpm.databases.addresses import with_driver
from ddpm.errors import InputError, without_password
from ddpm.provenance import checkout
from ddpm.runtime import ending, locks
from flows import links
from flows.processes import children
from flows.servers import access, embedded

MARK = "DDPM_UP"  # a variable in the environment of every process that one `make up` started
INTERRUPTED = 130  # the exit code after Ctrl-C, which is the normal end
DEFAULT_API = f"http://{access.LOOPBACK}:4200/api"  # the same address as in prefect.toml
_STARTED = "started!"  # the end of the line that `prefect worker start` prints once it polls for runs


def main(chosen: list[str]) -> None:
    """Runs the processes `chosen` of Procfile, or all of them if the list is empty. Exits when they have ended."""
    try:
        checkout.require_own(Path(), "ddpm", "flows")
        processes = _processes()
    except InputError as error:
        print(f"make up: {error}", file=sys.stderr)
        sys.exit(2)
    if unknown := set(chosen) - set(processes):
        sys.exit(f"make up: Procfile has no {', '.join(sorted(unknown))}; it has {', '.join(processes)}")
    named = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_BACKEND_STORE_URI")
    store = with_driver(named or "sqlite:///mlflow.db")
    if store.startswith("http"):
        del processes["mlflow"]  # MLflow's server runs elsewhere
    # Uses variables, because all users of this machine can read command lines, and the values may contain a password.
    artifacts = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or Path("mlartifacts").resolve().as_uri()
    mlflow = {
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts,
        "MLFLOW_ARTIFACTS_DESTINATION": os.environ.get("MLFLOW_ARTIFACTS_DESTINATION") or artifacts,
    }
    os.environ.update(access.direct(os.environ))
    names = [name for name in processes if name in chosen or not chosen]
    host = os.environ.get("HOST") or access.LOOPBACK
    with tempfile.TemporaryDirectory(prefix="ddpm-up-") as folder:
        try:
            if "mlflow" in names:
                _check_records(store)
            environment = _environment(names, host, store, Path(folder))
        except InputError as error:
            sys.exit(f"make up: {error}")
        print("Ctrl-C stops everything that was started here", flush=True)
        lines = _Lines()
        manager = Manager(lines)
        for name in names:
            manager.add_process(name, processes[name], env={**environment, **(mlflow if name == "mlflow" else {})})
        # Stops when the terminal is closed, unless `nohup` makes this process ignore that signal.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        threading.Thread(target=_say_when_ready, args=(names, environment, lines.worker), daemon=True).start()
        try:
            manager.loop()
        finally:
            with suppress(Exception):  # an error of the loop itself is more important
                manager.terminate()
            _end_what_is_left(environment[MARK])
    sys.exit(0 if manager.returncode == INTERRUPTED else manager.returncode)


def _processes() -> dict[str, str]:
    """Returns the commands in Procfile by their names. Raises InputError."""
    if not (path := Path("Procfile")).exists():
        raise InputError(f"{path}: no such file; run this in a checkout, or in a project that `ddpm init` made")
    return dict(parse_procfile(path.read_text(encoding="utf-8")).processes)


def _check_records(store: str) -> None:
    """Checks the database file for damage and lost records before MLflow's server opens the file. Raises InputError."""
    if file := sqlite.file_of(store):
        with locks.held(mlflow_file.lock_of(file)):
            mlflow_file.check(file)


class _Lines(Printer):
    """Prints the output of the processes. Stops `make up` once the reader of this output is gone.

    Attributes:
        worker: an event that is set once Prefect's worker polls its pool.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lost, self.worker = False, threading.Event()

    def write(self, message: Message) -> None:
        if message.name == "worker" and _STARTED in str(message.data):
            self.worker.set()
        try:
            super().write(message)
        except OSError:
            if not self.lost:
                self.lost = True
                os.kill(os.getpid(), signal.SIGTERM)


def _say_when_ready(names: list[str], environment: Mapping[str, str], worker: threading.Event) -> None:
    """Prints one line once every server answers and the worker waits for runs."""
    if "worker" in names:
        worker.wait()  # the worker starts after Prefect has answered and the deployment exists
    health: list[str | Request] = []
    if "prefect" in names:
        health.append(access.request(f"{environment['PREFECT_API_URL']}/health"))
    if "mlflow" in names:
        health.append(f"{environment['MLFLOW_UI']}/health")
    for address in health:
        while not access.answers(address):
            time.sleep(0.2)
    with suppress(OSError):  # _Lines notices that the reader is gone
        print(f"ready{_how_to_run(environment) if 'worker' in names else ''}", flush=True)


def _how_to_run(environment: Mapping[str, str]) -> str:
    """Returns the command that starts a run in another shell, after the commands that prepare that shell."""
    api, activate = environment["PREFECT_API_URL"], Path(".venv/bin/activate")
    before = [f". {activate}"] if activate.exists() else []
    before += [f"export PREFECT_API_URL={api}"] if api != DEFAULT_API else []
    return f"; in another shell: {' && '.join([*before, 'prefect deployment run train-eval/default --watch'])}"


def _environment(names: list[str], host: str, store: str, folder: Path) -> dict[str, str]:
    """Returns the environment of all processes, and prints the addresses of the servers. Raises InputError.

    Args:
        names: the processes to start.
        host: the address at which the servers listen.
        store: the address of MLflow's database.
        folder: a private folder for MLflow's accounts.
    """
    environment = {
        **os.environ,
        "PATH": children.path(),
        "PYTHONUNBUFFERED": "1",
        MARK: secrets.token_hex(8),
        "HOST": host,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_UI": without_password(store),
    }
    here = access.LOOPBACK if host in ("0.0.0.0", "::") else access.in_url(host)
    environment["PREFECT_PORT"] = _port("PREFECT_PORT", "4200", host if "prefect" in names else None)
    environment["MLFLOW_PORT"] = _port("MLFLOW_PORT", "5000", host if "mlflow" in names else None)
    environment |= access.guard(host, environment["PREFECT_PORT"], names, environment, folder)
    if "prefect" in names:
        # The path is absolute, so that `python -m flows` recognises the server of its checkout.
        home = Path(environment.get("PREFECT_HOME") or embedded.HOME).resolve()
        environment["PREFECT_HOME"] = str(home)
        environment |= embedded.database(home)
        address = f"http://{here}:{environment['PREFECT_PORT']}"
        environment["PREFECT_API_URL"] = f"{address}/api"
        # With "/api", Prefect's page calls the address from which it was loaded. On other machines, a loopback address would
        # mean the browser's own machine.
        environment["PREFECT_UI_API_URL"] = f"{address}/api" if access.is_loopback(host) else "/api"
        print(f"Prefect: {address}", flush=True)
    elif "worker" in names:
        environment.setdefault("PREFECT_API_URL", f"http://{access.LOOPBACK}:{environment['PREFECT_PORT']}/api")
    if "mlflow" in names:
        environment["MLFLOW_UI"] = f"http://{here}:{environment['MLFLOW_PORT']}"
    print(f"MLflow:  {links.mlflow(Path(), environment['MLFLOW_UI'], store)}", flush=True)
    return environment


def _port(variable: str, default: str, host: str | None) -> str:
    """Returns the port in the environment variable `variable`, or else `default`.

    Raises InputError if a server cannot listen at this port of `host`. host None skips this check.
    """
    port = os.environ.get(variable, default)
    if host is None:
        return port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except (OSError, ValueError, OverflowError) as error:
            number = getattr(error, "errno", None)
            left = _left() if number == errno.EADDRINUSE else ""
            advice = f"; `kill {left}` ends the servers that a killed `make up` left running" if left else ""
            if number == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
                remedy = "set HOST to an address of this machine"
            else:
                remedy = f"choose another port with {variable}=<port>{advice}"
            raise InputError(f"port {port} of {host} can't be used ({error}); {remedy}") from error
    return port


def _left() -> str:
    """Returns the ids of the processes in this folder that outlived their `make up`.

    A process has outlived its `make up` if fewer than two of its ancestors run this module. While `make up` lives, these two
    are the supervisor and its fork by honcho.
    """
    mine = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    found = []
    for process in _marked():
        with suppress(psutil.Error):
            above = sum("flows.servers.up" in each.cmdline() for each in process.parents())
            if above < 2 and process.pid not in mine:
                found.append(str(process.pid))
    return " ".join(found)


def _end_what_is_left(mark: str) -> None:
    """Waits at most FLOW_RUNS seconds for the end of all processes whose variable MARK has this value, then kills the rest.

    A flow run outlives its worker, because it ends only once its stages have stopped.
    """
    for process in ending.left_after(ending.FLOW_RUNS, lambda: _marked(mark)):
        process.kill()


def _marked(mark: str | None = None) -> list[psutil.Process]:
    """Returns the living processes of the `make up` that set the variable MARK to this value.

    Without a mark, returns the processes of every `make up` in this folder.
    """
    found = []
    for process in psutil.process_iter():
        try:
            marks = process.environ().get(MARK)
            mine = marks == mark if mark else marks is not None and Path(process.cwd()) == Path.cwd()
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
