"""`python -m flows.servers.worker`: waits for the Prefect API, makes the pool and the deployments, and becomes the worker.

`python -m flows.servers.worker hosts` makes this clone a host for the stages of others (hosts/dispatch.py), one at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from ddpm.errors import InputError
from ddpm.provenance import checkout
from ddpm.runtime import watchdog
from flows.servers import access

POOLS = {"local": (), "hosts": ("--prefect-file", "deploy/hosts.yaml")}  # and where their deployments are
TIMEOUT = 300.0  # seconds; a new database takes 10 to 20, and minutes on a busy machine


def main(pool: str) -> None:
    try:
        checkout.require_own(Path(), "ddpm", "flows")
    except InputError as error:
        print(f"worker: {error}", file=sys.stderr)
        sys.exit(2)
    api = os.environ["PREFECT_API_URL"]
    end = time.monotonic() + TIMEOUT
    while not access.answers(access.request(f"{api}/health")):
        if time.monotonic() > end:
            sys.exit(f"worker: no Prefect API at {api} after {TIMEOUT:.0f} s")
        time.sleep(0.2)
    # Two that start together both find no pool, and one of them then makes it.
    there = _has_pool(api, pool) or _prefect("work-pool", "create", pool, "--type", "process")
    if not there and not _has_pool(api, pool):
        sys.exit(f"worker: could not make the work pool {pool}")
    if not _prefect("--no-prompt", "deploy", "--all", *POOLS[pool]):
        sys.exit(f"worker: could not make the deployments of the work pool {pool}")
    from flows.processes import crashed_runs

    crashed_runs.watch_heartbeats()
    if count := crashed_runs.reap():
        print(f"worker: {count} flow runs were killed earlier and are Crashed now", flush=True)
    os.environ[watchdog.VARIABLE] = str(os.getpid())  # exec keeps the id: flow runs end with this worker
    if pool == "hosts":
        os.environ["DDPM_CHECKOUT"] = str(Path.cwd())
        os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    # Only where a port is named: several workers on one machine would ask for the same one.
    options = ["--with-healthcheck"] if "PREFECT_WORKER_WEBSERVER_PORT" in os.environ else []
    # One checkout does one thing at a time: what is due meanwhile waits at Prefect and not as a process here.
    options += ["--limit", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, *options])


def _has_pool(api: str, pool: str) -> bool:
    return access.answers(access.request(f"{api}/work_pools/{pool}"))


def _prefect(*arguments: str) -> bool:
    done = subprocess.run([sys.executable, "-m", "prefect", *arguments], check=False, stdin=subprocess.DEVNULL)
    return done.returncode == 0


if __name__ == "__main__":
    main(*sys.argv[1:] or ["local"])
