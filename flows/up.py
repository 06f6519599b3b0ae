"""`python -m flows.up`: the servers and a worker of Procfile under one supervisor, until Ctrl-C stops them all.

`python -m flows.up mlflow` starts only that one.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import time
from pathlib import Path

import psutil
from honcho.environ import parse_procfile
from honcho.manager import Manager

from flows import children

MARK = "DDPM_UP"  # in the environment of everything that one `make up` started
INTERRUPTED = 130  # Ctrl-C, which is how it is meant to end
GRACE = 20.0  # seconds for flow runs to end their stages


def main(chosen: list[str]) -> None:
    processes = parse_procfile(Path("Procfile").read_text(encoding="utf-8")).processes
    store = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_BACKEND_STORE_URI") or "sqlite:///mlflow.db"
    if store.startswith("http"):
        del processes["mlflow"]  # a server elsewhere has it
    # Not on its command line: there every user of the machine could read a password.
    artifacts = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or str(Path("mlartifacts").resolve())
    mlflow = {
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": artifacts,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
    }
    names = [name for name in processes if name in chosen or not chosen]
    environment = {
        **os.environ,
        "PATH": children.path(),
        "PYTHONUNBUFFERED": "1",
        MARK: secrets.token_hex(8),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_UI": re.sub(r"//[^/@]*@", "//", store),
    }
    if "prefect" in names:
        environment["PREFECT_PORT"] = port = _port("PREFECT_PORT", "4200")
        environment["PREFECT_API_URL"] = environment["PREFECT_UI_API_URL"] = f"http://127.0.0.1:{port}/api"
        print(f"Prefect: http://127.0.0.1:{port}", flush=True)
        if port != "4200":
            print(f"in other shells: export PREFECT_API_URL={environment['PREFECT_API_URL']}", flush=True)
    if "mlflow" in names:
        environment["MLFLOW_PORT"] = port = _port("MLFLOW_PORT", "5000")
        environment["MLFLOW_UI"] = f"http://127.0.0.1:{port}"
    print(f"MLflow:  {environment['MLFLOW_UI']}\nCtrl-C stops what runs here", flush=True)
    manager = Manager()
    for name in names:
        manager.add_process(name, processes[name], env={**environment, **(mlflow if name == "mlflow" else {})})
    manager.loop()
    _end_what_is_left(environment[MARK])
    sys.exit(0 if manager.returncode == INTERRUPTED else manager.returncode)


def _port(variable: str, default: str) -> str:
    port = os.environ.get(variable, default)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
        except (OSError, ValueError, OverflowError) as error:
            sys.exit(f"make up: port {port} can't be used ({error}); free it, or choose another with {variable}=<port>")
    return port


def _end_what_is_left(mark: str) -> None:
    """Flow runs outlive their worker for the moment that their stages take to stop: waits for them, then kills."""
    end = time.monotonic() + GRACE
    while (left := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    for process in left:
        process.kill()


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
