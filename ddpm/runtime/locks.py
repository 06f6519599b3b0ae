"""Holds lock files: one process at a time, of all that share a file system. The end of a process frees its locks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

INTERVAL = 0.5  # seconds between two attempts in a long wait


@contextmanager
def held(path: Path, patience: float = 0, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock file `path` while the block runs, and makes its folder.

    waiting: is called once the lock was somebody else's for `patience` seconds. It says for whom the wait is, or raises.
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
