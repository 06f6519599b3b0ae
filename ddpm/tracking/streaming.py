"""Streams the loss curves and previews of a training to MLflow while the training runs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ddpm.errors import InputError
from ddpm.files import arrays, dataset
from ddpm.files.params import Params
from ddpm.runtime.processes import this_process
from ddpm.runtime.progress import Progress
from ddpm.tracking.lineage import digest, flat, training_identity
from ddpm.tracking.place import Say, Target, locked, open_target, plain_errors, require_reachable, warn
from ddpm.tracking.publish.publishing import training_tags
from ddpm.tracking.runs import (
    CURVES,
    KEY,
    PROCESS,
    SUPERSEDED,
    chunks,
    history,
    is_live,
    is_unfinished,
    log,
    log_image,
    search,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

FLUSH_SECONDS = 10.0  # the interval between two batches


class TrainingWatch:
    """A progress callback that streams a training's loss curves to an MLflow run. A separate thread sends them in batches."""

    def __init__(self, params: Params, schedule: str, root: Path, say: Say) -> None:
        self._params, self._schedule, self._root, self._say = params, schedule, root, say
        self._values: list[tuple[str, float, int, int]] = []  # key, value, timestamp, step
        self._pictures: list[tuple[int, arrays.Images, int]] = []
        self._mutex, self._wake, self._ending = threading.Lock(), threading.Event(), False
        self._step, self._started = 0, threading.Event()
        self._target: Target | None = None
        self._run: Run | None = None
        self._known: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._stream, name="tracking", daemon=True)
        psutil.cpu_percent()  # later calls return the load since this call
        self._thread.start()

    def __call__(self, progress: Progress) -> None:
        now = _now()
        with self._mutex:
            self._step = progress.done
            self._values += [
                (key, progress.values[key], now, progress.done) for key in CURVES if key in progress.values
            ]
        if progress.done:
            self._started.set()

    def log_preview(self, step: int, picture: arrays.Images) -> None:
        """Streams a sample grid, uint8 C,H,W, that was drawn after this training step."""
        with self._mutex:
            self._pictures.append((step, picture, _now()))

    def log_preview_fid(self, step: int, fid: float) -> None:
        """Streams the FID of images that were drawn after this training step, as the metric `preview_fid`."""
        with self._mutex:
            self._values.append(("preview_fid", fid, _now(), step))

    def close(self, status: str, seconds: float = 60) -> None:
        """Sends the remaining values and ends the run as FINISHED, FAILED or KILLED. Gives up after `seconds`."""
        self._ending = True
        self._started.set()
        self._wake.set()
        self._thread.join(timeout=seconds)
        if self._thread.is_alive() or self._target is None or self._run is None:
            return
        try:
            with plain_errors(self._target.place):
                self._target.client.set_terminated(self._run.info.run_id, status)
        except InputError as error:
            warn(str(error), self._say)

    def _stream(self) -> None:
        self._started.wait()  # a training that fails before its first step creates no mlflow.db
        while self._step:
            ending = self._ending
            try:
                self._flush()
            except InputError as error:
                warn(str(error), self._say)
            except Exception as error:  # noqa: BLE001 - tracking must not fail the training
                warn(f"streaming to MLflow failed ({type(error).__name__}: {error})", self._say)
            if ending:
                return
            self._wake.wait(FLUSH_SECONDS)

    def _flush(self) -> None:
        if self._target is None:
            self._target = open_target(self._params, self._root)
        else:
            require_reachable(self._target.place)
        with plain_errors(self._target.place), locked(self._target.place):
            from mlflow.entities import Metric

            if self._run is None:
                self._run = _open_training(self._target, self._params, self._schedule, self._root)
                self._known = {
                    (key, step) for key in self._run.data.metrics for step in history(self._target, self._run, key)
                }
            load = _system_load()
            with self._mutex:
                # The load is stored with the other values, so that a batch that is sent again has the same time stamps.
                self._values += [(key, value, _now(), self._step) for key, value in load.items()]
                values, pictures = list(self._values), list(self._pictures)
            new = {(value[0], value[3]): Metric(*value) for value in values}
            missing = [metric for name, metric in new.items() if name not in self._known]
            for chunk in chunks(missing, 1000):
                self._target.client.log_batch(self._run.info.run_id, metrics=chunk)
            self._known |= set(new)
            for picture_step, picture, timestamp in pictures:
                image = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
                log_image(self._target, self._run, image, picture_step, timestamp, Counter())
        with self._mutex:
            del self._values[: len(values)], self._pictures[: len(pictures)]


def _now() -> int:
    return int(time.time() * 1000)


def _system_load() -> dict[str, float]:
    """Returns the load of the machine, under the names that MLflow's tab "System metrics" shows."""
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    memory = psutil.virtual_memory()
    load = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    try:
        monitor = GPUMonitor()
    except (ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
        pass
    else:
        monitor.collect_metrics()
        load |= monitor.aggregate_metrics()
    return {f"system/{name}": value for name, value in load.items()}


def _open_training(target: Target, params: Params, schedule: str, root: Path) -> Run:
    """Returns the MLflow run of an interrupted training with the same parameters, schedule and data, or else a new run."""
    data = dataset.read_dataset_record(root)
    identity = training_identity(params, schedule, data.sha256)
    tags = {**training_tags(schedule, data.name, identity), PROCESS: this_process()}
    interrupted = [
        run
        for run in search(target, f"tags.`{KEY}` = '{digest(identity)}'")
        if is_unfinished(run) and SUPERSEDED not in run.data.tags and not is_live(run)
    ]
    if interrupted:
        run = max(interrupted, key=lambda run: run.info.start_time)
        target.client.update_run(run.info.run_id, status="RUNNING")
        log(target, run, tags=tags)
    else:
        run = target.client.create_run(
            target.experiment,
            start_time=_now(),
            run_name=schedule,
            tags={KEY: digest(identity), "mlflow.source.name": "ddpm", **tags},
        )
        log(target, run, flat(identity))
    return target.client.get_run(run.info.run_id)


@contextmanager
def watch_training(params: Params, schedule: str, root: Path = Path(), say: Say = print) -> Iterator[TrainingWatch]:
    """Streams a training to MLflow while the `with` block runs.

    Call the yielded TrainingWatch with each Progress, and its method `log_preview` with sample grids.

    The MLflow run ends as FINISHED, FAILED after an error, or KILLED after a signal. If MLflow cannot be reached, the
    training continues after one warning.

    Args:
        params: the content of params.yaml.
        schedule: the name of the trained schedule, which is a row of `schedules` in params.yaml.
        root: the top of the checkout.
        say: prints a line for the user.
    """
    watch = TrainingWatch(params, schedule, root, say)
    try:
        yield watch
    except Exception:
        watch.close("FAILED")
        raise
    except BaseException:  # KeyboardInterrupt or Stopped: the process must end soon
        watch.close("KILLED", seconds=5)
        raise
    watch.close("FINISHED")
