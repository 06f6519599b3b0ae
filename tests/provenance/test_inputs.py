"""Checks the inputs that a stage watches while it runs: the code that dvc.yaml names for the stage, and git."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ddpm.errors import InputError
from ddpm.provenance import git
from ddpm.provenance.inputs import unchanged

DVC = "stages:\n  report:\n    cmd: ddpm report\n    deps: [ddpm/report.py, ddpm/native.c, ddpm/page.html.jinja, samples]\n"


@pytest.mark.parametrize("name", ["report.py", "native.c", "page.html.jinja"])
def test_code_that_changes_while_a_stage_runs_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "report")
    (tmp_path / "ddpm").mkdir()
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    (tmp_path / "dvc.yaml").write_text(DVC)
    with unchanged("report", tmp_path):
        pass
    with pytest.raises(InputError, match=rf"ddpm/{name} changed while it ran"), unchanged("report", tmp_path):
        (tmp_path / "ddpm" / name).write_text("edited")


@pytest.mark.parametrize(("edited", "noticed"), [("one", True), ("two", False)])
def test_the_module_that_params_select_is_code_of_the_stage(
    edited: str, noticed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "prepare")
    (tmp_path / "ddpm").mkdir()
    (tmp_path / "params.yaml").write_text("data: {source: one, path: archive}\n")
    dependencies = '["ddpm/${data.source}.py", "${data.path}"]'
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  prepare:\n    cmd: ddpm prepare\n    deps: {dependencies}\n")

    def edit() -> None:
        with unchanged("prepare", tmp_path):
            (tmp_path / "ddpm" / f"{edited}.py").write_text("edited")
            (tmp_path / "archive").write_text("data, not code")

    if noticed:
        with pytest.raises(InputError, match=r"ddpm/one\.py changed while it ran"):
            edit()
    else:
        edit()


def test_values_of_another_file_that_change_while_a_stage_runs_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "train@a")
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    stage = "{matrix: {row: [a]}, cmd: ddpm train, params: [seed, {auto.json: [precision]}]}"
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  train: {stage}\n")
    (tmp_path / "auto.json").write_text('{"precision": "float32", "compile": true}')
    with unchanged("train@a", tmp_path):
        (tmp_path / "auto.json").write_text('{"precision": "float32", "compile": false}')
    message = r"train@a: precision of auto\.json changed while it ran"
    with pytest.raises(InputError, match=message), unchanged("train@a", tmp_path):
        (tmp_path / "auto.json").write_text('{"precision": "bfloat16", "compile": false}')


def test_looking_at_git_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain `git status` writes to the index, so a `git add` at that moment would fail."""
    monkeypatch.chdir(tmp_path)
    for command in (["init"], ["add", "file"]):
        (tmp_path / "file").write_text("the same")
        subprocess.run(["git", *command], check=True, capture_output=True)
    os.utime(tmp_path / "file", (1e9, 1e9))
    before = (tmp_path / ".git/index").read_bytes()
    assert git.line(Path(), "status", "--porcelain", "--untracked-files=no") == "A  file"
    assert (tmp_path / ".git/index").read_bytes() == before
