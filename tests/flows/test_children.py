from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows import children


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    children.start()
    yield
    children.stop()
    children.start()


def test_lines_come_as_they_are_printed(tmp_path: Path) -> None:
    code = "import sys, time; print('one'); print('two', file=sys.stderr); time.sleep(1); print('three'); sys.exit(3)"
    lines: list[tuple[str, float]] = []
    assert (
        children.run((sys.executable, "-c", code), tmp_path, lambda line: lines.append((line, time.monotonic()))) == 3
    )
    assert [line for line, _ in lines] == ["one", "two", "three"]
    assert lines[2][1] - lines[0][1] > 0.5


def test_stop_ends_the_deaf_grandchildren_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "GRACE", 1.0)
    deaf = (
        "import os, signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])"
    started, pids, ends = threading.Event(), [], []

    def line(text: str) -> None:
        pids.append(int(text))
        started.set()

    def work() -> None:
        try:
            children.run((sys.executable, "-c", parent), tmp_path, line)
        except children.Stopped:
            ends.append("stopped")

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(20)
    children.stop()
    thread.join(10)
    assert ends == ["stopped"]
    end = time.monotonic() + 10  # a killed process takes a moment to go; on its own it would stay for a minute
    while _alive(pids[0]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _alive(pids[0])
    with pytest.raises(children.Stopped):
        children.run((sys.executable, "-c", "pass"), tmp_path, print)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
