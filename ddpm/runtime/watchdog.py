"""Ends this process when the flow or DVC process that started it is gone. So even kill -9 leaves no orphan."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from ddpm.runtime import ending

VARIABLE = "DDPM_WATCH_PID"  # the id of the process to watch: a stage watches its flow, a flow watches its worker

SHELLS = {"ash", "bash", "dash", "fish", "ksh", "sh", "zsh"}  # DVC runs a stage's command through one of these


def start() -> None:
    """Watches the ancestors of this process, up to the process whose id is in DDPM_WATCH_PID, in a daemon thread.

    Without this variable, a process that DVC started (DVC_STAGE is set) watches its ancestors up to that DVC process.
    Any other process watches nothing. When an ancestor is gone, this process gets SIGTERM. If it still runs after the
    grace time, it exits.
    """
    watched = _watched_ancestors()
    if watched:
        # protects: tests/runtime/test_watchdog.py::test_a_stage_ends_with_what_started_it[flow-True]
        threading.Thread(target=_watch, args=(watched,), name="watchdog", daemon=True).start()


def _watched_ancestors() -> list[psutil.Process]:
    """Returns the ancestors to watch, the parent first. Exits if the id in DDPM_WATCH_PID is not the id of an ancestor."""
    ancestors = psutil.Process().parents()
    watched_pid = os.environ.get(VARIABLE)
    if watched_pid:
        pids = [process.pid for process in ancestors]
        if int(watched_pid) not in pids:
            print("ddpm: the process that started this one has ended, so this one ends too", file=sys.stderr)
            sys.exit(1)
        return ancestors[: pids.index(int(watched_pid)) + 1]
    if "DVC_STAGE" in os.environ:
        for count, process in enumerate(ancestors, 1):
            if _program(process) not in SHELLS:
                return ancestors[:count]
    return []


def _program(process: psutil.Process) -> str:
    """Returns the name of the program that a process runs, or "" if the process has ended."""
    try:
        return Path(process.name()).stem
    except psutil.NoSuchProcess:
        return ""


def _alive(process: psutil.Process) -> bool:
    """Returns whether a process runs. Returns False for a zombie: a killed process is a zombie until its parent reaps it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _watch(watched: list[psutil.Process]) -> None:
    """Waits until one of the processes is gone, then ends this process."""
    while all(_alive(process) for process in watched):
        time.sleep(ending.INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ending.ORPHAN)
    os._exit(1)
