"""Processes named so that another one can tell whether they still run, whatever their ids are used for since."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil

PROC = Path("/proc")
BOOT = PROC / "sys/kernel/random/boot_id"  # another one after each start of the host
FIRST = "pid:[4026531836]"  # the process ids of the host itself, on any Linux


def this_process() -> str:
    """Host, id and start of this process."""
    process = psutil.Process()
    return f"{_host()} {process.pid} {_start(process)}"


def is_here(name: str) -> bool:
    """Whether it was named on this host: of other hosts' processes nothing is known, nor of other containers'."""
    return name.split(" ", maxsplit=1)[0] == _host()


def is_alive(name: str) -> bool:
    """Whether the process that this_process() named runs on this host. A zombie doesn't."""
    _, pid, start = name.split(" ")
    try:
        process = psutil.Process(int(pid))
        return _start(process) == start and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False


def _host() -> str:
    """Its name; in a container also which one it is: several may have one name, and ids of their own."""
    space = PROC / "self/ns/pid"
    ids = str(space.readlink()) if space.is_symlink() else FIRST
    return platform.node() if ids == FIRST else f"{platform.node()}/{BOOT.read_text(encoding='utf-8').strip()}/{ids}"


def _start(process: psutil.Process) -> str:
    """When it started, by a clock that nobody sets: since which start of the host, and how long after it."""
    if not BOOT.exists():
        return f"{process.create_time():.2f}"
    fields = (PROC / str(process.pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return f"{BOOT.read_text(encoding='utf-8').strip()}/{fields[19]}"  # field 22 of proc_pid_stat(5)
