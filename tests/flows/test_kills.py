"""Kills `dvc repro` and the flow many times, at seeded random moments of the whole pipeline (docs/faults.md).

After each kill the same command starts again, as a user would start it. In the end the outputs, dvc.lock and MLflow must
equal those of an undisturbed run. KILLS=16 in the environment shortens the campaign, and KILLS_SEED=1 draws other moments.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import parameters

KILLS = int(os.environ.get("KILLS", "64"))  # for both commands together
SEED = int(os.environ.get("KILLS_SEED", "0"))
MOST = 5  # the most kills in one checkout
# the most runs in one checkout that may fail by themselves, for instance if they meet a process that is about to end
RUNS = 3
SET = ["training.steps=120", "compute.checkpoint_every=10", "sweep.samplers=[ddim]", "sweep.steps=[2]"]
COMMANDS = {
    "dvc repro": (str(Path(sys.executable).with_name("dvc")), "repro"),
    "the flow": (sys.executable, "-m", "flows"),
}
KINDS = {
    "dvc repro": ("stage", "dvc", "group", "SIGTERM", "SIGINT", "STOP"),
    "the flow": ("stage", "dvc", "group", "flow", "server", "SIGTERM", "SIGINT", "STOP"),
}
VERBS = {"prepare", "probe", "train", "likelihood", "sample", "evaluate", "report"}
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(4 * 3600)]


LOCAL = ("run.json", "run.js")  # records of this folder and its MLflow, which are no outputs of DVC


@dataclass
class Result:
    """The results of a run.

    Args:
        lock: the content of dvc.lock.
        outputs: the checksum of each output.
        metrics: MLflow's metrics (run, key, step).
        models: the number of registered versions.
    """

    lock: bytes
    outputs: dict[str, str]
    metrics: set[tuple[str, ...]]
    models: int

    @classmethod
    def of(cls, root: Path) -> Result:
        outputs = {
            path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for folder in ("dataset", "models", "snapshots", "samples", "metrics", "report")
            for path in (root / folder).rglob("*")
            if path.is_file() and not path.name.endswith(LOCAL) and not path.name.startswith(".")
        }
        with closing(sqlite3.connect(root / "mlflow.db")) as database:
            rows = "select name, key, step from metrics join runs using (run_uuid) where lifecycle_stage = 'active'"
            found = Counter(tuple(map(str, row)) for row in database.execute(rows))
            (models,) = database.execute("select count(*) from model_versions").fetchone()
        assert set(found.values()) == {1}, found.most_common(3)
        # System metrics are sampled by the clock. images_per_second says how fast a process was, so a process that runs only
        # the end of a training has none.
        metrics = {row for row in found if not row[1].startswith("system/") and row[1] != "images_per_second"}
        return cls((root / "dvc.lock").read_bytes(), outputs, metrics, models)


@dataclass
class Kill:
    """A kill. kind: one of KINDS. victim: the process that was hit. moment: the wait, as a fraction of an undisturbed run."""

    kind: str
    victim: str
    moment: float


def words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error, FileNotFoundError):  # the process has ended in the meantime
        return " ".join(process.cmdline()).split()
    return []


def named(clone: Any, kind: str, command: psutil.Process) -> list[psutil.Process]:
    """Returns the running processes of one kind: stages, DVC, the embedded server, or the command itself."""
    tests: dict[str, Callable[[list[str]], bool]] = {
        "stage": lambda said: len(said) > 1 and said[-1] in VERBS and "ddpm" in said[-2],
        "dvc": lambda said: "repro" in said,
        "server": lambda said: "flows.servers.embedded" in said,
    }
    if kind not in tests:
        return [command]
    return [process for process in clone.processes() if tests[kind](words(process))]


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def strike(clone: Any, kind: str, command: subprocess.Popen[str], chance: random.Random) -> str:
    """Kills, interrupts or pauses processes as `kind` says, and returns the name of the victim.

    A process of that kind may be about to start. If none starts within five seconds, the command is killed.
    """
    top = psutil.Process(command.pid)
    if kind == "SIGINT":  # Ctrl-C goes to the whole process group
        os.killpg(command.pid, signal.SIGINT)
        return "the command's group"
    if kind == "SIGTERM":
        send([top], signal.SIGTERM)
        return "the command"
    if kind == "STOP":
        stopped = clone.processes() if chance.random() < 0.5 else [chance.choice(clone.processes())]
        send(stopped, signal.SIGSTOP)
        time.sleep(chance.uniform(2, 8))
        send(stopped, signal.SIGCONT)
        return f"{len(stopped)} processes"
    deadline, found = time.monotonic() + 5, []
    while not found and time.monotonic() < deadline and command.poll() is None:
        found = named(clone, "stage" if kind == "group" else kind, top)
    if not found:
        send([top], signal.SIGKILL)
        return "the command"
    victim = chance.choice(found)
    name = " ".join(words(victim)[-2:])
    if kind == "group":
        with suppress(ProcessLookupError):
            os.killpg(os.getpgid(victim.pid), signal.SIGKILL)
    else:
        send([victim], signal.SIGKILL)
    return name


def logs(clone: Any) -> str:
    files = sorted(clone.root.glob("log-*"))
    return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in files[-3:])


class Campaign:
    """The kills of one command, spread over several checkouts."""

    def __init__(self, command: str, make: Callable[[], Any], kills: int) -> None:
        self.command, self.make, self.kills = command, make, kills
        self.chance = random.Random(f"{SEED} {command}")
        self.hits: list[Kill] = []
        self.lives, self.failed = 0, 0
        clone = make()
        try:
            began = time.monotonic()
            assert self.start(clone).wait(1200) == 0, logs(clone)
            self.seconds = time.monotonic() - began
            self.expected = self.settled(clone)
        finally:
            clone.end()

    def start(self, clone: Any) -> subprocess.Popen[str]:
        log = f"log-{time.monotonic_ns()}"
        process: subprocess.Popen[str] = clone.start(*COMMANDS[self.command], log=log)
        return process

    def settled(self, clone: Any) -> Result:
        clone.wait(lambda: not clone.running(), 60, "nothing is left running")
        assert "Running stage" not in clone.repro()  # so the outputs are those that dvc.lock names
        return Result.of(clone.root)

    def life(self) -> None:
        """Kills the runs in one checkout up to MOST times, lets the last run end, and compares the results."""
        clone, before, failed = self.make(), len(self.hits), 0
        self.lives += 1
        try:
            command = self.start(clone)
            while True:
                if self.killed(clone, command, before):
                    command = self.start(clone)
                elif command.wait(1200) == 0:
                    break
                else:
                    failed += 1
                    assert failed <= RUNS, logs(clone)
                    command = self.start(clone)
            self.failed += failed
            left, expected = self.settled(clone), self.expected
            assert left.outputs == expected.outputs, logs(clone)
            assert left.lock == expected.lock
            assert left.metrics == expected.metrics, (left.metrics - expected.metrics, expected.metrics - left.metrics)
            assert left.models == expected.models
            with closing(sqlite3.connect(clone.root / "mlflow.db")) as database:
                assert not database.execute("select name from runs where status = 'RUNNING'").fetchall()
        finally:
            clone.end()

    def killed(self, clone: Any, command: subprocess.Popen[str], before: int) -> bool:
        """Waits for the next moment and kills. Returns whether the command must be started again."""
        while len(self.hits) < min(self.kills, before + MOST):
            left = self.seconds / (1 + 0.5 * (len(self.hits) - before))  # a repeated run skips finished work
            moment = self.chance.uniform(0, left)
            with suppress(subprocess.TimeoutExpired):
                command.wait(moment)
                return False  # the command ended before the kill
            kind = KINDS[self.command][len(self.hits) % len(KINDS[self.command])]
            self.hits.append(Kill(kind, strike(clone, kind, command, self.chance), moment / self.seconds))
            if kind in ("flow", "SIGTERM", "SIGINT"):
                command.wait(300)
                return True
            with suppress(subprocess.TimeoutExpired):  # the flow continues by itself after the kill of a stage
                return command.wait(5) != 0
        return False


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_is_killed_the_same_command_ends_the_same(
    name: str, clone_maker: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []

    def make() -> Any:
        made.append(tmp_path / str(len(made)))
        clone = clone_maker(made[-1])
        parameters.write(clone.root, "smoke", SET)
        return clone

    began = time.monotonic()
    campaign = Campaign(name, make, KILLS // len(COMMANDS))
    try:
        while len(campaign.hits) < campaign.kills:
            campaign.life()
    finally:
        with capsys.disabled():
            print(
                f"\n{name}: {len(campaign.hits)} kills in {campaign.lives} checkouts, {time.monotonic() - began:.0f} s;"
                f" undisturbed {campaign.seconds:.0f} s; runs that failed by themselves: {campaign.failed}"
            )
            for kind, count in Counter(kill.kind for kill in campaign.hits).items():
                hits = [f"{kill.victim} at {kill.moment:.0%}" for kill in campaign.hits if kill.kind == kind]
                print(f"  {kind} x {count}: {', '.join(hits)}")
