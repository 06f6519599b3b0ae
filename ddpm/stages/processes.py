"""Processes named so that another one can tell whether they still run, whatever their ids are used for since."""

from __future__ import annotations

import platform

import psutil


def this_process() -> str:
    """Host, id and start time of this process."""
    process = psutil.Process()
    return f"{platform.node()} {process.pid} {process.create_time():.2f}"


def is_here(name: str) -> bool:
    """Whether it was named on this host: of other hosts' processes nothing is known."""
    return name.split(" ", maxsplit=1)[0] == platform.node()


def is_alive(name: str) -> bool:
    """Whether the process that this_process() named runs on this host. A zombie doesn't."""
    _, pid, created = name.split(" ")
    try:
        process = psutil.Process(int(pid))
        return f"{process.create_time():.2f}" == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
