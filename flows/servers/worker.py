"""Waits for the Prefect API, creates pool and deployments, and becomes the worker: `python -m flows.servers.worker`.

`python -m flows.servers.worker hosts` makes this clone a host. It runs stages for other clones (hosts/dispatch.py), one at a
time.
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

# The work pools, with the options of `prefect deploy` that select their deployments.
POOLS = {"local": (), "hosts": ("--prefect-file", "deploy/hosts.yaml")}
TIMEOUT = 300.0  # seconds; a new database takes 10 to 20 s, and minutes on a busy machine


def main(pool: str) -> None:
    """Replaces this process by the Prefect worker of `pool`, a key of POOLS. Exits with a message on failure."""
    try:
        checkout.require_own(Path(), "ddpm", "flows")
    except InputError as error:
        print(f"worker: {error}", file=sys.stderr)
        sys.exit(2)
    api = os.environ["PREFECT_API_URL"]
    end = time.monotonic() + TIMEOUT
    while not access.answers(access.request(f"{api}/health")):
        if time.monotonic() > end:
            sys.exit(
                f"worker: no Prefect API at {api} after {TIMEOUT:.0f} s; start its server, or correct PREFECT_API_URL"
            )
        time.sleep(0.2)
    # If two workers start together, both find no pool, but only one can create it. The other worker then looks again.
    exists = _has_pool(api, pool) or _prefect("work-pool", "create", pool, "--type", "process")
    if not exists and not _has_pool(api, pool):
        sys.exit(f"worker: could not create the work pool {pool}; Prefect's message is above")
    if not _prefect("--no-prompt", "deploy", "--all", *POOLS[pool]):
        sys.exit(f"worker: could not create the deployments of the work pool {pool}; Prefect's message is above")
    from flows.processes import crashed_runs

    crashed_runs.watch_heartbeats()
    if count := crashed_runs.reap():
        print(f"worker: {count} flow runs were killed earlier and are now marked Crashed", flush=True)
    os.environ[watchdog.VARIABLE] = str(os.getpid())  # exec keeps this process id, so flow runs end with this worker
    if pool == "hosts":
        os.environ["DDPM_CHECKOUT"] = str(Path.cwd())
        os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    # Starts the health check only if a port is set, since several workers on one machine would otherwise use the same port.
    options = ["--with-healthcheck"] if "PREFECT_WORKER_WEBSERVER_PORT" in os.environ else []
    # A checkout runs one flow at a time. With this limit, further runs wait at Prefect instead of as processes here.
    options += ["--limit", "1"]
    os.execv(sys.executable, [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, *options])


def _has_pool(api: str, pool: str) -> bool:
    return access.answers(access.request(f"{api}/work_pools/{pool}"))


def _prefect(*arguments: str) -> bool:
    done = subprocess.run([sys.executable, "-m", "prefect", *arguments], check=False, stdin=subprocess.DEVNULL)
    return done.returncode == 0


if __name__ == "__main__":
    main(*sys.argv[1:] or ["local"])
