"""Checks that a truncated dvc.lock is repaired or refused in one line, and that an intended shorter dvc.lock is kept."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm.errors import InputError
from ddpm.provenance import lock_mending

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "dvc.lock").read_text()
AUTHOR = ("-c", "user.name=test", "-c", "user.email=test@example.org")


def run(root: Path, *command: str) -> None:
    subprocess.run(command, cwd=root, check=True, capture_output=True)


def commit(root: Path, lock: str) -> None:
    (root / "dvc.lock").write_text(lock)
    run(root, "git", "add", "--all")
    run(root, "git", *AUTHOR, "commit", "--quiet", "--message", "another", "--allow-empty")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        run(root, *command)
    for name in ("dvc.yaml", "params.yaml", ".gitignore"):
        shutil.copy(ROOT / name, root)
    commit(root, LOCK)
    return root


@pytest.fixture
def checkout(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "checkout"))


def checked(root: Path, lock: str | None) -> tuple[str | None, list[str]]:
    """Runs the check of a verb on this dvc.lock. Returns the file afterwards, and the messages."""
    said: list[str] = []
    (root / "dvc.lock").unlink(missing_ok=True)
    if lock is not None:
        (root / "dvc.lock").write_text(lock)
    lock_mending.check(root, said.append)
    return (root / "dvc.lock").read_text() if (root / "dvc.lock").exists() else None, said


def with_another(name: str) -> str:
    """Returns the committed file as if stage `name` had run again: all outputs of this stage have other hashes and sizes."""
    stages = lock_mending.entries(LOCK) or {}
    head, _, outs = stages[name].partition("\n    outs:\n")
    changed = re.sub(r"md5: \w{8}", "md5: 01234567", re.sub(r"size: \d+", "size: 123456", outs))
    return LOCK.replace(stages[name], f"{head}\n    outs:\n{changed}")


def places(text: str, ran: str) -> list[int]:
    """Returns places to cut.

    They are 50 random places, multiples of a file system's block, ends of entries, and ends of lines: the last lines of the file
    and of the stage `ran`, if any.
    """
    chance = random.Random(0)
    ends = [match.start() for match in lock_mending.STAGE.finditer(text)]
    lines = [match.end() for match in re.finditer("\n", text)]
    end = text.index(entry := (lock_mending.entries(text) or {})[ran]) + len(entry) if ran else 0
    return [
        *chance.sample(range(1, len(text)), 50),
        *range(0, len(text), 4096),
        *ends[:3],
        *ends[-3:],
        *lines[-12:-1],
        *[line for line in lines if line < end][-12:],
        len(text) - 1,
    ]


def mended(text: str, cut: int, last: str) -> str:
    """Returns the expected repair of a cut: the whole entries of the cut file, and the other entries of the last whole file."""
    new, old, begun = lock_mending.entries(text) or {}, lock_mending.entries(last) or {}, text[:cut]
    pieces = [new[name] if lock_mending.HEAD in begun and new[name] in begun else old[name] for name in new]
    return lock_mending.HEAD + "".join(pieces)


@pytest.mark.parametrize(
    ("seen", "ran"), [(True, ""), (True, "train@linear"), (True, "likelihood@cosine"), (False, ""), (False, "report")]
)
def test_every_cut_is_mended(seen: bool, ran: str, checkout: Path) -> None:
    """A kill cuts off the file while DVC writes it. The text is unchanged, or has the new entry of a stage that ran again."""
    text = with_another(ran) if ran else LOCK
    for cut in places(text, ran):
        if seen:
            assert checked(checkout, LOCK) == (LOCK, [])
        else:
            shutil.rmtree(checkout / ".cache", ignore_errors=True)
        left, said = checked(checkout, text[:cut])
        assert left == mended(text, cut, LOCK), cut
        assert len(said) == 1 and said[0].startswith("dvc.lock: mended: it was cut off"), cut
        assert checked(checkout, left) == (left, [])


def test_what_dvc_made_of_a_cut_file_is_mended(checkout: Path) -> None:
    """DVC read a file that was cut at a valid place, and wrote it again with the next stage's entry.

    So half an entry is in the middle.
    """
    stages = lock_mending.entries(LOCK) or {}
    names = list(stages)
    half = stages[names[4]].rpartition("    - path: ")[0]
    last = {name: stages[name] for name in names[:-1]}
    checked(checkout, lock_mending.HEAD + "".join(last.values()))
    left, said = checked(checkout, lock_mending.HEAD + "".join([*list(stages.values())[:4], half, stages[names[-1]]]))
    assert left == LOCK and len(said) == 1


def test_without_a_whole_one_complete_stages_stay_or_a_line_says_what_to_do(checkout: Path) -> None:
    run(checkout, "git", "rm", "--quiet", "dvc.lock")
    run(checkout, "git", *AUTHOR, "commit", "--quiet", "--message", "no lock")
    stages = list((lock_mending.entries(LOCK) or {}).values())
    for cut in (0, 10, len(lock_mending.HEAD), len(lock_mending.HEAD + stages[0]) - 1):
        with pytest.raises(InputError, match=r"dvc\.lock: cut off.* delete it and run this again") as caught:
            checked(checkout, LOCK[:cut])
        assert "\n" not in str(caught.value) and (checkout / "dvc.lock").read_text() == LOCK[:cut]
    left, said = checked(checkout, LOCK[: len(lock_mending.HEAD + stages[0] + stages[1]) - 20])
    assert left == lock_mending.HEAD + stages[0] and len(said) == 1


def test_shorter_ones_that_somebody_wanted_are_left_alone(checkout: Path) -> None:
    stages = lock_mending.entries(LOCK) or {}
    older = lock_mending.HEAD + "".join(list(stages.values())[:7])
    assert checked(checkout, LOCK) == (LOCK, [])
    # After `git checkout` of an older commit, dvc.lock is the beginning of the newer file.
    run(checkout, "git", "checkout", "--quiet", "-b", "older")
    commit(checkout, older)
    checked(checkout, LOCK)
    assert checked(checkout, older) == (older, [])
    # After `dvc exp apply` or `git stash`, git has the file in a commit that is on no branch.
    run(checkout, "git", "checkout", "--quiet", "-")
    shorter = lock_mending.HEAD + "".join(list(stages.values())[:5])
    (checkout / "dvc.lock").write_text(shorter)
    run(checkout, "git", *AUTHOR, "stash")
    assert checked(checkout, LOCK) == (LOCK, [])
    run(checkout, "git", "stash", "apply")
    assert checked(checkout, shorter) == (shorter, [])
    # The user deleted the file, and DVC writes a new file stage by stage.
    checked(checkout, LOCK)
    assert checked(checkout, None) == (None, [])
    for count in (1, 2, 20):
        begun = lock_mending.HEAD + "".join(list(stages.values())[:count])
        assert checked(checkout, begun) == (begun, [])
    # The user removed entries from the middle.
    without = lock_mending.HEAD + "".join(
        entry for name, entry in stages.items() if name not in ("train@cosine", "report")
    )
    checked(checkout, LOCK)
    assert checked(checkout, without) == (without, [])
    # An output outside of the checkout has another kind of hash.
    outside = LOCK.replace("      hash: md5\n      md5: ", "      etag: ")
    assert outside != LOCK
    checked(checkout, LOCK)
    assert checked(checkout, outside) == (outside, [])
    # A user or another program wrote the file.
    for text in ("stages:\n    a: {cmd: x}\n", LOCK.replace("  report:\n", "<<<<<<< HEAD\n  report:\n")):
        checked(checkout, LOCK)
        assert checked(checkout, text) == (text, [])


def test_a_stage_that_dvc_removed_is_not_brought_back(checkout: Path) -> None:
    assert checked(checkout, LOCK) == (LOCK, [])
    run(checkout, sys.executable, "-m", "dvc", "remove", "report")
    text = (checkout / "dvc.lock").read_text()
    assert "  report:\n" not in text and len(text) < len(LOCK)
    assert checked(checkout, text) == (text, [])


def test_outside_of_a_dvc_repository_nothing_is_written(tmp_path: Path) -> None:
    assert checked(tmp_path, "") == ("", [])
    assert [path.name for path in tmp_path.iterdir()] == ["dvc.lock"]


DVC = """\
stages:
  first:
    cmd: echo 1 > first
    outs: [first]
  prepare:
    cmd: PYTHON -m ddpm prepare
    deps: [first]
    outs: [dataset]
  last:
    cmd: ls dataset > last
    deps: [dataset]
    outs: [last]
"""


@pytest.mark.chaos
@pytest.mark.parametrize("kept", ["    cmd: echo 1 > first\n", "ddpm prepare\n", "/last\n"])
def test_plain_dvc_that_goes_on_with_half_a_file_ends_with_a_whole_one(kept: str, tmp_path: Path) -> None:
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        run(tmp_path, *command)
    shutil.copy(ROOT / "recipes" / "smoke.yaml", tmp_path / "params.yaml")
    (tmp_path / "dvc.yaml").write_text(DVC.replace("PYTHON", sys.executable))
    repro = (sys.executable, "-m", "dvc", "repro")
    run(tmp_path, *repro)
    whole = (tmp_path / "dvc.lock").read_text()
    lock_mending.check(tmp_path, pytest.fail)
    (tmp_path / "dvc.lock").write_text(whole[: whole.index(kept) + len(kept)] if kept in whole else whole[:-60])
    shutil.rmtree(tmp_path / ".dvc" / "cache" / "runs")
    done = subprocess.run(repro, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dvc.lock").read_text() == whole
    assert ("mended" in done.stdout) == ("/last" not in kept), done.stdout
