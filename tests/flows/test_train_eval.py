"""Checks the flow `train-eval`: on the servers of `make up`, through its deployment, and in a process of its own."""

from __future__ import annotations

import json
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parent.parent.parent
PREFECT = (sys.executable, "-m", "prefect")
RUN = (*PREFECT, "deployment", "run", "train-eval/default")
pytestmark = pytest.mark.timeout(400)


def test_a_deployment_run_does_it_all(up: Any) -> None:
    done = up.scratch.run(
        *RUN, "--watch", "--param", 'overrides=["training.steps=7", "seed=3"]', "--param", "recipe=more"
    )
    assert done.returncode == 0, done.stdout + up.log.read_text()[-3000:]
    run = up.flow_run()
    assert run["state"]["name"] == "Completed"
    assert run["state"]["message"] == "promote: done by a stand-in"
    shown = done.stdout + done.stderr
    assert "best: linear-ddim-10, FID 1.5 (1.4 to 1.6)" in shown and "report: report/index.html" in shown, shown
    assert up.states(run["id"]) == dict.fromkeys((*up.scratch.names, "publish", "promote"), "Completed")
    params = (up.scratch.root / "params.yaml").read_text()
    assert "steps: 7" in params
    assert "seed: 3" in params

    # The page of the run shows the dependencies between stages.
    tasks = up.tasks(run["id"])
    before = [item["id"] for item in tasks["sample@linear"]["task_inputs"]["wait_for"]]
    assert before == [tasks["train@linear"]["id"]]

    # The lines of a stage are in the log of its task run.
    logs = up.scratch.wait(
        lambda: [
            line["message"]
            for line in up.post("/logs/filter", logs={"task_run_id": {"any_": [tasks["train@linear"]["id"]]}})
            if "began" in line["message"]
        ],
        20,
        "the log arrives",
    )
    assert logs == ["train@linear: began"]

    artifacts = {item["key"]: item for item in up.post("/artifacts/filter")}
    bars = {key: item["data"] for key, item in artifacts.items() if item["type"] == "progress"}
    assert bars == dict.fromkeys(("stages", *(name.replace("@", "-") for name in up.scratch.names)), 100.0)
    assert artifacts["stages"]["description"] == "stages: 6 of 6 stages"
    assert artifacts["train-linear"]["task_run_id"] == tasks["train@linear"]["id"]
    assert artifacts["champion"]["data"] == "done by a stand-in"
    assert json.loads(artifacts["sweep"]["data"])[0]["point"] == "linear-ddim-10"
    assert f"http://127.0.0.1:{up.ports['MLFLOW_PORT']}" in artifacts["mlflow"]["data"]

    assert "Running stage" not in up.scratch.repro()
    again = up.scratch.run(*RUN, "--watch")  # no stage has to run
    assert "best: linear-ddim-10, FID 1.5" in again.stdout + again.stderr


def test_the_page_of_a_run_shows_its_end_and_its_artifacts(up: Any, page: Any, shoot: Any) -> None:
    address = f"http://127.0.0.1:{up.ports['PREFECT_PORT']}/runs/flow-run/{up.flow_run()['id']}"
    page.goto(address)
    page.get_by_text("Completed", exact=True).first.wait_for()
    shoot(page, "prefect-run")
    page.get_by_text("Artifacts", exact=True).first.click()
    for key in ("champion", "sweep", "mlflow"):
        page.get_by_text(key, exact=True).first.wait_for()
    shoot(page, "prefect-artifacts")


def test_mlflow_answers(up: Any) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{up.ports['MLFLOW_PORT']}/health", timeout=10) as answer:
        assert answer.status == 200


@pytest.mark.proof
def test_what_dvc_has_done_the_flow_skips(up: Any) -> None:
    assert up.scratch.run(*up.FLOW, json.dumps({"promote": False})).returncode == 0
    assert up.scratch.run(*up.FLOW, json.dumps({"overrides": ["training.steps=8"], "promote": False})).returncode == 0
    states = up.states(up.flow_run()["id"])
    assert states["train@linear"] == "Completed"
    assert states["prepare"] == "Unchanged"
    assert "promote" not in states
    up.scratch.repro()
    done = up.scratch.run(*up.FLOW, "{}")
    states = up.states(up.flow_run()["id"])
    assert {name: states[name] for name in up.scratch.names} == dict.fromkeys(up.scratch.names, "Unchanged"), (
        done.stdout
    )


def test_a_failing_stage_fails_the_run_and_nothing_beside_it(up: Any) -> None:
    up.scratch.control(train_linear={"exit": 2})
    done = up.scratch.run(*up.FLOW, json.dumps({"overrides": ["training.steps=9"]}))
    up.scratch.control()
    assert done.stdout.splitlines()[-1] == (
        "Failed: train@linear: ddpm: train@linear can't (2 stages after it did not run)"
    )
    assert "Traceback" not in done.stdout + done.stderr
    states = up.states(up.flow_run()["id"])
    assert set(states) == {"prepare", "train@linear", "train@cosine", "sample@cosine", "publish"}
    assert (states["train@linear"], states["train@cosine"]) == ("Failed", "Completed")
    assert [run["run_count"] for name, run in up.tasks(up.flow_run()["id"]).items() if name == "train@linear"] == [1]


@pytest.mark.chaos
def test_a_killed_stage_is_run_again(up: Any) -> None:
    up.scratch.control(train_linear={"die": True})
    done = up.scratch.run(*up.FLOW, json.dumps({"overrides": ["training.steps=10"], "promote": False}))
    assert done.stdout.splitlines()[-1].startswith("Completed"), done.stdout + done.stderr
    assert up.tasks(up.flow_run()["id"])["train@linear"]["run_count"] == 2


@pytest.mark.chaos
def test_a_full_disk_fails_the_stage_until_there_is_room(up: Any, disk: Callable[[int], Path]) -> None:
    (disk(1) / "filler").write_bytes(bytes(2**20))
    (up.scratch.root / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {disk(1)}\n")
    try:
        flow = up.scratch.start(*up.FLOW, json.dumps({"overrides": ["training.steps=11"], "promote": False}))
        failed = "DVC found no room on the disk (No space left on device): free some space"
        up.scratch.wait(lambda: failed in (up.scratch.root / "log").read_text(), 60, "it says so")
        (disk(1) / "filler").unlink()
        assert flow.wait(120) == 0
        assert (up.scratch.root / "log").read_text().splitlines()[-1].startswith("Completed")
        assert "up to date" in up.scratch.run("dvc", "status").stdout
    finally:
        (up.scratch.root / ".dvc" / "config.local").unlink()


@pytest.mark.chaos
def test_an_mlflow_that_comes_back_gets_it_all(up: Any) -> None:
    (up.scratch.root / "away").write_text("once\n")
    done = up.scratch.run(*up.FLOW, json.dumps({"promote": False}))
    assert done.stdout.splitlines()[-1].startswith("Completed"), done.stdout + done.stderr
    assert up.tasks(up.flow_run()["id"])["publish"]["run_count"] == 2


@pytest.mark.chaos  # the flow retries for more than a minute before it gives up
def test_an_mlflow_that_stays_away_costs_no_work(up: Any) -> None:
    (up.scratch.root / "away").write_text("away\n" * 4)
    done = up.scratch.run(*up.FLOW, json.dumps({"overrides": ["training.steps=17"]}))
    assert done.stdout.splitlines()[-1] == (
        "Unpublished: publish: ddpm: MLflow at somewhere cannot be reached; publish later with `ddpm publish`"
        " (all stages are done and kept)"
    )
    assert up.flow_run()["state"]["type"] == "FAILED"
    assert "Running stage" not in up.scratch.repro()


def test_wrong_input_is_said_in_one_line(up: Any) -> None:
    before = (up.scratch.root / "params.yaml").read_bytes()
    done = up.scratch.run(*up.FLOW, json.dumps({"overrides": ["training.stops=1"]}))
    assert (
        done.stdout.splitlines()[-1] == "InputError: override 'training.stops=1': params.yaml has no 'training.stops'"
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert up.flow_run()["state"]["type"] == "FAILED"
    assert (up.scratch.root / "params.yaml").read_bytes() == before


@pytest.mark.proof
def test_a_second_run_waits_for_the_first(up: Any) -> None:
    up.scratch.control(train_linear={"until": "go"})
    up.scratch.forget("train@linear")
    first = up.scratch.start(*up.FLOW, json.dumps({"overrides": ["training.steps=51"], "promote": False}), log="first")
    up.scratch.pid("train@linear")
    second = up.scratch.start(
        *up.FLOW, json.dumps({"overrides": ["training.steps=52"], "promote": False}), log="second"
    )
    said = f"waiting: another run (process {first.pid}) is at work in this checkout"
    up.scratch.wait(lambda: said in (up.scratch.root / "second").read_text(), 60, "the second run says that it waits")
    assert "steps: 51" in (up.scratch.root / "params.yaml").read_text()
    (up.scratch.root / "go").touch()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    for log in ("first", "second"):
        assert (up.scratch.root / log).read_text().splitlines()[-1].startswith("Completed")
    assert "steps: 52" in (up.scratch.root / "params.yaml").read_text()
    up.scratch.control()
    assert "Running stage" not in up.scratch.repro()


NEVER = {"train_linear": {"until": "never"}, "train_cosine": {"until": "never"}}


@pytest.mark.chaos
@pytest.mark.parametrize("victim", ["flow", "dvc"])
def test_kill_9_leaves_no_process(up: Any, victim: str) -> None:
    up.scratch.control(**NEVER)
    servers = set(up.scratch.running())
    up.scratch.forget("train@linear")
    steps = {"flow": 13, "dvc": 14}[victim]
    flow = up.scratch.start(*up.FLOW, json.dumps({"overrides": [f"training.steps={steps}"]}), log="flow.log")
    stage = up.scratch.pid("train@linear")
    dvc = next(process for process in psutil.Process(stage).parents() if "dvc" in " ".join(process.cmdline()))
    if victim == "flow":
        flow.kill()
    else:
        up.scratch.forget("train@linear")
        dvc.kill()
        assert up.scratch.pid("train@linear") != stage  # the flow tries again
        assert not psutil.pid_exists(stage)  # but only after the stage of the killed DVC has ended
        flow.terminate()
    flow.wait(30)
    up.scratch.wait(lambda: set(up.scratch.running()) <= servers, 20, "all that the flow started ends")
    up.scratch.control()
    killed = up.flow_run()["id"]
    assert bool(up.open_runs()) == (victim == "flow")
    assert up.scratch.run(*up.FLOW, json.dumps({"promote": False})).returncode == 0  # so no lock is stuck
    up.scratch.wait(lambda: not up.open_runs(), 10, "neither a flow run nor a task run is left Running")
    if victim == "flow":
        assert up.get(f"/flow_runs/{killed}")["state"]["name"] == "Crashed"
        assert up.states(killed)["train@linear"] == "Crashed"
    assert "Running stage" not in up.scratch.repro()


REAP = """\
from prefect.client.orchestration import get_client
from flows.processes import crashed_runs
with get_client(sync_client=True) as client:
    crashed_runs._end_tasks(client, set())
    read = lambda: [run.id for run in crashed_runs._all(client.read_task_runs, flow_filter=crashed_runs.FLOW)]
    whole = read()
    crashed_runs.PAGE = 4
    assert len(whole) > 4 and read() == whole
"""


@pytest.mark.chaos
def test_a_task_run_whose_end_prefect_did_not_hear_is_ended_by_the_next_run(up: Any) -> None:
    """The API may be unreachable when a task run ends. The task run then stays Running in a flow run that is Completed."""
    assert up.scratch.run(*up.FLOW, json.dumps({"promote": False})).returncode == 0
    run = up.flow_run()["id"]
    task = up.tasks(run)["publish"]["id"]
    up.post(f"/task_runs/{task}/set_state", state={"type": "RUNNING", "name": "Running"}, force=True)
    assert up.states(run)["publish"] == "Running"
    up.post(f"/flow_runs/{run}/set_state", state={"type": "RUNNING", "name": "Running"}, force=True)
    # REAP passes an empty set of living flow runs, as if this run began after `reap` had read the set
    done = up.scratch.run(sys.executable, "-c", REAP)
    assert done.returncode == 0, done.stderr
    assert up.states(run)["publish"] == "Running"
    up.post(f"/flow_runs/{run}/set_state", state={"type": "COMPLETED", "name": "Completed"}, force=True)
    assert up.scratch.run(*up.FLOW, json.dumps({"promote": False})).returncode == 0
    assert up.states(run)["publish"] == "Completed"


def test_cancelling_ends_the_stages_within_ten_seconds(up: Any) -> None:
    """SIGTERM comes first, so that a training can save its state. SIGKILL ends a process that ignores SIGTERM."""
    up.scratch.control(train_linear={"until": "never", "saves": True}, train_cosine={"until": "never", "deaf": True})
    servers = set(up.scratch.running())
    up.scratch.forget("train@linear", "train@cosine")
    run = up.start(overrides=["training.steps=15"])
    up.injected.append("stopped with the flow")
    stages = [up.scratch.pid("train@linear"), up.scratch.pid("train@cosine")]
    assert up.scratch.run(*PREFECT, "flow-run", "cancel", run).returncode == 0
    up.scratch.wait(lambda: not any(psutil.pid_exists(stage) for stage in stages), 10, "the stages end")
    assert (up.scratch.root / "train@linear.saved").exists()
    up.scratch.wait(lambda: set(up.scratch.running()) <= servers, 60, "cancelling ends what the run started")
    up.scratch.wait(lambda: up.flow_run()["state"]["name"] == "Cancelled", 90, "the run is Cancelled")
    up.scratch.control()


@pytest.mark.chaos
def test_params_changed_meanwhile_are_never_what_dvc_recorded(up: Any) -> None:
    """DVC reads params.yaml after a stage has ended, so the stage fails. Stages that the edit does not concern are kept."""
    up.scratch.control(train_linear={"until": "edited"}, train_cosine={"until": "edited"})
    up.scratch.forget("train@linear", "train@cosine")
    flow = up.scratch.start(
        *up.FLOW, json.dumps({"overrides": ["training.steps=21"], "promote": False}), log="flow.log"
    )
    up.scratch.pid("train@linear")
    up.scratch.pid("train@cosine")
    params = up.scratch.root / "params.yaml"
    params.write_text(params.read_text().replace("steps: 21", "steps: 22"))
    (up.scratch.root / "edited").touch()
    assert flow.wait(60) == 0
    last = (up.scratch.root / "flow.log").read_text().splitlines()[-1]
    for schedule in ("linear", "cosine"):
        assert f"train@{schedule}: training.steps changed while it ran" in last
    assert "params.yaml: training.steps changed while the flow ran; finished stages are kept: run it again" in last
    assert "steps: 22" not in (up.scratch.root / "dvc.lock").read_text()
    assert up.scratch.run(*up.FLOW, json.dumps({"promote": False})).stdout.splitlines()[-1].startswith("Completed")
    assert "steps: 22" in (up.scratch.root / "dvc.lock").read_text()
    assert "Running stage" not in up.scratch.repro()


@pytest.mark.chaos
def test_kill_9_of_the_worker_ends_everything(up: Any) -> None:
    """This is the last test that uses `up`, because the flow run, its stages and the servers end with the worker."""
    up.scratch.control(**NEVER)
    up.scratch.forget("train@linear", "train@cosine")
    up.start(overrides=["training.steps=16"])
    stages = [up.scratch.pid("train@linear"), up.scratch.pid("train@cosine")]
    worker = next(
        process
        for process in psutil.Process(up.process.pid).children(recursive=True)
        if "worker" in process.cmdline() and "start" in process.cmdline()
    )
    worker.kill()
    began = time.monotonic()
    assert up.process.wait(60) != 0
    print(f"kill -9 of the worker: `make up` has ended after {time.monotonic() - began:.1f} s")
    assert not up.scratch.running()
    assert not any(psutil.pid_exists(stage) for stage in stages)
    up.scratch.control()
    up.scratch.repro()


def test_a_busy_port_is_one_line(scratch: Any) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = scratch.run(sys.executable, "-m", "flows.servers.up", PREFECT_PORT=str(port))
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert str(port) in done.stderr
    assert "PREFECT_PORT" in done.stderr


def test_ctrl_c_stops_what_was_started(scratch: Any) -> None:
    """Starts MLflow alone, as `make ui` does, in a folder with a space in its name."""
    port = scratch.free_port()
    process = scratch.start(sys.executable, "-m", "flows.servers.up", "mlflow", MLFLOW_PORT=str(port))

    def answers() -> bool:
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
        except OSError:
            return False

    scratch.wait(answers, 90, "MLflow answers")
    assert not any("prefect" in line for line in scratch.running())
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not scratch.running()
