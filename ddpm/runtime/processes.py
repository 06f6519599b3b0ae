"""Names a process so that other processes can tell whether the named process still runs, even if its id has been reused."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil

PROC = Path("/proc")
BOOT = PROC / "sys/kernel/random/boot_id"  # changes at each boot of the host
FIRST = "pid:[4026531836]"  # the pid namespace of the host itself, which has the same number on any Linux


def this_process() -> str:
    """Returns the name of this process: its host, id and start time."""
    process = psutil.Process()
    return f"{_host()} {process.pid} {_start(process)}"


def is_here(name: str) -> bool:
    """Returns whether the named process belongs to this host or container. `is_alive` is valid only for such processes."""
    return name.split(" ", maxsplit=1)[0] == _host()


def is_alive(name: str) -> bool:
    """Returns whether a process of this host, named by this_process(), still runs. Returns False for a zombie."""
    _, pid, start = name.split(" ")
    try:
        process = psutil.Process(int(pid))
        return _start(process) == start and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False


def _host() -> str:
    """Returns the host's name. In a container, adds boot id and pid namespace, because containers may share a name."""
    link = PROC / "self/ns/pid"
    space, host = str(link.readlink()) if link.is_symlink() else FIRST, platform.node()
    return host if space == FIRST else f"{host}/{BOOT.read_text(encoding='utf-8').strip()}/{space}"


def _start(process: psutil.Process) -> str:
    """Returns boot id and start time since boot, which ignore changes of the clock. On macOS, returns the start time."""
    if not BOOT.exists():
        return f"{process.create_time():.2f}"
    fields = (PROC / str(process.pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return f"{BOOT.read_text(encoding='utf-8').strip()}/{fields[19]}"  # field 22 of proc_pid_stat(5)
