"""Sets Prefect runs of killed processes to Crashed. This happens when the next flow run starts and when `make up` starts.

After `kill -9`, Prefect still shows a run as Running. A label of each flow run names its process: host, id and start time. This
host cannot see the processes of other hosts. So a Prefect automation sets flow runs to Crashed when their heartbeats stop.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Completed, Crashed

from ddpm.runtime.processes import is_alive, is_here, this_process

FLOWS = ["train-eval", "run-stage"]
FLOW = FlowFilter(name=FlowFilterName(any_=FLOWS))
LABEL = "ddpm.process"
AUTOMATION = "crash runs of ours without a heartbeat"
SILENCE = timedelta(seconds=150)  # heartbeats come every 30 s (prefect.toml), and some are lost while the API is down
OPEN = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]
PAGE = 200  # runs per request
GONE = "its process was killed; the next run continues from its results"


def claim() -> None:
    """Labels the current flow run with the name of this process."""
    context = FlowRunContext.get()
    if context and context.flow_run:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(context.flow_run.id, {LABEL: this_process()})


def reap() -> int:
    """Sets flow runs to Crashed if their process ran on this host and has ended. Ends open task runs of ended flow runs.

    Returns:
        The number of crashed flow runs.
    """
    with get_client(sync_client=True) as client:
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=OPEN))
        left = _all(client.read_flow_runs, flow_filter=FLOW, flow_run_filter=FlowRunFilter(state=state))
        dead = [run.id for run in left if _is_dead(run.labels.get(LABEL))]
        for run in dead:
            client.set_flow_run_state(run, Crashed(message=GONE), force=True)
        _end_tasks(client, {run.id for run in left} - set(dead))
    return len(dead)


def skip_missed() -> int:
    """Skips scheduled runs that are already due and would do the same as the current flow run.

    Such runs pile up while there is no worker, or while a run takes longer than the interval of the schedule. Runs that a
    user started, and runs with other parameters, are kept.

    Returns:
        The number of skipped flow runs.
    """
    context = FlowRunContext.get()
    mine = context and context.flow_run
    if not mine or not mine.deployment_id:
        return 0
    with get_client(sync_client=True) as client:
        due = FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[mine.deployment_id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),  # type: ignore[arg-type]
        )
        found = _all(client.read_flow_runs, flow_run_filter=due)
        missed = [run.id for run in found if run.auto_scheduled and run.parameters == mine.parameters]
        for run in missed:
            client.set_flow_run_state(
                run, Cancelled(name="Skipped", message=f"missed; the run {mine.name} does the same")
            )
    return len(missed)


def _all(read: Callable[..., list[Any]], **filters: Any) -> list[Any]:
    """Reads a whole list page by page, because Prefect returns at most PAGE entries at a time."""
    found: list[Any] = []
    while page := read(limit=PAGE, offset=len(found), **filters):
        found += page
        if len(page) < PAGE:
            break
    return found


def _is_dead(process: Any) -> bool:
    return isinstance(process, str) and is_here(process) and not is_alive(process)


def _end_tasks(client: Any, alive: set[UUID]) -> None:
    """Ends open task runs of ended flow runs. Either they were killed, or the API was unreachable when they ended."""
    state = TaskRunFilterState(type=TaskRunFilterStateType(any_=OPEN))
    for run in _all(client.read_task_runs, flow_filter=FLOW, task_run_filter=TaskRunFilter(state=state)):
        if run.flow_run_id not in alive:
            flow_run = client.read_flow_run(run.flow_run_id)
            if flow_run.state is None or not flow_run.state.is_final():  # this flow run started after `alive` was read
                continue
            unheard = flow_run.state.is_completed()
            end: State[Any] = (
                Completed(message="ended while the API was unreachable") if unheard else Crashed(message=GONE)
            )
            client.set_task_run_state(run.id, end, force=True)


def watch_heartbeats() -> None:
    """Creates the Prefect automation that sets flow runs without heartbeats to Crashed.

    Does nothing if the automation exists.
    """
    from prefect.events import EventTrigger, Posture, ResourceSpecification
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore

    heartbeat, ends = "prefect.flow-run.heartbeat", ("Completed", "Failed", "Cancelled", "Crashed")
    with get_client(sync_client=True) as client:
        if client.read_automations_by_name(AUTOMATION):
            return
        trigger = EventTrigger(
            posture=Posture.Proactive,
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{end}" for end in ends)},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": FLOWS}),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=SILENCE,
        )
        action = ChangeFlowRunState(
            name="Crashed", state=StateType.CRASHED, message=f"no heartbeat for {SILENCE.seconds} s", force=False
        )
        client.create_automation(AutomationCore(name=AUTOMATION, trigger=trigger, actions=[action]))
