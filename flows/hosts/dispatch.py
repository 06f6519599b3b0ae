"""Runs a stage on another host.

The host fetches the inputs of the stage from the DVC remote. After the stage, the host pushes the outputs, and their entry in
DVC's run-cache. The clone that runs the flow fetches both. From the entry, DVC writes dvc.lock as if the stage had run in that
clone.

A host is a worker of the pool `hosts` (`python -m flows.servers.worker hosts`) or of a Dask cluster (engines.py). Each host
works in its own clone.
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
    """Runs one stage in this host's clone.

    Args:
        stage: the stage's name in DVC, such as train@cosine.
        commit: the commit of the clone that runs the flow. The host must have the same commit checked out.
        params: the text of params.yaml.
        asked_by: the id of the flow run that needs the stage.
    """
    children.end_with_the_worker()
    crashed_runs.claim()
    return _run_on_this_host(stage, commit, params, asked_by)


@task(name="stage-on-a-host", task_run_name="{stage} on a host", cache_policy=NO_CACHE)
def on_a_host(stage: str, commit: str, params: str, asked_by: str) -> State:
    """Runs one stage as run_stage does, but as a task on a cluster's worker.

    The worker outlives the flow run that needs the stage. So this task watches that flow run, and ends with it.
    """
    return _stage_on_cluster(stage, commit, params, asked_by)


def _stage_on_cluster(stage: str, commit: str, params: str, asked_by: str) -> State:
    """Runs the stage with the host's own code, while on_a_host itself runs with the code that Dask sends."""
    return _run_on_this_host(stage, commit, params, asked_by, UUID(asked_by))


def _run_on_this_host(stage: str, commit: str, params: str, asked_by: str, wanted_by: UUID | None = None) -> State:
    root = Path.cwd()
    token = watcher.set(watcher.get(Log()))
    try:
        checkout.require_own(root, "ddpm", "flows")
        if (here := head(root)) != commit:
            raise InputError(
                f"this host's clone is at {here[:10]}, but the run needs {commit[:10]}: check out that commit here"
            )
        with checkout_lock.alone(root, flow_run.id, asked_by), _children_allowed(wanted_by):
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
def _children_allowed(wanted_by: UUID | None) -> Iterator[None]:
    """Allows child processes during the block. Stops them at its end, or once the flow run `wanted_by` is not Running."""
    children.start()
    over = threading.Event()

    def watch(run: UUID) -> None:
        with get_client(sync_client=True) as client:
            while not over.is_set():
                with contextlib.suppress(httpx.HTTPError):  # the API is unreachable or busy, and the stage continues
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
    """Runs a stage on a host and fetches its outputs into this checkout.

    If the flow is ending, stops the stage on the host and raises children.FlowStopped.
    """
    params = (root / "params.yaml").read_text(encoding="utf-8")
    asked = {"stage": stage, "commit": head(root), "params": params, "asked_by": str(flow_run.id)}
    watching.started(stage)
    state = _run_on_cluster(asked, watching) if engines.cluster.get(None) else _run_in_pool(asked, watching)
    if state is None or state.is_crashed():
        # A retry may find another host.
        return Outcome("Killed", (state and state.message) or "the host of this stage is gone")
    if not state.is_completed():
        retried: dict[str | None, Kind] = {
            "Busy": "Busy",
            "Killed": "Killed",
            "Unreachable": "Unreachable",
            "Full": "Full",
        }
        return Outcome(retried.get(state.name, "Failed"), state.message or "failed on its host")
    commands.exchange("fetch", stage, root, watching)
    return commands.reproduce(stage, root, watching, "--pull", "--single-item")


def _run_in_pool(asked: dict[str, str], watching: Watcher) -> State | None:
    with get_client(sync_client=True) as client:
        # On Kubernetes, the host is a container that is created for this stage and clones this commit (deploy/kubernetes).
        run: Any = run_deployment(DEPLOYMENT, parameters=asked, job_variables={"commit": asked["commit"]}, timeout=0)
        watching.line(asked["stage"], f"{asked['stage']}: asked the pool for a host")
        return _wait_for_end(client, run.id)


def _run_on_cluster(asked: dict[str, str], watching: Watcher) -> State | None:
    """Runs a stage on the Dask cluster.

    Does not cancel the task when the flow ends, because the task on the host watches the flow run and ends with it.
    """
    future = engines.submit(on_a_host, asked)
    watching.line(asked["stage"], f"{asked['stage']}: asked the cluster for a host")
    while True:
        if children.stopping():
            raise children.FlowStopped
        try:
            future.result(timeout=POLL, raise_on_failure=False)
        except TimeoutError:
            continue
        except Exception as error:  # noqa: BLE001 - Dask raises many types of errors when a worker or the scheduler is gone
            return Crashed(message=f"lost on its cluster ({type(error).__name__}: {error})")
        return future.state


def _wait_for_end(client: SyncPrefectClient, run: UUID) -> State | None:
    """Waits until a flow run has ended, and returns its state. Cancels the flow run if this flow is ending."""
    while True:
        with contextlib.suppress(httpx.HTTPError):  # the API is unreachable or busy, and the host continues to work
            state: State | None = client.read_flow_run(run).state
            if state is None or state.is_final():
                return state
        if children.stopping():
            client.set_flow_run_state(run, Cancelling(), force=True)
            raise children.FlowStopped
        time.sleep(POLL)


def head(root: Path) -> str:
    """Returns the commit that is checked out. Raises InputError if there is none."""
    commit = git.head(root)
    if commit is None:
        raise InputError(
            f"{root}: not a git repository, or one without a commit; commit the code first, since hosts check that commit out"
        )
    return commit
