"""Kills real servers and trainings, and checks what is left and how the next run continues (docs/faults.md)."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

SET = ("training.steps=300", "compute.checkpoint_every=20", "sweep.samplers=[ddim]", "sweep.steps=[2]")
MAIN = (sys.executable, "-m", "flows", "--recipe", "smoke", *(word for value in SET for word in ("-S", value)))
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]


@pytest.fixture
def clone(tmp_path: Path, clone_maker: Callable[[Path], Any]) -> Iterator[Any]:
    made = clone_maker(tmp_path / "clone")
    yield made
    made.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, clone_maker: Callable[[Path], Any]) -> Iterator[bytes]:
    """Returns the dvc.lock of an undisturbed run. It holds the hashes of all outputs, such as the weights."""
    made = clone_maker(tmp_path_factory.mktemp("undisturbed"))
    done = made.run(*MAIN)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    yield (made.root / "dvc.lock").read_bytes()
    made.end()


def words(process: psutil.Process) -> list[str]:
    """Returns the words of a process's command line. In a fork, this line is the title of its task, padded with empty words."""
    return " ".join(process.cmdline()).split()


def training(clone: Any, pid: int | None = None) -> psutil.Process:
    """Returns the training process, once it has saved a state. Ignores the process `pid`."""

    def found() -> psutil.Process | None:
        for process in clone.processes():
            with suppress(psutil.Error, FileNotFoundError):  # the process has ended in the meantime
                if words(process)[-2:] == ["ddpm", "train"] and process.pid != pid:
                    files = [path for path in (clone.root / ".cache" / "training").rglob("*") if path.is_file()]
                    if max((path.stat().st_mtime for path in files), default=0.0) > process.create_time() + 1:
                        return process
        return None

    return clone.wait(found, 200, "a training has saved its state")


def dvc_of(process: psutil.Process) -> psutil.Process:
    return next(parent for parent in process.parents() if "repro" in words(parent))


def open_in_mlflow(clone: Any) -> list[str]:
    with closing(sqlite3.connect(clone.root / "mlflow.db")) as database:
        return [name for (name,) in database.execute("select name from runs where status = 'RUNNING'")]


def open_in_prefect(clone: Any) -> list[str]:
    with closing(sqlite3.connect(clone.root / ".prefect" / "prefect.db")) as database:
        where = "where state_type in ('RUNNING', 'PENDING', 'CANCELLING')"
        return [
            name
            for table in ("flow_run", "task_run")
            for (name,) in database.execute(f"select name from {table} {where}")
        ]


def test_kills_of_stage_dvc_and_flow_change_no_bit(clone: Any, undisturbed: bytes) -> None:
    flow = clone.start(*MAIN, log="first")
    stage = training(clone)
    for name in ("a stage", "DVC"):
        began = time.monotonic()
        (stage if name == "a stage" else dvc_of(stage)).kill()
        stage = training(clone, stage.pid)  # the flow runs the stage again by itself
        print(f"kill -9 of {name}: it trains again, and has saved a state, after {time.monotonic() - began:.1f} s")
    clone.wait(lambda: open_in_mlflow(clone) == ["cosine"], 100, "MLflow shows the training")
    flow.kill()
    flow.wait()
    began = time.monotonic()
    clone.wait(lambda: not clone.running(), 20, "all that the flow started ends")
    print(f"kill -9 of the flow: nothing left after {time.monotonic() - began:.1f} s")
    assert open_in_prefect(clone)  # the next run must end these runs
    done = clone.run(*MAIN)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert (clone.root / "dvc.lock").read_bytes() == undisturbed
    assert not open_in_mlflow(clone)
    assert not open_in_prefect(clone)
    assert "Running stage" not in clone.repro()


def test_a_kill_of_the_worker_changes_no_bit(clone: Any, undisturbed: bytes, up_starter: Callable[[Any], Any]) -> None:
    """`make up` ends with its worker. After a new `make up`, another run of the deployment continues the work."""
    parameters = {"recipe": "smoke", "overrides": list(SET)}
    up = up_starter(clone)
    run = up.start(**parameters)
    training(clone)
    worker = next(
        process
        for process in psutil.Process(up.process.pid).children(recursive=True)
        if {"worker", "start"} <= set(process.cmdline())
    )
    worker.kill()
    began = time.monotonic()
    assert up.process.wait(60) != 0
    clone.wait(lambda: not clone.running(), 30, "nothing is left running")
    print(f"kill -9 of the worker: nothing left after {time.monotonic() - began:.1f} s")
    up = up_starter(clone)
    assert up.get(f"/flow_runs/{run}")["state"]["type"] in ("CRASHED", "CANCELLED")
    assert not up.open_runs()
    again = up.start(**parameters)
    ended = lambda: up.get(f"/flow_runs/{again}")["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")  # noqa: E731
    clone.wait(ended, 400, "the second run ends")
    assert up.get(f"/flow_runs/{again}")["state"]["name"] == "Completed"
    assert (clone.root / "dvc.lock").read_bytes() == undisturbed
    clone.wait(lambda: not up.open_runs(), 20, "no run is left open")
    assert not open_in_mlflow(clone)


def test_mlflow_dies_while_it_trains(clone: Any, undisturbed: bytes) -> None:
    """The flow reports the dead server and keeps the work. Once the server is back, the next run publishes everything."""
    port = clone.free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    off = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    address = f"http://127.0.0.1:{port}"
    server = clone.start(*command, log="mlflow.log", **off)
    clone.wait(lambda: _answers(f"{address}/health"), 200, "MLflow answers")
    flow = clone.start(*MAIN, log="flow.log", MLFLOW_TRACKING_URI=address)
    training(clone)
    os.killpg(server.pid, signal.SIGKILL)
    assert flow.wait(500) == 1
    said = (clone.root / "flow.log").read_text()
    assert "cannot be reached; publish later with `ddpm publish` (all stages are done and kept)" in said
    assert (clone.root / "dvc.lock").read_bytes() == undisturbed
    clone.start(*command, log="mlflow.log", **off)
    clone.wait(lambda: _answers(f"{address}/health"), 200, "MLflow answers again")
    done = clone.run(*MAIN, MLFLOW_TRACKING_URI=address)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "is the first champion" in done.stdout
    assert not open_in_mlflow(clone)
    with closing(sqlite3.connect(clone.root / "mlflow.db")) as database:
        twice = "select key, step, count(*) from metrics group by run_uuid, key, step having count(*) > 1"
        assert not database.execute(twice).fetchall()
        (losses,) = database.execute("select count(*) from metrics where key = 'loss'").fetchone()
        (scores,) = database.execute("select count(*) from metrics where key = 'fid'").fetchone()
    rows = (clone.root / "metrics" / "train" / "cosine.csv").read_text().splitlines()
    assert losses == sum(bool(row.split(",")[1]) for row in rows[1:])
    assert scores == 1
    assert "nothing to add" in clone.run("ddpm", "publish", MLFLOW_TRACKING_URI=address).stdout


def test_prefect_is_away_for_a_minute(scratch: Any) -> None:
    """The API dies while a stage runs, and comes back later. The flow completes, and the API records that."""
    port = scratch.free_port()
    api = f"http://127.0.0.1:{port}/api"
    toml = scratch.root / "prefect.toml"
    toml.write_text(toml.read_text().replace(":4200/", f":{port}/"))
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = scratch.start(*command, log="server.log")
    scratch.wait(lambda: _answers(f"{api}/health"), 300, "Prefect answers")
    scratch.control(train_linear={"until": "go"})
    code = (
        "from flows.train_eval import train_eval\n"
        "state = train_eval(promote=False, return_state=True); print(f'{state.name}: {state.message}')"
    )
    flow = scratch.start(sys.executable, "-c", code, log="flow.log")
    scratch.pid("train@linear", 200)
    os.killpg(server.pid, signal.SIGKILL)
    time.sleep(5)
    (scratch.root / "go").touch()  # stages end and begin while the API is down
    time.sleep(55)
    assert flow.poll() is None or (scratch.root / "flow.log").read_text().splitlines()[-1].startswith("Completed")
    scratch.start(*command, log="server.log")
    scratch.wait(lambda: _answers(f"{api}/health"), 300, "Prefect answers again")
    assert flow.wait(200) == 0, (scratch.root / "flow.log").read_text()[-3000:]
    assert (scratch.root / "flow.log").read_text().splitlines()[-1].startswith("Completed")
    assert "Running stage" not in scratch.repro()
    assert scratch.run(sys.executable, "-c", code).returncode == 0
    with closing(sqlite3.connect(scratch.root / ".prefect" / "prefect.db")) as database:
        assert database.execute("select state_name from flow_run").fetchall() == [("Completed",), ("Completed",)]
    scratch.wait(lambda: not open_in_prefect(scratch), 30, "the next run ends the task runs whose end Prefect missed")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, subprocess.SubprocessError):
        return False
