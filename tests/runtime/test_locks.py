"""Checks that only one process at a time holds a lock file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddpm.runtime import locks

HOLDER = """\
import sys
from pathlib import Path
from ddpm.runtime import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def elsewhere(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs another process that holds the lock until its standard input is closed."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("killed", [False, True])
def test_the_second_says_that_it_waits_and_goes_on_when_the_first_has_ended(tmp_path: Path, killed: bool) -> None:
    path = tmp_path / "new" / "lock"
    with elsewhere(path) as first:

        def waiting() -> None:
            assert first.stdin is not None
            said.append("waits")
            if killed:
                first.kill()
            else:
                first.stdin.close()

        said: list[str] = []
        with locks.held(path, waiting=waiting):
            said.append("held")
            assert first.wait() is not None
        assert said == ["waits", "held"]


def test_who_will_not_wait_gets_nothing_and_leaves_nothing_held(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ZeroDivisionError

    path = tmp_path / "lock"
    with elsewhere(path), pytest.raises(ZeroDivisionError), locks.held(path, 0.1, refuse):
        raise AssertionError
    with locks.held(path, 5, refuse):
        pass
    with pytest.raises(KeyError), locks.held(path, 5, refuse):
        raise KeyError
    with locks.held(path, 5, refuse):
        pass
