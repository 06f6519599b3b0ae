"""Ends processes: sends SIGTERM, waits for a grace time in which the processes save, then sends SIGKILL.

STAGE, SERVER, ORPHAN and FLOW_RUNS are all grace times of the project. A process that ends other processes has a longer grace
time than those processes, so that it is not killed before they have ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

# Seconds from SIGTERM to SIGKILL.
STAGE = 6.0  # for a stage. Prefect takes up to 4 s to notice a cancellation, so a cancelled stage ends within 10 s.
SERVER = 10.0  # for the Prefect server of a single flow, which writes the last task states
ORPHAN = 15.0  # for a process whose parent is gone. A flow run must end its stages in this time.
FLOW_RUNS = 20.0  # for the flow runs of a worker of `make up`, which become orphans when the worker ends

INTERVAL = 0.5  # seconds between two checks that the parent still runs

T = TypeVar("T")


class Leader(Protocol):
    """A process that leads its own process group, such as a subprocess.Popen with start_new_session."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> object:
        """Reaps the process if it has ended, since a zombie would count as a member of its group."""


def end_groups(leaders: Sequence[Leader], grace: float) -> None:
    """Ends process groups: sends SIGTERM, and after `grace` seconds SIGKILL to each group that still has a process."""
    for leader in leaders:
        _signal(leader, signal.SIGTERM)
    for leader in left_after(grace, lambda: [running for running in leaders if _signal(running, 0)]):
        _signal(leader, signal.SIGKILL)


def left_after(grace: float, running: Callable[[], Sequence[T]]) -> Sequence[T]:
    """Waits until running() returns an empty sequence, but at most `grace` seconds. Returns the last result of running()."""
    end = time.monotonic() + grace
    while (left := running()) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _signal(leader: Leader, number: int) -> bool:
    """Sends a signal to a process group. Returns False if the group has no processes left."""
    leader.poll()
    try:
        os.killpg(leader.pid, number)
    except (ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        return False
    return True
