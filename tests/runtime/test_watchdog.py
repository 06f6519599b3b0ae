"""Checks that a stage ends if the process that started it is killed with SIGKILL, and for no other reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddpm.runtime import ending, watchdog

STAGE = """\
import os, pathlib, signal, sys, time
from ddpm.runtime import ending, watchdog
ending.ORPHAN = 60  # SIGTERM ends this stage long before the grace time is over
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ending.ORPHAN = 0.5  # a stage that ignores SIGTERM exits after the grace time
watchdog.start()
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""
# Starts a stage through a shell, as DVC does.
STARTER = """\
import os, subprocess, sys
command = f"{sys.executable} stage.py {' '.join(sys.argv[2:])}; true"
os.environ.update({"flow": {"DDPM_WATCH_PID": str(os.getpid())}, "dvc": {"DVC_STAGE": "x"}}.get(sys.argv[1], {}))
subprocess.run(["sh", "-c", command])
"""


def wait(condition: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("kind", "ends"), [("flow", True), ("flow deaf", True), ("dvc", True), ("plain", False)])
def test_a_stage_ends_with_what_started_it(tmp_path: Path, kind: str, ends: bool) -> None:
    (tmp_path / "stage.py").write_text(STAGE)
    environment = {name: value for name, value in os.environ.items() if name not in {watchdog.VARIABLE, "DVC_STAGE"}}
    starter = subprocess.Popen([sys.executable, "-c", STARTER, *kind.split()], cwd=tmp_path, env=environment)
    pid = int(wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    try:
        time.sleep(3 * ending.INTERVAL)
        assert alive(pid)
        starter.kill()  # there is no wait() for it, so it becomes a zombie, which must count as dead
        if ends:
            wait(lambda: not alive(pid))
        else:
            time.sleep(4 * ending.INTERVAL)
            assert alive(pid)
    finally:
        starter.wait()
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("program", [["stage.py"], ["-m", "ddpm", "--help"]], ids=["a stage", "ddpm"])
def test_what_belongs_to_a_flow_that_is_gone_does_not_begin(tmp_path: Path, program: list[str]) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "stage.py").write_text(STAGE)
    done = subprocess.run(
        [sys.executable, *program],
        cwd=tmp_path,
        env={**os.environ, watchdog.VARIABLE: str(gone.pid)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "ddpm: the process that started this one has ended, so this one ends too\n"
    assert not (tmp_path / "pid").exists()
