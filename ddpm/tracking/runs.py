"""Finds the MLflow run of a stage's output by the run's tags, and adds the values, images and tags that the run lacks."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.runtime.processes import is_alive, is_here, this_process
from ddpm.tracking.place import Target

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

CURVES = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "validation_loss",
)  # columns of a training's history that are metrics
KEY, MODEL, CURVES_SHA = "ddpm.key", "ddpm.model_sha256", "ddpm.curves_sha256"
MODEL_RECORD = "ddpm.model_record_sha256"  # tag with the hash of the content of model.json
COMPRESSED = "+compressed.webp"  # the end of the file name of the thumbnail that MLflow's slider shows
SUPERSEDED, PROCESS, SETTINGS = "ddpm.superseded", "ddpm.process", "ddpm.settings"
PUBLISHER = "ddpm.publisher"  # tag with the process that is publishing the run; removed once the run is FINISHED


def log(
    target: Target, run: Run, params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
) -> None:
    """Logs the parameters that the run lacks, and every tag that is missing or differs."""
    from mlflow.entities import Param, RunTag

    new_params = [Param(name, value) for name, value in (params or {}).items() if name not in run.data.params]
    new_tags = [RunTag(name, value) for name, value in (tags or {}).items() if run.data.tags.get(name) != value]
    for chunk in chunks(new_params, 100):
        target.client.log_batch(run.info.run_id, params=chunk)
    for chunk in chunks(new_tags, 100):
        target.client.log_batch(run.info.run_id, tags=chunk)


def chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def history(target: Target, run: Run, key: str) -> dict[int, float]:
    """Returns the values of a metric by step."""
    if key not in run.data.metrics:
        return {}
    return {metric.step: metric.value for metric in target.client.get_metric_history(run.info.run_id, key)}


def log_metrics(target: Target, run: Run, metrics: Sequence[Metric], added: Counter[str]) -> None:
    """Logs the metrics that have no value at their step in the run. Adds the number of new values to added["metrics"]."""
    known = {key: history(target, run, key) for key in {metric.key for metric in metrics}}
    missing = [metric for metric in metrics if metric.step not in known[metric.key]]
    for chunk in chunks(missing, 1000):
        target.client.log_batch(run.info.run_id, metrics=chunk)
    if missing:
        added["metrics"] += len(missing)


def log_image(target: Target, run: Run, picture: Any, step: int, timestamp: int, added: Counter[str]) -> None:
    """Logs an image under the key `samples`, unless the run has an image at this step.

    Args:
        target: the store and experiment.
        run: the run that shows the image.
        picture: a PIL image or an array, H,W or H,W,3.
        step: the step at which MLflow shows the image.
        timestamp: the time of the image, in milliseconds since the epoch.
        added: the counters of added items; a logged image adds 1 to added["images"].
    """
    known = [Path(file.path).name for file in target.client.list_artifacts(run.info.run_id, "images")]
    here = [name for name in known if name.startswith(f"samples+step+{step}+")]
    if not here:
        target.client.log_image(run.info.run_id, picture, key="samples", step=step, timestamp=timestamp)
        added["images"] += 1
    elif not any(name.endswith(COMPRESSED) for name in here):
        _log_thumbnail(target, run, picture, Path(here[0]).stem)
        added["images"] += 1


def _log_thumbnail(target: Target, run: Run, picture: Any, name: str) -> None:
    """Completes an interrupted `log_image`: logs the thumbnail and the tag that MLflow sends after the picture."""
    from mlflow import Image
    from mlflow.tracking.multimedia import compress_image_size
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

    with tempfile.TemporaryDirectory(prefix="ddpm-image-") as folder:
        path = Path(folder) / f"{name}{COMPRESSED}"
        compress_image_size(Image(picture).to_pil()).save(path)
        target.client.log_artifact(run.info.run_id, str(path), "images")
    target.client.set_tag(run.info.run_id, MLFLOW_LOGGED_IMAGES, True)


def same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))


def find_or_create(
    target: Target,
    key: str,
    name: str,
    agrees: Callable[[Run], bool],
    start: int,
    tags: Mapping[str, str],
    added: Counter[str],
) -> Run:
    """Returns the run with this key whose content agrees with the outputs. Creates the run if there is none.

    Other runs with this key are tagged as superseded. Unfinished runs with the same outputs are deleted instead. A run to which a
    training is still streaming is left unchanged.

    Args:
        target: the store and experiment.
        key: the value of the tag KEY.
        name: the name of a new run.
        agrees: returns whether the content of a run agrees with the outputs.
        start: the start time of a new run, in milliseconds since the epoch.
        tags: further tags of a new run.
        added: the counters of added items; a new run adds 1 to added["runs"].
    """
    runs = [run for run in search(target, f"tags.`{KEY}` = '{key}'") if not is_live(run)]
    runs.sort(key=lambda run: (SUPERSEDED in run.data.tags, is_unfinished(run), -run.info.start_time))
    agreeing = [run for run in runs if agrees(run)]
    if agreeing:
        chosen = agreeing[0]
    else:
        chosen = target.client.create_run(
            target.experiment,
            start_time=start,
            run_name=name,
            tags={KEY: key, "mlflow.source.name": "ddpm", PUBLISHER: this_process(), **tags},
        )
        added["runs"] += 1
    for run in runs:
        if run.info.run_id == chosen.info.run_id:
            continue
        if is_unfinished(run) and run in agreeing:
            target.client.delete_run(run.info.run_id)  # a streamed run with the same outputs as the chosen run
        elif SUPERSEDED not in run.data.tags:
            _supersede(target, run, name, chosen.info.run_id)
    if SUPERSEDED in chosen.data.tags:
        target.client.delete_tag(chosen.info.run_id, SUPERSEDED)
        target.client.update_run(chosen.info.run_id, name=name)
        chosen = target.client.get_run(chosen.info.run_id)
    return chosen


def _supersede(target: Target, run: Run, name: str, by: str) -> None:
    target.client.set_tag(run.info.run_id, SUPERSEDED, by)
    target.client.update_run(run.info.run_id, name=f"{name} (superseded)")
    if run.info.status == "RUNNING":
        target.client.set_terminated(run.info.run_id, "KILLED")


def search(target: Target, where: str) -> list[Run]:
    runs, token = [], None
    while True:
        page = target.client.search_runs([target.experiment], where, page_token=token)
        runs += list(page)
        token = page.token
        if not token:
            return runs


def finish(target: Target, run: Run, end: int) -> None:
    if run.info.status != "FINISHED" or (run.info.end_time or 0) < end:
        target.client.set_terminated(run.info.run_id, "FINISHED", end)
    if PUBLISHER in run.data.tags:
        target.client.delete_tag(run.info.run_id, PUBLISHER)


def is_live(run: Run) -> bool:
    """Returns whether the training that streams to this run may still be running.

    A process on another host cannot be checked, so it counts as running.
    """
    if run.info.status != "RUNNING" or PROCESS not in run.data.tags:
        return False
    process = run.data.tags[PROCESS]
    return not is_here(process) or is_alive(process)


def is_unfinished(run: Run) -> bool:
    """Returns whether a training streamed to this run, and its outputs are not published yet."""
    return PROCESS in run.data.tags and MODEL not in run.data.tags


def end_orphans(target: Target) -> None:
    """Ends each run whose process died before the run ended."""
    for run in search(target, "attributes.status = 'RUNNING'"):
        process = run.data.tags.get(PROCESS) or run.data.tags.get(PUBLISHER)
        if process and is_here(process) and not is_alive(process):
            target.client.set_terminated(run.info.run_id, "KILLED")
