"""Ends processes: SIGTERM, a grace time in which they save, then SIGKILL. Holds all grace times of the project.

A process that ends other processes has a longer grace time than they have. Otherwise it would be killed before they end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

STAGE = 6.0  # seconds; a stage saves its state. Prefect notices a cancellation within 4, so it takes ten at most
SERVER = 10.0  # the Prefect server of a single flow writes the last task states
ORPHAN = 15.0  # a process whose parent is gone; a flow run ends its stages first
FLOW_RUNS = 20.0  # the flow runs of a worker of `make up`; they become orphans when the worker ends

INTERVAL = 0.5  # seconds between two checks that the parent still runs

T = TypeVar("T")


class Leader(Protocol):
    """A process that leads a process group of its own, such as a subprocess.Popen with start_new_session."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> object:
        """Reaps the process if it has ended: a zombie would count as a member of its group."""


def end_groups(leaders: Sequence[Leader], grace: float) -> None:
    """Ends process groups: SIGTERM, then SIGKILL for those with a process left after `grace` seconds."""
    for leader in leaders:
        _signal(leader, signal.SIGTERM)
    for leader in left_after(grace, lambda: [each for each in leaders if _signal(each, 0)]):
        _signal(leader, signal.SIGKILL)


def left_after(grace: float, running: Callable[[], Sequence[T]]) -> Sequence[T]:
    """Waits until `running` returns nothing, at most `grace` seconds. Returns its last result."""
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
