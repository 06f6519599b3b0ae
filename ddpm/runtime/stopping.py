"""SIGTERM (a spot instance going away, a cancelled flow) and Ctrl-C, for a stage that has something to put away first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(BaseException):
    """The process was told to end. Like KeyboardInterrupt it is no Exception, so that nothing takes it for a failure."""

    def __init__(self, message: str = "stopped", number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


def on_sigterm() -> None:
    """From now on SIGTERM raises Stopped in the main thread, so that what is half-written is cleared away."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number=number)

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Within the block a first SIGTERM or SIGINT waits; the callable gives its number, or 0. A second one acts at once.

    What came and was not answered with Stopped acts when the block ends. In another thread than the main one, which gets
    no signals, nothing changes.
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
