"""Checks questions to git in a repository and outside of a repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ddpm.provenance import git


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "inner").mkdir(parents=True)
    (root / "inner" / "file").write_bytes(b"\xff first")
    name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (("init",), ("add", "."), (*name, "commit", "-m", "first")):
        subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)
    return root


def test_it_answers_for_the_folder_that_is_asked_about(repository: Path) -> None:
    inner = repository / "inner"
    commit = git.head(repository)
    assert commit is not None and len(commit) == 40 and git.head(inner) == commit
    assert git.line(inner, "status", "--porcelain") == ""
    (inner / "file").write_bytes(b"second")
    assert git.ask(inner, "show", "HEAD:./file") == b"\xff first"  # the answer is bytes in any encoding
    assert git.line(inner, "status", "--porcelain") == "M inner/file"
    assert git.ask(inner, "show", "HEAD:./other") is None


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_repository_or_without_git_there_is_no_answer(
    installed: bool, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setenv("PATH", str(tmp_path))
    root = tmp_path if installed else repository
    assert git.head(root) is None and git.ask(root, "show", "HEAD:./inner/file") is None
