"""Handles SIGTERM and Ctrl-C so that a stage can save first. SIGTERM comes from a cancelled flow or an ending spot instance."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(BaseException):
    """The process was asked to end.

    Like KeyboardInterrupt, this class derives from BaseException, so `except Exception` does not take it for a failure.
    """

    def __init__(self, message: str = "stopped", number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


def on_sigterm() -> None:
    """Makes SIGTERM raise Stopped in the main thread, so that `finally` blocks remove temporary files."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number=number)

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Holds back the first SIGTERM or SIGINT during the block. A second signal acts at once.

    Yields a callable that returns the number of the signal held back, or 0. If the `with` block ends without an exception, the
    signal acts at the end. Does nothing outside the main thread, since only the main thread gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    received: list[int] = []

    def hold_back(number: int, _: Any) -> None:
        received.append(number)
        restore()

    handlers = {number: signal.signal(number, hold_back) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    try:
        yield lambda: received[0] if received else 0
    finally:
        restore()
    # protects: tests/stages/test_faults.py::test_a_second_signal_acts_at_once_and_an_unanswered_one_afterwards
    if received:
        signal.raise_signal(received[0])
