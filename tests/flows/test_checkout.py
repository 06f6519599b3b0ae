"""Checks one environment with several checkouts: the code of the working directory runs, or one line says why it does not."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddpm.errors import InputError
from ddpm.provenance.checkout import require_own
from flows import train_eval
from flows.hosts import dispatch
from flows.processes import crashed_runs

ROOT = Path(__file__).parents[2]
FOREIGN = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}  # Python does not look for modules in the working directory
WIDE, NARROW = 651, 196  # width in pixels of a preview with ten columns of digits, and with three columns


CODE, DATA = (
    ("ddpm", "flows"),
    (".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml", "images/README.md"),
)


@pytest.fixture
def clone(scratch_maker: Callable[[Path, Path], Any], tmp_path: Path) -> Iterator[Any]:
    """Creates a second clone that uses the environment of this checkout."""
    source = tmp_path / "source"
    for name in CODE:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in DATA:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copy(ROOT / "recipes" / "digits.yaml", source / "params.yaml")
    made = scratch_maker(tmp_path / "clone", source)
    made.environment.pop("PYTHONPATH", None)
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (["init", "--quiet"], ["add", "--all"], [*author, "commit", "--quiet", "--message", "all"]):
        assert made.run("git", *command).returncode == 0
    yield made
    made.end()


def narrow(root: Path, now: bool = True) -> None:
    """Edits the code, so that the preview has three columns, or ten again with now=False."""
    source, lines = root / "ddpm" / "stages" / "prepare.py", ("COLUMNS, ROWS = 10", "COLUMNS, ROWS = 3")
    before, after = lines if now else reversed(lines)
    assert before in source.read_text()
    source.write_text(source.read_text().replace(before, after))


def width(root: Path) -> int:
    with Image.open(root / "dataset" / "preview.png") as picture:
        return picture.width


def dvc(clone: Any, *arguments: str) -> str:
    done = clone.run(sys.executable, "-m", "dvc", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout + done.stderr)


@pytest.mark.parametrize("kind", ["clone", pytest.param("worktree", marks=pytest.mark.proof)])
def test_a_stage_runs_the_code_of_its_own_checkout(kind: str, clone: Any, tmp_path: Path) -> None:
    if kind == "worktree":
        clone.run("git", "worktree", "add", "--quiet", str(tmp_path / "tree"))
        clone.root = tmp_path / "tree"
    narrow(clone.root)
    dvc(clone, "repro", "--single-item", "prepare")
    assert width(clone.root) == NARROW
    before = (clone.root / "dvc.lock").read_bytes()
    for arguments in (["prepare"], ["generate", "--out", "grid.png"], ["gc", "--delete"]):
        done = clone.run("ddpm", *arguments, PYTHONPATH=str(ROOT))
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"ddpm: the code of {ROOT / 'ddpm'} would run here, not {clone.root / 'ddpm'};")
    assert (clone.root / "dvc.lock").read_bytes() == before and not (clone.root / "grid.png").exists()
    assert clone.run(sys.executable, "-B", "-m", "ddpm", "prepare").returncode == 0
    assert clone.run("ddpm", "--version").returncode == 0
    assert not list(clone.root.rglob("*.pyc"))  # stages write no bytecode


@pytest.mark.proof
def test_a_queued_experiment_runs_the_code_that_was_queued(clone: Any) -> None:
    dvc(clone, "exp", "run", "--queue", "-S", "data.test_fraction=0.4", "prepare")
    narrow(clone.root)
    dvc(clone, "exp", "run", "--run-all")
    narrow(clone.root, now=False)
    params = clone.root / "params.yaml"
    params.write_text(params.read_text().replace("test_fraction: 0.2", "test_fraction: 0.4"))
    assert "is cached - skipping run" in dvc(clone, "repro", "--single-item", "prepare")
    assert width(clone.root) == WIDE


@pytest.mark.proof
def test_an_experiment_in_a_temporary_folder_runs_the_code_it_takes_there(clone: Any) -> None:
    narrow(clone.root)
    dvc(clone, "exp", "run", "--temp", "prepare")
    dvc(clone, "repro", "--single-item", "prepare")
    assert width(clone.root) == NARROW


def test_a_copy_whose_files_are_hard_links_is_another_checkout(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ddpm", tmp_path / "ddpm", copy_function=os.link)
    with pytest.raises(InputError, match="would run here, not"):
        require_own(tmp_path)


@pytest.mark.parametrize("module", ["ddpm", "flows", "flows.servers.up", "flows.servers.worker"])
def test_no_entry_works_with_the_code_of_another_checkout(module: str, clone: Any) -> None:
    done = clone.run(sys.executable, "-m", module, *(["report"] if module == "ddpm" else []), **FOREIGN)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and f"would run here, not {clone.root / 'ddpm'};" in done.stderr


def test_neither_a_run_of_the_flow_nor_a_host_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("claim", "reap"):
        monkeypatch.setattr(crashed_runs, name, lambda: None)
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    for state in (train_eval.train_eval.fn(), dispatch._run_on_this_host("prepare", "0" * 40, "", "")):
        assert state.name == "InputError" and f"would run here, not {tmp_path / 'flows'};" in str(state.message)
    assert [path.name for path in tmp_path.iterdir()] == ["flows"]


def test_a_folder_without_code_or_with_a_link_to_it_is_no_other_checkout(tmp_path: Path) -> None:
    require_own(tmp_path, "ddpm", "flows")
    (tmp_path / "ddpm").symlink_to(ROOT / "ddpm")
    require_own(tmp_path, "ddpm", "flows")
    (tmp_path / "ddpm").unlink()
    (tmp_path / "ddpm").mkdir()
    require_own(tmp_path)
    (tmp_path / "ddpm" / "__init__.py").touch()
    with pytest.raises(InputError, match=re.escape(f"`python -m ddpm` in {tmp_path}")):
        require_own(tmp_path)


def test_an_interpreter_without_the_packages_is_named(scratch: Any) -> None:
    """With -S, this `python` finds no packages, like the `python` of a user who has not activated the environment."""
    done = scratch.run(sys.executable, "-S", "-B", "-m", "ddpm", "prepare", PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert done.stderr.startswith(f"ddpm: {sys.executable} has no package ") and done.stderr.count("\n") == 1
    assert "activate" in done.stderr
