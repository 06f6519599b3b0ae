"""Handles SIGTERM (from a spot instance going away, a cancelled flow) and Ctrl-C so that a stage can save first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(BaseException):
    """The process was asked to end. Like KeyboardInterrupt, it is not an Exception, so no handler takes it for a failure."""

    def __init__(self, message: str = "stopped", number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


def on_sigterm() -> None:
    """Makes SIGTERM raise Stopped in the main thread, so that temporary files are removed."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number=number)

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Holds back the first SIGTERM or SIGINT during the block. A second one acts at once.

    Yields a callable that returns the number of the signal held back, or 0. If the block ends without an exception, the
    signal acts then. Does nothing outside the main thread, since only that thread gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)
        restore()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield lambda: came[0] if came else 0
    finally:
        restore()
    # protects: tests/stages/test_faults.py::test_a_second_signal_acts_at_once_and_an_unanswered_one_afterwards
    if came:
        signal.raise_signal(came[0])
