"""Runs a Prefect server during one `python -m flows`, so that users need not start a server first."""

from __future__ import annotations

import atexit
import os
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from ddpm.databases import sqlite
from ddpm.errors import InputError
from ddpm.runtime import ending, watchdog
from flows.servers import access

# If one of these variables is set, the user has chosen another database.
DATABASE = ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL")
HOME = Path(".prefect")  # Prefect's database and logs; prefect.toml names the same folder
TIMEOUT = 120.0  # seconds
RESTARTS = 5  # the most restarts of a killed server in one run
FLUSH = 1.0  # seconds between the server's writes of task states; at 0.2, the server keeps a third of a core busy
# A database without runs, made when the project is installed, since Prefect needs ten seconds to create its tables.
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
    """Copies EMPTY into Prefect's folder, unless that has a database. The server creates missing tables."""
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
    """Returns a variable with the path of the database if it contains %, ? or #, which Prefect would misread."""
    file = home.resolve() / "prefect.db"
    if not set("%?#") & set(str(file)) or any(name in os.environ for name in DATABASE):
        return {}
    return {"PREFECT_SERVER_DATABASE_CONNECTION_URL": sqlite.address_of(file, driver="aiosqlite")}


class Api:
    """A Prefect server in a process of its own, which starts at once and answers after wait().

    Create it before `prefect` is imported, since it sets PREFECT_API_URL. The server is stopped when the interpreter
    exits, after it has written the last task states. It also ends if this process is killed.
    """

    def __init__(self, root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        home = Path(os.environ.setdefault("PREFECT_HOME", str((root / HOME).resolve())))
        create_database(home)
        self.log, self._home = home / "server.log", home
        self._ending, self._changing = False, threading.Lock()
        os.environ.update(access.direct(os.environ))
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{self.port}/api"
        self.log.unlink(missing_ok=True)
        self.server = self._started()
        atexit.register(self._stop)

    def _started(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.servers.embedded", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    **database(self._home),
                    watchdog.VARIABLE: str(os.getpid()),
                    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": str(FLUSH),
                    **{f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "false" for service in IDLE_SERVICES},
                },
                start_new_session=True,
            )

    def wait(self) -> None:
        """Waits until the server answers. From then on, restarts a killed server. Raises InputError if the start fails."""
        end = time.monotonic() + TIMEOUT
        while not self._healthy():
            if self.server.poll() is not None or time.monotonic() > end:
                raise InputError(f"the embedded Prefect API did not start: see {self.log}")
            time.sleep(0.1)
        threading.Thread(target=self._restart, name="embedded", daemon=True).start()

    def _restart(self) -> None:
        """Restarts a killed server, RESTARTS times. Prefect repeats its requests meanwhile, but gives up after minutes."""
        for _ in range(RESTARTS):
            self.server.wait()
            with self._changing:
                if self._ending:
                    return
                self.server = self._started()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _stop(self) -> None:
        time.sleep(2 * FLUSH)
        with self._changing:
            self._ending = True
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
