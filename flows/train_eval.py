"""The flow `train-eval`: runs the outdated stages of dvc.yaml, publishes to MLflow, and promotes the report's best model."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from queue import Queue
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from ddpm.errors import InputError
from ddpm.files import paths, scores
from ddpm.files.params import Params
from ddpm.provenance import checkout, project
from ddpm.reporting.answer import answer
from ddpm.scores.metrics import RANKING
from flows import links, parameters
from flows.hosts import dispatch, engines
from flows.processes import children, crashed_runs, fork_server
from flows.repro import checkout_lock, commands, dag
from flows.watch import Log, Outcome, watcher


def _worth_retrying(task: Any, task_run: TaskRun, state: State) -> bool:
    """Returns whether to retry a task: after a kill, a held lock, an unreachable server or a full disk.

    Errors raised by the stage itself are deterministic, so they are not retried.
    """
    return state.name in ("Busy", "Killed", "Unreachable", "Full")


@task(
    name="stage",
    task_run_name="{stage}",
    retries=5,
    retry_delay_seconds=[1, 5, 15, 60, 120],
    retry_condition_fn=_worth_retrying,
    cache_policy=NO_CACHE,
)
def run_stage(stage: str, root: str, unchanged: bool, hosts: bool = False) -> State:
    """Runs one DVC stage.

    Args:
        stage: the stage's name in DVC, such as sample@linear-ddim-50.
        root: the checkout.
        unchanged: DVC has already reported that the stage need not run.
        hosts: whether the flow uses other hosts. If so, a stage of a matrix (with @ in its name) runs on one of them. A stage
            without @ runs on this host, and its outputs are then pushed to the DVC remote.
    """
    if unchanged:
        return _state(stage, Outcome("Unchanged", "unchanged"))
    try:
        if hosts and "@" in stage:
            return _state(stage, dispatch.reproduce(stage, Path(root), watcher.get()))
        outcome = commands.reproduce(stage, Path(root), watcher.get())
        if hosts and not outcome.failed:
            commands.exchange("push", stage, Path(root), watcher.get())
        return _state(stage, outcome)
    except commands.RemoteAway as error:
        return _state(stage, Outcome("Unreachable", str(error)))
    except InputError as error:
        return _state(stage, Outcome("Failed", str(error)))
    except children.FlowStopped:
        return Cancelled(message="stopped with the flow")


@task(
    name="ddpm",
    task_run_name="publish",
    retries=3,
    retry_delay_seconds=[5, 15, 60],  # a server may restart
    retry_condition_fn=_worth_retrying,
    cache_policy=NO_CACHE,
)
def run_publish(root: str, standard_input: int) -> State:
    """Runs `ddpm publish --follow`, which publishes outputs while stages run, until its standard input is closed."""
    try:
        command = (*fork_server.DDPM, "publish", "--follow")
        return _state("publish", commands.run("publish", command, Path(root), watcher.get(), standard_input))
    except children.FlowStopped:
        return Cancelled(message="stopped with the flow")


@task(
    name="ddpm",
    task_run_name="promote",
    retries=3,
    retry_delay_seconds=[5, 15, 60],  # a server may restart
    retry_condition_fn=_worth_retrying,
    cache_policy=NO_CACHE,
)
def run_promote(root: str) -> State:
    """Runs `ddpm promote`, which is not a DVC stage because it writes to MLflow's registry, which DVC does not track."""
    try:
        return _state("promote", commands.run("promote", (*fork_server.DDPM, "promote"), Path(root), watcher.get()))
    except children.FlowStopped:
        return Cancelled(message="stopped with the flow")


def _state(name: str, outcome: Outcome) -> State:
    watcher.get().ended(name, outcome)
    make = Failed if outcome.failed else Completed
    return make(name=outcome.kind, message=outcome.text)


def run_name() -> str:
    """Names a flow run by its recipe, or else by the dataset of params.yaml, and by its overrides."""
    given = runtime.flow_run.parameters
    try:
        name = Path(given["recipe"]).stem if given.get("recipe") else Params.load(Path("params.yaml")).dataset_name
    except InputError:  # the run itself reports this error and fails
        name = "train-eval"
    return " ".join([name, *(given.get("overrides") or ())])


@flow(name="train-eval", flow_run_name=run_name, task_runner=ThreadPoolTaskRunner())  # type: ignore[arg-type]
def train_eval(
    recipe: str | None = None, overrides: list[str] | None = None, promote: bool = True, hosts: bool | str = False
) -> State:
    """Train, sample, evaluate and report whatever DVC says is missing, in the current checkout.

    Args:
        recipe: a name in recipes/ or a path. The recipe first replaces params.yaml.
        overrides: KEY=VALUE each, such as training.steps=200. They are written into params.yaml.
        promote: compare the best point of the sweep with the champion. If the point wins by the rules of `promotion` in
            params.yaml, its model is registered in MLflow and becomes champion.
        hosts: where the stages of a matrix run, compute.slots at a time. With false they run in this checkout, with true on the
            workers of the pool `hosts`, and with an address such as tcp://scheduler:8786 on a Dask cluster.
    """
    root = Path.cwd()
    token = watcher.set(watcher.get(Log()))
    children.end_with_the_worker()
    children.import_ahead(root)
    try:
        crashed_runs.claim()
        crashed_runs.reap()
        if missed := crashed_runs.skip_missed():
            watcher.get().line(
                "train-eval", f"skipped {missed} scheduled runs that were due earlier: this run does the same"
            )
    except Exception as error:  # noqa: BLE001 - the display must not fail the work
        watcher.get().line("train-eval", f"killed runs may still show as Running ({type(error).__name__}: {error})")
    try:
        checkout.require_own(root, "ddpm", "flows")
        project.require_current(root)
        with checkout_lock.alone(root, runtime.flow_run.id):
            return _run_all(root, recipe, overrides or [], promote, hosts)
    except InputError as error:
        return Failed(name="InputError", message=str(error))
    finally:
        children.stop()
        watcher.reset(token)


def _run_all(root: Path, recipe: str | None, overrides: list[str], promote: bool, hosts: bool | str) -> State:
    children.start()
    try:
        with engines.connected(hosts):
            params = parameters.write(root, recipe, overrides, partial(watcher.get().line, "train-eval"))
            with _publishing(root) as publishing:
                problem = _run_stages(root, params, bool(hosts))
        if problem:
            return Failed(message=problem)
        _show_on_page(_show_artifacts, root)
        last = {"publish": publishing.state}
        if promote and publishing.state.is_completed():
            last["promote"] = run_promote(str(root), return_state=True)
            _show_on_page(_show_decision, last["promote"])
        watcher.get().concluded(_closing_lines(root, promoted="promote" in last and last["promote"].is_completed()))
        for verb, state in last.items():
            if not state.is_completed():
                name = "Unpublished" if state.name == "Unreachable" else "Failed"
                return Failed(name=name, message=f"{verb}: {state.message} (all stages are done and kept)")
        return Completed(message=state.message)
    finally:
        children.stop()  # the next run may begin only after this


@contextmanager
def _publishing(root: Path) -> Iterator[PrefectFuture[State]]:
    """Publishes outputs while the `with` block runs. At its end, waits until the remaining outputs are published."""
    read_end, write_end = os.pipe()
    try:
        publishing = run_publish.submit(str(root), read_end)
        try:
            yield publishing
        finally:
            os.close(write_end)  # closing the pipe tells `ddpm publish --follow` to finish
        publishing.wait()
    finally:
        os.close(read_end)


def _run_stages(root: Path, params: Params, hosts: bool) -> str:
    """Runs the stages of dvc.yaml, `compute.slots` at a time, each as soon as the stages on which it depends are done.

    A failed stage stops only the stages that depend on it. After an edit of params.yaml, no more stages start.

    Returns:
        "" or one line about what failed.
    """
    order = dag.read(root)
    sorter = TopologicalSorter(order.waits_for)
    sorter.prepare()
    place = {stage: index for index, stage in enumerate(order.waits_for)}
    ready: list[str] = []
    futures: dict[str, PrefectFuture[State]] = {}
    running: set[str] = set()
    ended: Queue[str] = Queue()
    failures: dict[str, str] = {}
    edited, edits = "", parameters.edits(root, params)
    watcher.get().started("stages")
    if hosts and order.unchanged:  # the hosts need the outputs of these stages
        commands.exchange("push", "stages", root, watcher.get(), *sorted(order.unchanged))
    while True:
        ready = sorted([*ready, *sorter.get_ready()], key=place.__getitem__)
        edited = edited or edits()
        while ready and len(running) < params.compute.slots and not edited:
            stage = ready.pop(0)
            before = [futures[name] for name in order.waits_for[stage]]
            futures[stage] = run_stage.submit(
                stage=stage,
                root=str(root),
                unchanged=stage in order.unchanged,
                hosts=hosts,
                wait_for=before,
                return_state=False,
            )
            futures[stage].add_done_callback(partial(_put, ended, stage))
            running.add(stage)
        if not running:
            break
        stage = ended.get()
        running.remove(stage)
        futures[stage].wait()
        state = futures[stage].state
        if state.is_completed():
            sorter.done(stage)
            done = len(futures) - len(running) - len(failures)
            report = {"done": done, "total": len(order.waits_for), "unit": "stages", "values": {}}
            watcher.get().progress("stages", report)
        else:
            failures[stage] = state.message or state.name or "failed"
    if edited:
        failures["params.yaml"] = f"{edited} changed while the flow ran; finished stages are kept: run it again"
    if not failures:
        return ""
    skipped = len(order.waits_for) - len(futures)
    problem = "; ".join(f"{stage}: {reason}" for stage, reason in failures.items())
    return problem + (f" ({skipped} stages after it did not run)" if skipped else "")


def _put(ended: Queue[str], stage: str, future: PrefectFuture[State]) -> None:
    ended.put(stage)


def _show_on_page(show: Callable[..., None], *arguments: Any) -> None:
    """Calls `show`, which writes to the page of the flow run.

    An error becomes a log line, since the display must not fail the work.
    """
    try:
        show(*arguments)
    except Exception as error:  # noqa: BLE001 - the API may be unreachable or give any answer
        watcher.get().line("train-eval", f"the page of this run is incomplete ({type(error).__name__}: {error})")


def _closing_lines(root: Path, promoted: bool) -> list[str]:
    server = os.environ.get("MLFLOW_UI", "")
    try:
        return answer(root, promoted=promoted, mlflow=server and links.mlflow(root, server))
    except InputError as error:  # the run itself has succeeded
        return [str(error)]


def _show_decision(promoted: State) -> None:
    """Shows the decision of `ddpm promote` on the page of the flow run."""
    if promoted.is_completed():
        text = (promoted.message or "").removeprefix("promote: ")
        create_markdown_artifact(text, key="champion", description=text)


def _show_artifacts(root: Path) -> None:
    """Shows the sweep table, the report's pictures and a link to MLflow on the page of the flow run."""
    report = root / paths.report_dir()
    if (report / "front.json").exists():
        best, rows = scores.read_report(root)
        create_table_artifact([row.to_json() for row in rows], key="sweep", description="The points of the sweep")
        pictures = [path for path in (report / scores.PICTURE, report / "samples.png") if path.exists()]
        if pictures:
            text = "\n\n".join([_report_location(report / "index.html"), *map(_embedded_picture, pictures)])
            create_markdown_artifact(text, key="report", description=best.line)
    if "MLFLOW_UI" in os.environ:
        chart, title = links.mlflow(root, os.environ["MLFLOW_UI"]), RANKING.title
        create_link_artifact(
            chart, link_text="MLflow", key="mlflow", description=f"{title} against steps, runs and models"
        )


def _report_location(page: Path) -> str:
    """Returns a text with the report's path, because browsers do not open links from a server's page to a local file."""
    server = os.environ.get("MLFLOW_UI")
    mlflow = f"[MLflow]({server})" if server else "MLflow"
    return (
        f"The whole report is one page: `{page.resolve()}`. With lineage and timings it is `report/index.html` of the"
        f" run `report` in {mlflow}."
    )


def _embedded_picture(path: Path) -> str:
    return f"![{path.stem}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"
