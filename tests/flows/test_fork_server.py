"""Checks that a stage that the fork server runs does the same as in an interpreter of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import mode
from typing import Any

import psutil
import pytest

from ddpm.files import yaml_file
from ddpm.runtime import display
from flows.processes import children, dvc_command, fork_server

ROOT = Path(__file__).parent.parent.parent
REPRO = ("repro", "--single-item", "prepare")
COMMAND = (*dvc_command.COMMAND, *REPRO)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these forks")


@pytest.fixture
def root(scratch: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Creates a scratch repository with the real stages, the dvc.lock of the real sweep, and the real `ddpm`."""
    for name in ("dvc.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, scratch.root)
    for name in ("ddpm", "images"):
        shutil.copytree(ROOT / name, scratch.root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (scratch.root / "bin" / "python").unlink()
    params = (ROOT / "recipes" / "digits.yaml").read_text().replace("seed: 0", "seed: 5")
    (scratch.root / "params.yaml").write_text(params)
    monkeypatch.setenv("PATH", scratch.environment["PATH"])
    monkeypatch.setenv("SCRATCH", scratch.mark)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    yield scratch.root
    children.stop()  # `scratch` checks for remaining processes after this


def forked(scratch: Any) -> list[int]:
    """Returns the process ids of the fork server and of its forks, which `ps` shows under the title of their task."""
    return [
        int(line.split()[0])
        for line in scratch.running()
        if re.search("flows[.]processes[.]fork_server|^[0-9]+ (dvc|ddpm) ", line)
    ]


def test_it_leaves_the_outputs_and_the_lock_that_dvc_alone_leaves(root: Path, scratch: Any, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(root, alone, symlinks=True)
    said: list[str] = []
    seen: list[int] = []

    def line(text: str) -> None:
        said.append(text)
        seen.append(len(forked(scratch)))

    done, sizes = threading.Event(), {(root / "dvc.lock").stat().st_size}

    def look() -> None:
        while not done.wait(0.002):
            sizes.add((root / "dvc.lock").stat().st_size)

    looking = threading.Thread(target=look)
    looking.start()
    assert children.run(COMMAND, root, line) == 0
    done.set()
    looking.join()
    # the file was never seen half written
    assert sizes == {(ROOT / "dvc.lock").stat().st_size, (root / "dvc.lock").stat().st_size}
    assert any(text.startswith("prepare: digits: 1,438 train") for text in said)
    assert 3 in seen  # the fork server, and two forks: DVC and the stage
    scratch.root = alone
    assert scratch.run(sys.executable, "-m", "dvc", *REPRO).returncode == 0
    assert (root / "dvc.lock").read_text() != (ROOT / "dvc.lock").read_text()
    for name in ("dvc.lock", "dataset/dataset.json", "dataset/train.npy"):
        assert (root / name).read_bytes() == (alone / name).read_bytes(), name


def test_code_that_is_edited_meanwhile_is_the_code_that_runs(root: Path, scratch: Any) -> None:
    """Otherwise DVC would record the new code as the source of outputs of the old, imported code."""
    source = root / "ddpm" / "stages" / "prepare.py"
    said: list[str] = []
    assert children.run(COMMAND, root, said.append) == 0
    source.write_text(
        source.read_text().replace("train and {test:,} test images", "new train and {test:,} test images")
    )
    assert children.run(COMMAND, root, said.append) == 0
    assert [text.partition("1,438 ")[2][:3] for text in said if "1,438" in text] == ["tra", "new"]


def test_a_stage_elsewhere_runs_the_code_that_lies_there(root: Path, scratch: Any, tmp_path: Path) -> None:
    """Runs a stage in another checkout than the one whose code was imported."""
    other = tmp_path / "other"
    shutil.copytree(root, other, symlinks=True)
    source = other / "ddpm" / "stages" / "prepare.py"
    source.write_text(source.read_text().replace("train and {test:,} test images", "other train and"))
    said: list[str] = []
    seen: list[int] = []

    def line(text: str) -> None:
        said.append(text)
        seen.append(len(forked(scratch)))

    # In `root` there are the fork server and two forks, DVC and the stage. In `other` the stage is a fork only for the moment
    # in which it finds out that its folder is not `root`.
    for where, forks in ((root, lambda: 3 in seen), (other, lambda: mode(seen) == 2)):
        seen.clear()
        assert children.run(COMMAND, where, line) == 0
        assert forks(), seen
    assert [text.partition("1,438 ")[2][:5] for text in said if "1,438" in text] == ["train", "other"]


def test_only_this_environment_s_own_programs_are_forked(tmp_path: Path) -> None:
    """Another environment with the same interpreter has other packages."""
    own = str(Path(sys.executable).parent)
    (tmp_path / "python").symlink_to(sys.executable)
    for command, path, forks in (
        ((*fork_server.DDPM, "report"), own, True),
        (COMMAND, str(tmp_path), True),
        (("dvc", "repro"), own, False),
        ((*fork_server.DDPM, "report"), os.pathsep.join((str(tmp_path), own)), False),
        (("python", "-m", "ddpm", "report"), own, False),
        (("ddpm", "report"), own, False),
    ):
        assert fork_server.can_run(command, {"PATH": path}) == forks, command


def test_it_ends_with_the_exit_code_and_the_line_of_the_stage(root: Path) -> None:
    (root / "params.yaml").write_text(
        (root / "params.yaml").read_text().replace("test_fraction: 0.2", "test_fraction: 2")
    )
    said: list[str] = []
    assert children.run(COMMAND, root, said.append) != 0
    assert any(text.startswith("ddpm: params.yaml: data.test_fraction") for text in said)
    assert "exited with 2" in said[-1]
    said.clear()
    assert children.run((*fork_server.DDPM, "prepare"), root, said.append) == 2
    assert len(said) == 1


def test_every_stage_waits_for_what_it_imports() -> None:
    """Otherwise its fork would import the same modules once more."""
    stages = yaml_file.read_yaml(ROOT / "dvc.yaml")["stages"]
    assert stages.keys() <= fork_server.NEEDED.keys()
    for stage in stages:
        command = (*dvc_command.COMMAND, "--wait-for-lock", "repro", "--single-item", f"{stage}@x")
        needed = fork_server.IMPORTS[: fork_server._imports_needed(command)]
        assert f"ddpm.stages.{stage}" in needed


@pytest.mark.chaos
def test_a_kill_of_all_forks_is_one_of_the_work_and_the_next_goes_on(root: Path, scratch: Any) -> None:
    killed: list[int] = []

    def kill(text: str) -> None:
        if text.startswith(display.PREFIX) and not killed:  # the stage is running
            (importer,) = (pid for pid in forked(scratch) if psutil.Process(pid).ppid() == os.getpid())
            os.kill(importer, signal.SIGKILL)
            killed.append(importer)

    assert children.run(COMMAND, root, kill) == -signal.SIGKILL
    scratch.wait(lambda: not forked(scratch), 20, "no fork of the killed fork server is left")
    assert children.run(COMMAND, root, print) == 0


@pytest.mark.proof
def test_without_the_process_that_forks_stages_run_all_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed fork server is noticed only at the next request. An environment may also be too large for a request."""
    said: list[str] = []
    assert children.run((*fork_server.DDPM, "--version"), root, said.append) == 0
    killed = children._server[0]
    monkeypatch.setattr(killed, "alive", lambda: True)
    killed._process.kill()
    killed._process.wait()
    assert children.run((*fork_server.DDPM, "--version"), root, said.append) == 0
    monkeypatch.setenv("LARGE_1", 100_000 * "1")
    monkeypatch.setenv("LARGE_2", 100_000 * "2")
    assert children.run((*fork_server.DDPM, "--version"), root, said.append) == 0
    assert len(said) == 3 and len(set(said)) == 1


def test_stop_ends_the_forks(root: Path, scratch: Any) -> None:
    began, ends = threading.Event(), []

    def work() -> None:
        try:
            children.run(COMMAND, root, lambda text: began.set() if text.startswith(display.PREFIX) else None)
        except children.FlowStopped:
            ends.append("stopped")

    thread = threading.Thread(target=work)
    thread.start()
    assert began.wait(30)
    children.stop()
    thread.join(10)
    assert ends == ["stopped"]
    scratch.wait(lambda: not forked(scratch), 5, "no fork is left")
