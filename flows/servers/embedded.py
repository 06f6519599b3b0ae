"""A Prefect API that lives as long as one `python -m flows`, so that nobody has to start a server first."""

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

DATABASE = ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL")  # where it is another's
HOME = Path(".prefect")  # Prefect's database and logs; prefect.toml names the same folder
TIMEOUT = 120.0  # seconds
RESTARTS = 5  # of a server that was killed, in one run
FLUSH = 1.0  # seconds between the server's writes of task states; at 0.2 it keeps a third of a core busy
# Made once, when the project is installed: to create its tables takes Prefect ten seconds of computing.
EMPTY = Path(sys.prefix) / "share" / "prefect" / "prefect.db"
# What a server does for schedules, workers and automations, none of which one run has.
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
    """Gives Prefect's folder a database if it has none. What is missing then, an older one's tables, a server makes itself."""
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
    """What a server needs in its environment to find the database there, where Prefect would take a part of its path for more."""
    file = home.resolve() / "prefect.db"
    if not set("%?#") & set(str(file)) or any(name in os.environ for name in DATABASE):
        return {}
    return {"PREFECT_SERVER_DATABASE_CONNECTION_URL": sqlite.address_of(file, driver="aiosqlite")}


class Api:
    """Starts at once and is ready after wait(). Make it before `prefect` is imported: it sets PREFECT_API_URL.

    It is stopped when the interpreter exits, after Prefect has sent what it still had to send, or was killed.
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
        """Waits until the server answers, and from then on keeps it alive. Raises InputError when the server doesn't come up."""
        end = time.monotonic() + TIMEOUT
        while not self._healthy():
            if self.server.poll() is not None or time.monotonic() > end:
                raise InputError(f"the embedded Prefect API did not start: {self.log} says why")
            time.sleep(0.1)
        threading.Thread(target=self._keep, name="embedded", daemon=True).start()

    def _keep(self) -> None:
        """Starts the server again when it was killed: Prefect repeats its requests meanwhile, and would give up after minutes."""
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
