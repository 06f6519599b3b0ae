"""Runs stages on the workers of a Dask cluster, through Prefect's task runner for Dask.

Each stage is a task `flows.hosts.dispatch.on_a_host`. The extra `dask` is needed only if a flow run names a cluster.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from typing import Any

from prefect import Task, flow
from prefect.context import FlowRunContext, SettingsContext, get_settings_context
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner

from ddpm.errors import InputError

Runner = TaskRunner[PrefectFuture[Any]]

SCHEMES = ("tcp", "tls")

cluster: ContextVar[Runner] = ContextVar("cluster")


@contextmanager
def connected(hosts: bool | str) -> Iterator[None]:
    """Connects `cluster` to a Dask scheduler while the `with` block runs. Does nothing if `hosts` is a bool.

    Raises InputError if `hosts` is not an address, if no scheduler answers there, or if the extra `dask` is not installed.
    """
    if isinstance(hosts, bool):
        yield
        return
    runner = _runner(hosts)
    try:
        runner.__enter__()
        getattr(runner, "client", None)  # connects Dask's runner, so that a failure appears before any stage starts
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"hosts: cannot connect to a Dask scheduler at {hosts} ({why})") from error
    token = cluster.set(runner)
    try:
        yield
    finally:
        cluster.reset(token)
        runner.__exit__(None, None, None)


def _runner(hosts: str) -> Runner:
    scheme, _, rest = hosts.partition("://")
    if scheme not in SCHEMES or not rest:
        raise InputError(
            f"hosts: {hosts!r} is neither true (the pool `hosts`) nor the address of a Dask scheduler, such as"
            " tcp://scheduler:8786"
        )
    try:
        module = importlib.import_module("prefect_dask")
    except ModuleNotFoundError as error:
        install = "uv pip install --constraint requirements.lock --editable '.[dask]'"
        raise InputError(f"hosts: {hosts} needs the extra dask, here and on the hosts: {install}") from error
    made: Runner = module.DaskTaskRunner(address=hosts)
    return made


def submit(task: Task[..., Any], parameters: dict[str, Any]) -> PrefectFuture[Any]:
    """Starts a task on a worker of the cluster, as part of the current flow run.

    Leaves this process's settings and the flow out of the task's context, although Prefect sends both by default. The
    settings, with their passwords, would override the host's own settings. The host cannot import the module of the flow.
    """
    runner, here = cluster.get(), FlowRunContext.get()
    assert here is not None
    flow_run = here.model_copy(update={"flow": _placeholder})
    settings = _NoSettings(**dict(get_settings_context()))

    def begin() -> PrefectFuture[Any]:
        with settings, flow_run:
            return runner.submit(task, parameters)

    return Context().run(begin)


class _NoSettings(SettingsContext):
    """Settings that are serialised as empty, so that the host uses its own settings."""

    def serialize(self, include_secrets: bool = True) -> dict[str, Any]:
        return {}


@flow(name="train-eval")
def _placeholder() -> None:
    """Stands in for the flow in the context that is sent to hosts."""
