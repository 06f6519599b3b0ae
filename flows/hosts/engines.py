"""Runs stages on the workers of a Dask cluster, through Prefect's task runner: each runs `flows.hosts.dispatch.on_a_host`.

The extra `dask` is imported only where a cluster is asked for.
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
    """`cluster` is the one at that address while the block runs; a bool names none. Raises InputError."""
    if isinstance(hosts, bool):
        yield
        return
    runner = _runner(hosts)
    try:
        runner.__enter__()
        getattr(runner, "client", None)  # Dask's connects when it is first asked for: once, and before anything has run
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"hosts: nothing to work with at {hosts} ({why})") from error
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
    """Starts the task on a host of the cluster, as part of the flow run that this is called in.

    Prefect would send along the settings of this process, with the passwords among them, which would then go before those of
    the host; and the flow, whose module is not importable there. So the context of the task holds neither.
    """
    runner, here = cluster.get(), FlowRunContext.get()
    assert here is not None
    flow_run = here.model_copy(update={"flow": _asking})
    settings = _TheHostsOwn(**dict(get_settings_context()))

    def begin() -> PrefectFuture[Any]:
        with settings, flow_run:
            return runner.submit(task, parameters)

    return Context().run(begin)


class _TheHostsOwn(SettingsContext):
    def serialize(self, include_secrets: bool = True) -> dict[str, Any]:
        return {}


@flow(name="train-eval")
def _asking() -> None:
    """Stands for the flow in the context of its tasks on hosts."""
