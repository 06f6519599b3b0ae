"""Ends processes: SIGTERM, a grace time in which they save, then SIGKILL. All grace times of the project stand here.

A process that ends others gets longer than they do. Otherwise it would be killed before it has ended them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

STAGE = 6.0  # seconds; a stage of a cancelled flow saves its state. Prefect notices within 4: a stage ends within ten
SERVER = 10.0  # the Prefect server of one flow writes the last task states
ORPHAN = 15.0  # a process whose starter is gone: a flow run ends its stages first
FLOW_RUNS = 20.0  # what `make up` started and the worker left: its flow runs notice the worker's end and are orphans

INTERVAL = 0.5  # seconds between two looks at whether the starter still runs

T = TypeVar("T")


class Leader(Protocol):
    """A process that leads a process group of its own, such as a subprocess.Popen with start_new_session."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> object:
        """Reaps the process, if it has ended: a zombie would count as one of its group."""


def end_groups(leaders: Sequence[Leader], grace: float) -> None:
    """Ends process groups: SIGTERM, then SIGKILL for those with a process left after `grace` seconds."""
    for leader in leaders:
        _signal(leader, signal.SIGTERM)
    for leader in left_after(grace, lambda: [each for each in leaders if _signal(each, 0)]):
        _signal(leader, signal.SIGKILL)


def left_after(grace: float, running: Callable[[], Sequence[T]]) -> Sequence[T]:
    """Waits until none is running, for `grace` seconds at most. Returns those that still are."""
    end = time.monotonic() + grace
    while (left := running()) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _signal(leader: Leader, number: int) -> bool:
    """Signals the group. Returns False where nobody is left in it."""
    leader.poll()
    try:
        os.killpg(leader.pid, number)
    except (ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        return False
    return True
