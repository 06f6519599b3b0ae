"""Runs a Prefect server for one `python -m flows`, so that users need not start a server first.

If a server of this checkout already runs, such as that of `make up`, the flow uses that server and saves several seconds.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from ddpm.databases import sqlite
from ddpm.errors import InputError
from ddpm.runtime import ending, watchdog
from flows.servers import access

# If one of these variables is set, the user has chosen another database.
DATABASE = ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL")
HOME = Path(".prefect")  # the folder of Prefect's database and logs, which prefect.toml names too
TIMEOUT = 120.0  # seconds
RESTARTS = 5  # the most restarts of a killed server in one run
SETTLE_SECONDS = 2.0  # seconds at the end of a run in which the server may still receive and write task states
CHECK_SECONDS = 2.0  # seconds between two checks whether the server of `make up` still runs
ANSWER_SECONDS = 10.0  # seconds that a busy server may take to name its folder
# A database without runs, created by `make`, because Prefect needs ten seconds to create its tables.
EMPTY = Path(sys.prefix) / "share" / "prefect" / "prefect.db"
# Prefect's services for schedules, workers and automations, which a single run does not use.
IDLE_SERVICES = (
    "FOREMAN",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "REPOSSESSOR",
    "SCHEDULER",
    "TRIGGERS",
    "CANCELLATION_CLEANUP",
)


def create_database(home: Path) -> None:
    """Copies a database with all tables and no runs into Prefect's folder, unless the folder already has a database.

    `make` creates the copied file (EMPTY). Without it, the server creates the tables itself, which takes longer.
    """
    home.mkdir(parents=True, exist_ok=True)
    if not EMPTY.exists() or any(name in os.environ for name in DATABASE):
        return
    copy = home / f"prefect.db.{os.getpid()}"
    shutil.copyfile(EMPTY, copy)
    try:
        os.link(copy, home / "prefect.db")
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not (home / "prefect.db").exists():
            copy.replace(home / "prefect.db")
    finally:
        copy.unlink(missing_ok=True)


def database(home: Path) -> dict[str, str]:
    """Returns an environment variable that names the database, or {} if Prefect finds the database without it.

    Prefect would misread a path that contains %, ? or #.
    """
    file = home.resolve() / "prefect.db"
    if not set("%?#") & set(str(file)) or any(name in os.environ for name in DATABASE):
        return {}
    return {"PREFECT_SERVER_DATABASE_CONNECTION_URL": sqlite.address_of(file, driver="aiosqlite")}


def running(home: Path) -> str | None:
    """Returns the API address of a Prefect server on this machine that keeps its runs in `home`, or None.

    Asks the server that PREFECT_API_URL names, and then the server that prefect.toml names.
    """
    for address in _addresses():
        if access.is_loopback(urlsplit(address).hostname or ""):
            with (
                suppress(OSError, ValueError, KeyError, TypeError),
                urlopen(access.request(f"{address}/admin/settings"), timeout=ANSWER_SECONDS) as found,
            ):
                if json.load(found)["home"] == str(home.resolve()):
                    return address
    return None


def _addresses() -> Iterator[str]:
    if address := os.environ.get("PREFECT_API_URL"):
        yield address
    with suppress(OSError, KeyError, tomllib.TOMLDecodeError):
        yield tomllib.loads(Path("prefect.toml").read_text(encoding="utf-8"))["api"]["url"]


class Api:
    """The Prefect server of this flow, which is a running server or a new process. It answers after wait().

    Create this object before `prefect` is imported, since it sets PREFECT_API_URL. A server that was started here stops when
    the interpreter exits, and also if this process is killed.

    Attributes:
        address: the address of the API.
        server: the process; None for a server that was running already.
    """

    def __init__(self, root: Path) -> None:
        home = Path(os.environ.setdefault("PREFECT_HOME", str((root / HOME).resolve())))
        os.environ.update(access.direct(os.environ))
        self.log, self._home = home / "server.log", home
        self._ending, self._changing, self._settled = False, threading.Lock(), False
        self.server: subprocess.Popen[bytes] | None = None
        atexit.register(self._stop)  # registered before Prefect's own functions, so that those run first
        if found := running(home):
            self.address = os.environ["PREFECT_API_URL"] = found
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
        create_database(home)
        self.log.unlink(missing_ok=True)
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "flows.servers.embedded", str(urlsplit(self.address).port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    **database(self._home),
                    watchdog.VARIABLE: str(os.getpid()),
                    **{f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "false" for service in IDLE_SERVICES},
                },
                start_new_session=True,
            )

    def wait(self) -> None:
        """Waits until the server answers. Then starts a thread that restarts the server whenever it ends.

        Raises InputError if the server fails to start.
        """
        end = time.monotonic() + TIMEOUT
        while not self._healthy():
            if (self.server and self.server.poll() is not None) or time.monotonic() > end:
                raise InputError(f"the Prefect server for this run did not start; its log is {self.log}")
            time.sleep(0.1)
        threading.Thread(target=self._replace, name="embedded", daemon=True).start()

    def settle(self, run: str, tasks: int) -> None:
        """Waits at most SETTLE_SECONDS seconds until the server has written the last states of a flow run's tasks.

        Args:
            run: the id of the flow run.
            tasks: the number of its tasks.
        """
        ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"]}}}
        asked = access.request(f"{self.address}/task_runs/count")
        asked.data = json.dumps({"flow_runs": {"id": {"any_": [run]}}, "task_runs": ended}).encode()
        asked.add_header("Content-Type", "application/json")
        end = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end:
            with suppress(OSError, ValueError), urlopen(asked, timeout=SETTLE_SECONDS) as answer:
                if json.load(answer) >= tasks:
                    break
            time.sleep(0.05)
        self._settled = True

    def _replace(self) -> None:
        """Restarts the Prefect server whenever it ends, at most RESTARTS times.

        Without a server, Prefect's client retries its requests for some minutes, and then the flow fails.
        """
        for _ in range(RESTARTS):
            if self.server:
                self.server.wait()
            while self._healthy():  # waits for the end of a server that was not started here
                time.sleep(CHECK_SECONDS)
            with self._changing:
                if self._ending:
                    return
                self._start()

    def _healthy(self) -> bool:
        return access.answers(access.request(f"{self.address}/health"))

    def _stop(self) -> None:
        if self.server and not self._settled:  # the run was interrupted
            time.sleep(SETTLE_SECONDS)
        with self._changing:
            self._ending = True
        if self.server:
            ending.end_groups([self.server], ending.SERVER)
            self.server.wait()


if __name__ == "__main__":
    watchdog.start()
    sys.argv = [
        "prefect",
        "server",
        "start",
        "--no-ui",
        "--analytics-off",
        "--host",
        "127.0.0.1",
        "--port",
        sys.argv[1],
    ]
    runpy.run_module("prefect", run_name="__main__")
