"""Holds lock files. One process at a time can hold a lock; the system frees it when the process ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

INTERVAL = 0.5  # seconds between two attempts in a long wait


@contextmanager
def held(path: Path, patience: float = 0, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock file `path` during the block. Creates its folder.

    waiting: called if the lock is not free within `patience` seconds. Reports the wait, or raises an error to give up.
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
