"""Holds lock files. Only one process at a time can hold a lock file. The operating system frees it when the process ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

INTERVAL = 0.5  # seconds between two attempts to get a lock that another process holds


@contextmanager
def held(path: Path, patience: float = 0, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock file `path` during the block. Creates the folder of the file.

    If the lock is not free within `patience` seconds, calls `waiting` once and then waits without limit. `waiting` may report
    the wait, or raise an error to give up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        waiting()
        # protects: tests/flows/test_children.py::test_one_run_at_a_time_works_in_a_checkout
        lock.acquire(poll_interval=INTERVAL)
    try:
        yield
    finally:
        lock.release()
