"""Checks a deployment under `make up`: schedules, queued and late runs, and the buttons of Prefect's page."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PREFECT = (sys.executable, "-m", "prefect")
DEPLOYMENT = "train-eval/default"
OPEN = ("Scheduled", "Late", "Submitting", "Pending", "Running")
pytestmark = pytest.mark.timeout(600)


def prefect(up: Any, *words: str) -> str:
    done = up.scratch.run(*PREFECT, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def schedule(up: Any, verb: str, *words: str) -> str:
    return prefect(up, "deployment", "schedule", verb, DEPLOYMENT, *words)


def schedules(up: Any) -> list[dict[str, Any]]:
    return list(up.post("/deployments/filter")[0]["schedules"])


def runs(up: Any, *states: str) -> list[dict[str, Any]]:
    """Returns the flow runs in these states, oldest first."""
    state = {"state": {"name": {"any_": list(states)}}}
    return list(up.post("/flow_runs/filter", flow_runs=state, sort="EXPECTED_START_TIME_ASC"))


def ended(up: Any, run: str, state: str = "Completed", seconds: float = 120) -> dict[str, Any]:
    """Waits until the flow run is in this state."""
    up.scratch.wait(lambda: up.get(f"/flow_runs/{run}")["state"]["name"] == state, seconds, f"{run} is {state}")
    return dict(up.get(f"/flow_runs/{run}"))


def scheduled_run(up: Any, known: set[str], seconds: float = 120) -> dict[str, Any]:
    """Waits until a scheduled run that is not in `known` is Completed."""

    def found() -> list[dict[str, Any]]:
        return [run for run in runs(up, "Completed") if run["auto_scheduled"] and run["id"] not in known]

    return dict(up.scratch.wait(found, seconds, "a scheduled run is Completed")[0])


def idle(up: Any) -> None:
    """Waits until no flow run is due or running. A paused schedule keeps the runs that were due already."""
    up.scratch.wait(lambda: not runs(up, *OPEN), 120, "no run is due or under way")


def all_runs(up: Any) -> set[str]:
    return {run["id"] for run in up.post("/flow_runs/filter")}


@pytest.mark.proof
def test_a_schedule_starts_runs_is_paused_kept_by_deploy_and_resumed(up: Any) -> None:
    assert "Created" in schedule(up, "create", "--interval", "20")
    run = scheduled_run(up, set())
    assert run["name"] == "mnist" and run["run_count"] == 1

    (made,) = schedules(up)
    schedule(up, "pause", made["id"])
    idle(up)
    (paused,) = schedules(up)
    assert all(run["expected_start_time"] <= paused["updated"] for run in up.post("/flow_runs/filter"))
    prefect(up, "--no-prompt", "deploy", "--all")
    assert [(item["id"], item["active"]) for item in schedules(up)] == [(made["id"], False)]

    known = all_runs(up)
    schedule(up, "resume", made["id"])
    scheduled_run(up, known)
    schedule(up, "clear", "--accept-yes")
    assert not schedules(up)
    idle(up)


@pytest.mark.proof
def test_of_two_runs_queued_at_once_the_second_waits_at_prefect(up: Any) -> None:
    up.scratch.control(train_linear={"until": "go"})
    up.scratch.forget("train@linear")
    first = up.start(overrides=["training.steps=31"], promote=False)
    up.scratch.pid("train@linear")
    second = up.start(overrides=["training.steps=32"], promote=False)
    up.scratch.wait(lambda: up.get(f"/flow_runs/{second}")["state"]["name"] == "Late", 60, "the second one is late")
    (up.scratch.root / "go").touch()
    one, two = (ended(up, run) for run in (first, second))
    assert one["end_time"] <= two["start_time"]
    assert (one["name"], two["name"]) == ("mnist training.steps=31", "mnist training.steps=32")
    assert "steps: 32" in (up.scratch.root / "params.yaml").read_text()
    up.scratch.control()


@pytest.mark.proof
def test_retry_and_cancel_from_the_page(up: Any, page: Any, shoot: Any) -> None:
    address = f"http://127.0.0.1:{up.ports['PREFECT_PORT']}/runs/flow-run"
    up.scratch.control(train_linear={"exit": 2})
    run = up.start(overrides=["training.steps=41"])
    ended(up, run, "Failed")
    up.injected += ["train@linear can't", "failed to reproduce 'train@linear'", "stopped with the flow"]
    up.scratch.control()
    page.goto(f"{address}/{run}")
    page.get_by_text("Failed", exact=True).first.wait_for()
    page.get_by_role("button", name="Retry").first.click()
    page.get_by_role("button", name="Retry").last.click()
    assert ended(up, run)["run_count"] == 2

    up.scratch.control(train_linear={"until": "never", "saves": True})
    up.scratch.forget("train@linear")
    run = up.start(overrides=["training.steps=42"])
    up.scratch.pid("train@linear")
    page.goto(f"{address}/{run}")
    page.get_by_text("Running", exact=True).first.wait_for()
    page.get_by_role("button", name="Cancel").first.click()
    shoot(page, "prefect-cancel")
    page.get_by_role("button", name="Confirm").click()
    ended(up, run, "Cancelled")
    assert (up.scratch.root / "train@linear.saved").exists()
    up.scratch.control()


@pytest.fixture
def own(scratch: Any, up_starter: Callable[[Any], Any]) -> Iterator[Any]:
    """Runs `make up` in a repository for this test alone."""
    yield up_starter(scratch)


@pytest.mark.proof
def test_a_schedule_outlives_a_restart_and_of_the_runs_missed_meanwhile_one_is_made_up_for(
    own: Any, up_starter: Callable[[Any], Any]
) -> None:
    schedule(own, "create", "--interval", "10")
    scheduled_run(own, set())
    own.injected.append(
        "Service 'EventsWorker' failed"
    )  # Ctrl-C also stops the server to which the worker reports its end
    own.process.send_signal(signal.SIGINT)
    assert own.process.wait(60) == 0
    own.scratch.wait(lambda: not own.scratch.running(), 30, "nothing is left running")
    own.scratch.wait(_later(30), 60, "some runs are missed")
    up = up_starter(own.scratch)
    known = {run["id"] for run in runs(up, "Completed")}
    scheduled_run(up, known)
    (made,) = schedules(up)
    schedule(up, "pause", made["id"])
    skipped = runs(up, "Skipped")
    assert skipped and all(run["auto_scheduled"] and run["run_count"] == 0 for run in skipped)
    idle(up)
    assert not runs(up, "Failed", "Crashed")


def _later(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end
