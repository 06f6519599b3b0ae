"""A stage on another host: its inputs come from the DVC remote, and its outputs go back there with their entry in the
run-cache, by which DVC knows them again. So the clone that asked ends with the dvc.lock of having run everything itself.

The hosts are the workers of the pool `hosts` (`python -m flows.worker hosts`, in a clone of its own each).
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.states import Cancelled, Cancelling, Completed, Failed

from ddpm.stages import store
from ddpm.stages.errors import InputError
from flows import children, reaping, work
from flows.watch import Kind, Log, Outcome, Watcher, watcher

DEPLOYMENT = "run-stage/hosts"
POLL = 1.0  # seconds


@flow(name="run-stage", flow_run_name="{stage}")
def run_stage(stage: str, commit: str, params: str) -> State:
    """One stage in the checkout this runs in, with all before it taken from the DVC remote.

    stage: its name in dvc.yaml. commit: of the code that asks; it must be checked out here. params: the text of params.yaml.
    """
    from flows.train_eval import alone, end_with_the_worker

    root = Path.cwd()
    token = watcher.set(watcher.get(Log()))
    end_with_the_worker()
    try:
        reaping.claim()
        if (here := head(root)) != commit:
            raise InputError(f"this host's clone is at {here[:10]}, the run is of {commit[:10]}: check that out here")
        children.start()
        with alone(root):
            with store.replacing(root / "params.yaml") as temporary:
                temporary.write_text(params, encoding="utf-8")
            work.exchange("fetch", stage, root, watcher.get())
            outcome = work.reproduce(stage, root, watcher.get(), "--pull")
            if not outcome.failed:
                work.exchange("push", stage, root, watcher.get())
    except children.Stopped:
        return Cancelled(message="stopped with the flow")
    except InputError as error:
        name = "Unreachable" if isinstance(error, work.RemoteAway) else "InputError"
        return Failed(name=name, message=str(error))
    finally:
        children.stop()
        watcher.reset(token)
    make = Failed if outcome.failed else Completed
    return make(name=outcome.kind, message=outcome.text)


def reproduce(stage: str, root: Path, watching: Watcher) -> Outcome:
    """Has a host run the stage, and takes its outputs over. Raises children.Stopped, and then stops it there."""
    with get_client(sync_client=True) as client:
        asked = {"stage": stage, "commit": head(root), "params": (root / "params.yaml").read_text(encoding="utf-8")}
        run: Any = run_deployment(DEPLOYMENT, parameters=asked, timeout=0)
        watching.started(stage)
        watching.line(stage, f"{stage}: asked the pool for a host")
        state = _followed(client, run.id)
    if state is None or state.is_crashed():
        return Outcome("Killed", (state and state.message) or "its host is gone")  # another one may do it
    if not state.is_completed():
        again: dict[str | None, Kind] = {"Busy": "Busy", "Killed": "Killed", "Unreachable": "Unreachable"}
        return Outcome(again.get(state.name, "Failed"), state.message or "failed on its host")
    work.exchange("fetch", stage, root, watching)
    return work.reproduce(stage, root, watching, "--pull", "--single-item")


def _followed(client: SyncPrefectClient, run: UUID) -> State | None:
    """The state in which it ended."""
    while True:
        with contextlib.suppress(httpx.TransportError):  # the API is away; the host works on
            state: State | None = client.read_flow_run(run).state
            if state is None or state.is_final():
                return state
        if children.stopping():
            client.set_flow_run_state(run, Cancelling(), force=True)
            raise children.Stopped
        time.sleep(POLL)


def head(root: Path) -> str:
    """The commit that is checked out. Raises InputError."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{root}: hosts share code by git, and this is no git repository with a commit")
    return done.stdout.strip()
