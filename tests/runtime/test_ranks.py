"""Checks that `ddpm train` on two processes of one machine, or on two hosts by torchrun, trains as on one process.

In float32, the two orders of summation differ by 1e-7 of a gradient, which Adam may turn into 1e-6 of a weight. After 60
steps the measured difference was 7e-7 of the weights' norm and 2e-7 of the losses. Another batch, mask or noise moves the
losses by 1e-2 or more. A training may also resume with the other number of processes.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from ddpm.files.params import Params
from ddpm.stages.train import train

pytestmark = pytest.mark.proof
ROOT = Path(__file__).parents[2]
Start = Callable[..., subprocess.Popen[str]]


def write(root: Path, params: Params, processes: int) -> None:
    raw = params.to_json()
    YAML().dump({**raw, "compute": {**raw["compute"], "processes": processes}}, root / "params.yaml")


@pytest.fixture
def start(root: Path, empty_database: Path) -> Iterator[Start]:
    """Returns a function that starts a program in a root, by default `ddpm train cosine`.

    Fails if a process is left at the end.
    """
    started = []
    store = shutil.copyfile(empty_database, root / "mlflow.db")

    def begin(*command: str, at: Path = root, **variables: str) -> subprocess.Popen[str]:
        command = command or (sys.executable, "-m", "ddpm", "train", "cosine")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{store}"}
        environment |= {"OMP_NUM_THREADS": "1", "RANKS_OF": str(root), **variables}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=at, env=environment, **pipes))
        return started[-1]

    yield begin
    end = time.monotonic() + 20
    while living(root) and time.monotonic() < end:
        time.sleep(0.1)
    left = living(root)
    for process in left:
        process.kill()
    assert not left


def living(root: Path) -> list[psutil.Process]:
    """Returns every living process that was started for this root, in any session."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RANKS_OF") == str(root) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=200)
    assert process.returncode == code, said
    return said


def states(root: Path) -> list[int]:
    return sorted(int(path.stem) for path in root.glob(".cache/training/*/*.safetensors"))


def after(root: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until the state of this step or of a later one is saved."""
    end = time.monotonic() + 120
    while max(states(root), default=0) < step:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def results(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss curve, and all weights."""
    with (root / "metrics/train/cosine.csv").open() as file:
        rows = [[float(row["loss"]), float(row["validation_loss"] or 0)] for row in csv.DictReader(file)]
    weights = load_file(root / "models/cosine/model.safetensors")
    return torch.tensor(rows), torch.cat([weights[name].flatten() for name in sorted(weights)])


def assert_same(root: Path, other: Path) -> None:
    (curve, weights), (other_curve, other_weights) = results(root), results(other)
    torch.testing.assert_close(curve, other_curve, rtol=1e-4, atol=0)
    assert (weights - other_weights).norm() < 1e-4 * weights.norm()
    names = [
        sorted(path.relative_to(each).as_posix() for path in (each / "metrics").rglob("*")) for each in (root, other)
    ]
    assert names[0] == names[1]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def params(smoke: Callable[..., Params]) -> Params:
    training = {"steps": 200, "log_every": 20, "validate_every": 50}
    return smoke(training=training, network={"dropout": 0.1}, compute={"checkpoint_every": 10})


@pytest.fixture(scope="module")
def alone(digits: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a root with an undisturbed training on one process."""
    root = tmp_path_factory.mktemp("alone")
    (root / "dataset").symlink_to(digits / "dataset")
    train(params, "cosine", root)
    return root


def test_two_processes_then_one_then_two(root: Path, params: Params, start: Start, alone: Path) -> None:
    for processes, step, number in ((2, 30, signal.SIGTERM), (1, 80, signal.SIGTERM), (2, 130, signal.SIGINT)):
        write(root, params, processes)
        process = start()
        after(root, step, process)
        process.send_signal(number)
        said = ended(process, 128 + number)
        assert said.splitlines()[-1].startswith(
            "ddpm: train cosine: stopped by a signal; the next run resumes after step "
        ), said
        assert said.count("stopped") == 1 and str(states(root)[-1]) in said.splitlines()[-1]
        assert not (root / "models").exists() and not living(root)
    assert "resuming after step" in ended(start())
    assert_same(root, alone)


def test_a_killed_process_ends_all_and_the_next_run_goes_on(
    root: Path, params: Params, start: Start, alone: Path
) -> None:
    write(root, params, 2)
    for victim in (0, 1):
        process = start()
        after(root, max(states(root), default=0) + 10, process)
        ranks = {item.environ().get("RANK"): item for item in psutil.Process(process.pid).children(recursive=True)}
        ranks[str(victim)].kill()
        said = ended(process, 137)
        assert said.splitlines()[-1].startswith(f"ddpm: process {victim} of the training was killed by signal 9"), said
        assert not living(root)
    process = start()
    after(root, states(root)[-1] + 10, process)
    sockets = [socket for item in living(root) for socket in item.net_connections("inet")]
    assert sockets and {socket.laddr.ip for socket in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    process.kill()  # this kills the launcher, so the processes must notice that by themselves
    ended(process, -9)
    end = time.monotonic() + 20
    while living(root) and time.monotonic() < end:
        time.sleep(0.1)
    assert not living(root) and not (root / "models").exists()  # the processes ended before the training was complete
    ended(start())
    assert_same(root, alone)


def test_two_hosts_that_share_no_disk(root: Path, params: Params, start: Start, alone: Path) -> None:
    """Two folders with a dataset each stand for the hosts. Only the first folder gets states and outputs."""
    second = root / "second"
    second.mkdir()
    (second / "dataset").symlink_to((root / "dataset").resolve())
    for where in (root, second):
        write(where, params, 1)

    def both() -> list[subprocess.Popen[str]]:
        port, rank = free_port(), (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1")
        return [
            start(
                *rank,
                f"--node-rank={number}",
                "--master-addr=127.0.0.1",
                f"--master-port={port}",
                "-m",
                "ddpm",
                "train",
                "cosine",
                at=where,
            )
            for number, where in enumerate((root, second))
        ]

    processes = both()
    after(root, 40, processes[0])
    processes[1].terminate()  # one host is taken away: all processes stop, and the first one saves the state
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode for process in processes)
    assert states(root) and not states(second)
    assert f"stopped by a signal; the next run resumes after step {states(root)[-1]} of 200" in said[0], said[0]
    for process in both():
        ended(process)
    assert_same(root, alone)
    assert not (second / "models").exists()
    assert not list(second.rglob("*.csv"))


def test_what_cannot_be_is_one_line(root: Path, params: Params, start: Start, smoke: Callable[..., Params]) -> None:
    write(root, smoke(training={"learning_rate": 1e30, "log_every": 1, "warmup": 0}), 2)
    said = ended(start(), 2)
    assert said.count("the loss is") == 1 and "Traceback" not in said
    write(root, params, 3)
    assert "32 images at once do not divide among 3 processes" in ended(start(), 2)
    other = root / "other"
    other.mkdir()
    (other / "dataset").symlink_to((root / "dataset").resolve())
    write(root, params, 1)
    write(other, params.model_copy(update={"seed": 1}), 1)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for process in [start(RANK="0", **world), start(RANK="1", at=other, **world)]:
        assert "the processes of this training have different data, parameters or code" in ended(process, 2)


def test_hosts_whose_images_differ_are_told_apart_by_bytes(root: Path, params: Params, start: Start) -> None:
    """Both dataset.json files are the same."""
    other = root / "other"
    other.mkdir()
    shutil.copytree(root / "dataset", other / "dataset")
    with (other / "dataset" / "train.npy").open("r+b") as file:
        file.seek(500)
        file.write(b"\xee")
    for where in (root, other):
        write(where, params, 1)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first, second = start(RANK="0", **world), start(RANK="1", at=other, **world)
    assert "another process cannot read its dataset" in ended(first, 2)
    assert "train.npy: its bytes are not those that dataset.json describes" in ended(second, 2)
