"""Checks that living processes are told from dead ones, and processes of this host from those of other hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ddpm.runtime import processes
from ddpm.runtime.processes import is_alive, is_here, this_process


def test_a_process_lives_until_it_ends() -> None:
    name = this_process()
    assert is_here(name) and is_alive(name)
    program = "from ddpm.runtime.processes import this_process; print(this_process(), flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert is_here(name) and is_alive(name)
    host, pid, start = name.split(" ")
    assert not is_alive(f"{host} {os.getpid()} {start}")  # another process has this id now
    child.kill()
    end = psutil.Process(child.pid)
    while end.status() != psutil.STATUS_ZOMBIE:
        pass
    assert not is_alive(name)
    child.communicate()
    assert is_here(name) and not is_alive(f"{host} {pid} {start}")


def test_a_clock_that_is_set_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    name, start = this_process(), psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: start(self) + 1.0)
    assert is_alive(name)


def test_another_container_of_the_same_name_is_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart, the host's earlier processes are known to be dead. A container's earlier processes stay unknown."""
    names = {}
    for ids, boot in (
        (processes.FIRST, "a"),
        (processes.FIRST, "b"),
        ("pid:[7]", "a"),
        ("pid:[8]", "a"),
        ("pid:[7]", "b"),
    ):
        root = tmp_path / f"{ids}{boot}"
        for folder in ("self/ns", "sys/kernel/random", str(os.getpid())):
            (root / folder).mkdir(parents=True)
        (root / "self/ns/pid").symlink_to(ids)
        (root / "sys/kernel/random/boot_id").write_text(f"{boot}\n")
        (root / str(os.getpid()) / "stat").write_text(f"{os.getpid()} (a (b) c) S {' '.join(map(str, range(4, 53)))}\n")
        monkeypatch.setattr(processes, "PROC", root)
        monkeypatch.setattr(processes, "BOOT", root / "sys/kernel/random/boot_id")
        names[ids, boot] = this_process()
        known = [which for which, name in names.items() if is_here(name)]
        assert known == [which for which in names if which[0] == ids == processes.FIRST or which == (ids, boot)]
        assert [which for which in known if is_alive(names[which])] == [(ids, boot)]
    assert names[processes.FIRST, "a"].endswith("a/22")
