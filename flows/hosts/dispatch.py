"""A stage on another host: its inputs come from the DVC remote, and its outputs go back there with their entry in the
run-cache, by which DVC knows them again. So the clone that asked ends with the dvc.lock of having run everything itself.

The hosts are the workers of the pool `hosts` (`python -m flows.servers.worker hosts`), or those of a cluster (engines.py),
in a clone of its own each.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed

from ddpm.errors import InputError
from ddpm.files import atomic
from ddpm.provenance import checkout, git
from flows.hosts import engines
from flows.processes import children, crashed_runs
from flows.repro import checkout_lock, commands
from flows.watch import Kind, Log, Outcome, Watcher, watcher

DEPLOYMENT = "run-stage/hosts"
POLL = 1.0  # seconds


@flow(name="run-stage", flow_run_name="{stage}")
def run_stage(stage: str, commit: str, params: str, asked_by: str) -> State:
    """One stage in the checkout this runs in, with all before it taken from the DVC remote.

    stage: its name in dvc.yaml. commit: of the code that asks; it must be checked out here. params: the text of params.yaml.
    asked_by: the id of the flow run that asks.
    """
    children.end_with_the_worker()
    crashed_runs.claim()
    return _stage(stage, commit, params, asked_by)


@task(name="stage-on-a-host", task_run_name="{stage} on a host", cache_policy=NO_CACHE)
def on_a_host(stage: str, commit: str, params: str, asked_by: str) -> State:
    """The same as a task on a cluster's worker, which outlives the flow run that asks: so that is watched."""
    return _wanted_stage(stage, commit, params, asked_by)


def _wanted_stage(stage: str, commit: str, params: str, asked_by: str) -> State:
    """Apart from the task, whose own code travels with it: this is the host's."""
    return _stage(stage, commit, params, asked_by, UUID(asked_by))


def _stage(stage: str, commit: str, params: str, asked_by: str, wanted_by: UUID | None = None) -> State:
    root = Path.cwd()
    token = watcher.set(watcher.get(Log()))
    try:
        checkout.require_own(root, "ddpm", "flows")
        if (here := head(root)) != commit:
            raise InputError(f"this host's clone is at {here[:10]}, the run is of {commit[:10]}: check that out here")
        with checkout_lock.alone(root, flow_run.id, asked_by), _running(wanted_by):
            with atomic.replacing(root / "params.yaml") as temporary:
                temporary.write_text(params, encoding="utf-8")
            commands.exchange("fetch", stage, root, watcher.get())
            outcome = commands.reproduce(stage, root, watcher.get(), "--pull")
            if not outcome.failed:
                commands.exchange("push", stage, root, watcher.get())
    except children.FlowStopped:
        return Cancelled(message="stopped with the flow")
    except InputError as error:
        name = "Unreachable" if isinstance(error, commands.RemoteAway) else "InputError"
        return Failed(name=name, message=str(error))
    finally:
        watcher.reset(token)
    make = Failed if outcome.failed else Completed
    return make(name=outcome.kind, message=outcome.text)


@contextmanager
def _running(wanted_by: UUID | None) -> Iterator[None]:
    """Children run in the block, and end with it, or as soon as the flow run that wants them is no longer Running."""
    children.start()
    over = threading.Event()

    def watch(run: UUID) -> None:
        with get_client(sync_client=True) as client:
            while not over.is_set():
                with contextlib.suppress(httpx.HTTPError):  # the API is away or busy; work goes on
                    state = client.read_flow_run(run).state
                    if state is None or not state.is_running():
                        return children.stop()
                over.wait(POLL)

    watching = threading.Thread(target=watch, args=(wanted_by,), name="wanted", daemon=True)
    if wanted_by is not None:
        watching.start()
    try:
        yield
    finally:
        over.set()
        if wanted_by is not None:
            watching.join()
        children.stop()


def reproduce(stage: str, root: Path, watching: Watcher) -> Outcome:
    """Has a host run the stage, and takes its outputs over. Raises children.FlowStopped, and then stops it there."""
    params = (root / "params.yaml").read_text(encoding="utf-8")
    asked = {"stage": stage, "commit": head(root), "params": params, "asked_by": str(flow_run.id)}
    watching.started(stage)
    state = _by_the_cluster(asked, watching) if engines.cluster.get(None) else _by_the_pool(asked, watching)
    if state is None or state.is_crashed():
        return Outcome("Killed", (state and state.message) or "its host is gone")  # another one may do it
    if not state.is_completed():
        again: dict[str | None, Kind] = {
            "Busy": "Busy",
            "Killed": "Killed",
            "Unreachable": "Unreachable",
            "Full": "Full",
        }
        return Outcome(again.get(state.name, "Failed"), state.message or "failed on its host")
    commands.exchange("fetch", stage, root, watching)
    return commands.reproduce(stage, root, watching, "--pull", "--single-item")


def _by_the_pool(asked: dict[str, str], watching: Watcher) -> State | None:
    with get_client(sync_client=True) as client:
        # Where a host is a container made for this stage, it clones that commit (deploy/kubernetes).
        run: Any = run_deployment(DEPLOYMENT, parameters=asked, job_variables={"commit": asked["commit"]}, timeout=0)
        watching.line(asked["stage"], f"{asked['stage']}: asked the pool for a host")
        return _followed(client, run.id)


def _by_the_cluster(asked: dict[str, str], watching: Watcher) -> State | None:
    """Cancels nothing: the host sees by itself that the flow run has ended."""
    future = engines.submit(on_a_host, asked)
    watching.line(asked["stage"], f"{asked['stage']}: asked the cluster for a host")
    while True:
        if children.stopping():
            raise children.FlowStopped
        try:
            future.result(timeout=POLL, raise_on_failure=False)
        except TimeoutError:
            continue
        except Exception as error:  # noqa: BLE001 - Dask has many for a worker or a scheduler that is gone
            return Crashed(message=f"lost on its cluster ({type(error).__name__}: {error})")
        return future.state


def _followed(client: SyncPrefectClient, run: UUID) -> State | None:
    """The state in which it ended."""
    while True:
        with contextlib.suppress(httpx.HTTPError):  # the API is away or busy; the host works on
            state: State | None = client.read_flow_run(run).state
            if state is None or state.is_final():
                return state
        if children.stopping():
            client.set_flow_run_state(run, Cancelling(), force=True)
            raise children.FlowStopped
        time.sleep(POLL)


def head(root: Path) -> str:
    """The commit that is checked out. Raises InputError."""
    commit = git.head(root)
    if commit is None:
        raise InputError(f"{root}: hosts share code by git, and this is no git repository with a commit")
    return commit
