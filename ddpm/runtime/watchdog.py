"""Ends this process when the flow or the DVC that started it is gone, so that not even kill -9 leaves an orphan."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from ddpm.runtime import ending

VARIABLE = "DDPM_WATCH_PID"  # names the flow to its stages, the worker to its flows

SHELLS = {"ash", "bash", "dash", "fish", "ksh", "sh", "zsh"}  # DVC runs a stage's command through one of these


def start() -> None:
    """Watches, in a daemon thread, the processes between this one and the one that VARIABLE names, both ends included.

    Without VARIABLE, a process that DVC started (DVC_STAGE is set) watches that DVC; any other process watches nothing.
    When one of them is gone, this process gets SIGTERM and, if it is still there after the grace time, ends at once.
    """
    watched = _starters()
    if watched:
        # protects: tests/runtime/test_watchdog.py::test_a_stage_ends_with_what_started_it[flow-True]
        threading.Thread(target=_watch, args=(watched,), name="watchdog", daemon=True).start()


def _starters() -> list[psutil.Process]:
    ancestors = psutil.Process().parents()
    named = os.environ.get(VARIABLE)
    if named:
        pids = [process.pid for process in ancestors]
        if int(named) not in pids:
            print("ddpm: whoever started this has ended, and so does this", file=sys.stderr)
            sys.exit(1)
        return ancestors[: pids.index(int(named)) + 1]
    if "DVC_STAGE" in os.environ:
        for count, process in enumerate(ancestors, 1):
            if _program(process) not in SHELLS:
                return ancestors[:count]
    return []


def _program(process: psutil.Process) -> str:
    try:
        return Path(process.name()).stem
    except psutil.NoSuchProcess:
        return ""


def _alive(process: psutil.Process) -> bool:
    """False for a zombie too: what was killed may stay one until its own parent looks."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _watch(watched: list[psutil.Process]) -> None:
    while all(_alive(process) for process in watched):
        time.sleep(ending.INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ending.ORPHAN)
    os._exit(1)
