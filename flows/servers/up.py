"""`python -m flows.servers.up`: the servers and a worker of Procfile under one supervisor, until Ctrl-C stops them all.

`python -m flows.servers.up mlflow` starts only that one. HOST=<address> lets other machines in, with passwords: see access.py.
"""

from __future__ import annotations

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

MARK = "DDPM_UP"  # in the environment of everything that one `make up` started
INTERRUPTED = 130  # Ctrl-C, which is how it is meant to end
DEFAULT_API = f"http://{access.LOOPBACK}:4200/api"  # as prefect.toml has it
_STARTED = "started!"  # how `prefect worker start` ends the line that says so


def main(chosen: list[str]) -> None:
    try:
        checkout.require_own(Path(), "ddpm", "flows")
    except InputError as error:
        print(f"make up: {error}", file=sys.stderr)
        sys.exit(2)
    processes = parse_procfile(Path("Procfile").read_text(encoding="utf-8")).processes
    if unknown := set(chosen) - set(processes):
        sys.exit(f"make up: no {', '.join(sorted(unknown))} in Procfile; it has {', '.join(processes)}")
    named = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_BACKEND_STORE_URI")
    store = with_driver(named or "sqlite:///mlflow.db")
    if store.startswith("http"):
        del processes["mlflow"]  # a server elsewhere has it
    # Not on its command line: there every user of the machine could read a password.
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
        print("Ctrl-C stops what runs here", flush=True)
        lines = _Lines()
        manager = Manager(lines)
        for name in names:
            manager.add_process(name, processes[name], env={**environment, **(mlflow if name == "mlflow" else {})})
        # A terminal that is closed; not where `nohup` has it ignored.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        threading.Thread(target=_say_when_ready, args=(names, environment, lines.worker), daemon=True).start()
        try:
            manager.loop()
        finally:
            with suppress(Exception):  # the one that left the loop is shown
                manager.terminate()
            _end_what_is_left(environment[MARK])
    sys.exit(0 if manager.returncode == INTERRUPTED else manager.returncode)


def _check_records(store: str) -> None:
    """Does for MLflow's server what every other process does before it opens a database file. Raises InputError."""
    if file := sqlite.file_of(store):
        with locks.held(mlflow_file.lock_of(file)):
            mlflow_file.check(file)


class _Lines(Printer):
    """Prints the lines of the processes. Ends `make up` as Ctrl-C does once nobody reads them.

    worker: is set when Prefect's worker says that it polls its pool.
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
        worker.wait()  # it starts after Prefect has answered and the deployment is made
    health: list[str | Request] = []
    if "prefect" in names:
        health.append(access.request(f"{environment['PREFECT_API_URL']}/health"))
    if "mlflow" in names:
        health.append(f"{environment['MLFLOW_UI']}/health")
    for address in health:
        while not access.answers(address):
            time.sleep(0.2)
    with suppress(OSError):  # _Lines notices that nobody reads
        print(f"ready{_how_to_run(environment) if 'worker' in names else ''}", flush=True)


def _how_to_run(environment: Mapping[str, str]) -> str:
    """Returns the command that starts a run, with what another shell has to set before."""
    api, activate = environment["PREFECT_API_URL"], Path(".venv/bin/activate")
    before = [f". {activate}"] if activate.exists() else []
    before += [f"export PREFECT_API_URL={api}"] if api != DEFAULT_API else []
    return f"; in another shell: {' && '.join([*before, 'prefect deployment run train-eval/default --watch'])}"


def _environment(names: list[str], host: str, store: str, folder: Path) -> dict[str, str]:
    """Of all that starts, and says where to find it. Raises InputError; folder: a private one, for MLflow's accounts."""
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
        environment |= embedded.database(Path(environment.get("PREFECT_HOME") or embedded.HOME))
        address = f"http://{here}:{environment['PREFECT_PORT']}"
        environment["PREFECT_API_URL"] = f"{address}/api"
        # The page asks the address that it came from: a browser elsewhere doesn't reach this machine's loopback.
        environment["PREFECT_UI_API_URL"] = f"{address}/api" if access.is_loopback(host) else "/api"
        print(f"Prefect: {address}", flush=True)
    elif "worker" in names:
        environment.setdefault("PREFECT_API_URL", f"http://{access.LOOPBACK}:{environment['PREFECT_PORT']}/api")
    if "mlflow" in names:
        environment["MLFLOW_UI"] = f"http://{here}:{environment['MLFLOW_PORT']}"
    print(f"MLflow:  {links.mlflow(Path(), environment['MLFLOW_UI'])}", flush=True)
    return environment


def _port(variable: str, default: str, host: str | None) -> str:
    """Raises InputError when nothing can listen there; host None: nothing will."""
    port = os.environ.get(variable, default)
    if host is None:
        return port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except (OSError, ValueError, OverflowError) as error:
            left = " ".join(str(process.pid) for process in _marked())
            advice = f"; `kill {left}` ends what an earlier `make up` left" if left else ""
            raise InputError(
                f"port {port} of {host} can't be used ({error}); free it, or choose another with"
                f" {variable}=<port>{advice}"
            ) from error
    return port


def _end_what_is_left(mark: str) -> None:
    """Flow runs outlive their worker for the moment that their stages take to stop: waits for them, then kills."""
    for process in ending.left_after(ending.FLOW_RUNS, lambda: _marked(mark)):
        process.kill()


def _marked(mark: str | None = None) -> list[psutil.Process]:
    """Returns the living processes that a `make up` started: the one with this mark, or any in this folder."""
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
