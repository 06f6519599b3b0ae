"""Checks that dvc.lock is replaced atomically, with the bytes that DVC itself would write."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import dvc.utils.serialize._yaml as serialize
import pytest

from ddpm.errors import InputError
from ddpm.provenance import atomic_lock
from flows.repro import dag

LOCK = Path(__file__).parents[2] / "dvc.lock"
DEPENDENCY = OrderedDict(path="a", hash="md5", md5="0" * 32, size=1)
# Values that parameters may have and that YAML writes in many ways.
VALUES = (
    None,
    True,
    1e-5,
    1e300,
    "",
    "null",
    "1e3",
    "a: b",
    "a\nb",
    "'a'",
    '"a"',
    " a ",
    "é",
    "😀",
    "a" * 200,
    "a " * 99,
)
VALUES += ([], {}, [[1], [2, None]], {"a": [{"b": 1}]})  # type: ignore[assignment]
STAGE = OrderedDict(cmd="x", deps=[DEPENDENCY, dict(DEPENDENCY)], params={"params.yaml": dict(enumerate(VALUES))})


def into(text: str, name: str, stage: Any, tmp_path: Path) -> tuple[bytes, bytes, int]:
    """Adds a stage to a dvc.lock. Returns DVC's result, our result, and the number of stages that our code serialised."""
    theirs, ours = tmp_path / "theirs" / atomic_lock.NAME, tmp_path / "ours" / atomic_lock.NAME
    dumped: list[str] = []

    def dump(data: Any, stream: Any) -> None:
        dumped.extend(data["stages"])
        serialize._dump(data, stream)

    for path in (theirs, ours):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with serialize.modify_yaml(theirs) as data:
        data["stages"].update({name: stage})
    with atomic_lock.changed(ours, serialize.parse_yaml, dump) as data:
        data["stages"].update({name: stage})
    return theirs.read_bytes(), ours.read_bytes(), len(dumped)


def test_it_is_what_dvc_writes(tmp_path: Path) -> None:
    theirs, ours, written = into(LOCK.read_text(), "train@linear", STAGE, tmp_path)
    assert ours == theirs != LOCK.read_bytes()
    assert written == 1
    text = f"{LOCK.read_text().partition('  sample@')[0]}"
    for name in ("a new one", "'", "prepare"):  # YAML writes the second name in quotes
        theirs, ours, _ = into(text, name, STAGE, tmp_path)
        assert ours == theirs != text.encode(), name
        text = ours.decode()


def test_what_dvc_did_not_write_is_written_anew(tmp_path: Path) -> None:
    for text in ("schema: '2.0'\nstages:\n    a: {cmd: x}\n    b: {cmd: y}\n", "stages:\n  a:\n    cmd: x\n"):
        _, ours, written = into(text, "b", STAGE, tmp_path)
        assert written == 2
        assert serialize.loads_yaml(ours)["stages"] == serialize.loads_yaml(text)["stages"] | {
            "b": serialize.loads_yaml(serialize.dumps_yaml(STAGE))
        }


def test_the_dvc_of_this_environment_mends_and_writes_the_file_at_once(tmp_path: Path) -> None:
    """`make` and the Dockerfile put ddpm.tools.dvc.main() into DVC's console script."""
    own = str(Path(sys.executable).with_name("dvc"))
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  a: {cmd: echo 1 > a, outs: [a]}\n  b: {cmd: echo 1 > b, outs: [b]}\n"
    )
    (tmp_path / ".cache").mkdir()
    for command in (["init", "--no-scm", "--quiet"], ["repro"]):
        subprocess.run([own, *command], cwd=tmp_path, check=True, capture_output=True)
    lock = tmp_path / atomic_lock.NAME
    whole, before = lock.read_text(), tmp_path / "before"
    before.hardlink_to(lock)
    subprocess.run([own, "repro", "--force"], cwd=tmp_path, check=True, capture_output=True)
    assert not before.samefile(lock)  # the file was replaced, so no reader saw it empty
    lock.write_text(whole[:-40])
    done = subprocess.run([own, "repro"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert lock.read_text() == whole and "dvc.lock: mended" in done.stderr
    assert "Running stage" not in done.stdout


def test_a_name_that_leads_out_of_the_checkout_deletes_nothing(copied: Any) -> None:
    """DVC removes the outputs of a stage before the stage itself can refuse. So the name must be refused earlier."""
    own = str(Path(sys.executable).with_name("dvc"))
    victim = copied.root.parent / "victim-2.npz"
    copied.edit("  samplers: [ddpm, ddim]", "  samplers: [y/../../../victim]")
    copied.edit("samplers:\n", "samplers:\n  y/../../../victim: {sampler: ddim}\n")
    (copied.root / ".cache" / "inception").unlink()
    (copied.root / ".cache").rmdir()  # a new clone has no .cache
    hostile = "sample@cosine-y/../../../victim-2"
    for command in (["repro"], ["repro", "-s", hostile], ["--cd", ".", "repro", "-s", hostile], ["-q", "exp", "run"]):
        victim.write_text("needed")
        done = copied.run(own, *command)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "samplers" in done.stderr and "victim" in done.stderr
        assert victim.read_text() == "needed"


def test_a_name_that_dvc_takes_from_an_old_params_file_is_asked_for_in_one_line(copied: Any) -> None:
    copied.edit("  kind: unet\n", "")
    done = copied.run(str(Path(sys.executable).with_name("dvc")), "repro")
    line = "dvc: params.yaml lacks network.kind, which dvc.yaml needs; write `kind: unet` below network\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_a_kill_leaves_the_old_one(tmp_path: Path) -> None:
    """The kernel kills the writing process in the middle, because its files may not exceed a size limit."""
    shutil.copy(LOCK, tmp_path)
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        with atomic_lock.changed(tmp_path / atomic_lock.NAME, serialize.parse_yaml, serialize._dump) as data:
            data["stages"]["report"] = STAGE
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGXFSZ
    assert (tmp_path / atomic_lock.NAME).read_bytes() == LOCK.read_bytes()


def test_a_flow_goes_on_from_one_that_is_whole(scratch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvc repro` of plain DVC does not write atomically, so a kill leaves only the beginning of dvc.lock."""
    monkeypatch.setenv("PREFECT_HOME", str(scratch.root / ".prefect"))
    from flows.repro.checkout_lock import alone

    path = scratch.root / atomic_lock.NAME
    scratch.repro()
    whole = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"dvc\.lock: cut off.* delete it"), alone(scratch.root):
        pass
    path.write_bytes(whole)
    with alone(scratch.root):
        assert path.read_bytes() == whole
    said: list[str] = []
    for left in (0, 30, 1000):
        path.write_bytes(whole[:left])
        with watching(said), alone(scratch.root):
            assert path.read_bytes() == whole
            assert set(scratch.names) == dag.read(scratch.root).unchanged
    assert len(said) == 3 and all("mended" in line for line in said)


@contextmanager
def watching(said: list[str]) -> Iterator[None]:
    from flows.watch import Watcher, watcher

    token = watcher.set(cast(Watcher, SimpleNamespace(line=lambda stage, text: said.append(text))))
    yield
    watcher.reset(token)
