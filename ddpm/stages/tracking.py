"""MLflow as a view over outputs, and its model registry.

One experiment per dataset, `ddpm-DATASET`, holds a run per schedule (`linear`: loss curves, the checkpoint), below it a run
per schedule and sampler (`linear-ddim`: scores and sample grids at step = network evaluations), and a run `report`.

Nothing is kept in an output to find a run again. The tag `ddpm.key` hashes all that was configured, `ddpm.model_sha256`
names the weights, `ddpm.samples.STEPS` and `ddpm.scores.STEPS` the files of a point. Where the same configuration gave other
outputs (code was edited), they go to a new run and the old one is tagged `ddpm.superseded`: no step of a metric ever has
two values. Times are those of the run files beside the outputs; without such a file they are 2000-01-01, for unknown.

This module is the only importer of mlflow (with served.py, which MLflow itself runs), and imports it late: it takes 2 s.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import socket
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import psutil
from filelock import FileLock, Timeout

from ddpm.stages import store
from ddpm.stages.errors import InputError
from ddpm.stages.params import Evaluation, Params, Point, Sampler, Sampling
from ddpm.stages.progress import Progress
from ddpm.stages.promote import Decision, Protocol, Score, decide

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

Say = Callable[[str], None]

CURVES = ("loss", "learning_rate", "gradient_norm", "validation_loss")
SCORES = ("fid", "kid")
UNKNOWN_TIME = 946_684_800_000  # 2000-01-01: a run without a run file
FLUSH_SECONDS = 10.0
CONNECT_SECONDS = 3.0
LOCK_SECONDS = 120.0
CHAMPION = "champion"

KEY, MODEL, CURVES_SHA = "ddpm.key", "ddpm.model_sha256", "ddpm.curves_sha256"
SUPERSEDED, PROCESS, SETTINGS = "ddpm.superseded", "ddpm.process", "ddpm.settings"

# Bounded waiting, and quiet. What the user has set stays.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_UV_AUTO_DETECT": "false",
}

# What the registered model carries of this package: the import graph of ddpm.stages.sample.
SERVED_MODULES = (
    "__init__",
    "denoiser",
    "noise",
    "samplers",
    "schedule",
    "timesteps",
    "unet",
    "stages/__init__",
    "stages/checkpoint",
    "stages/errors",
    "stages/params",
    "stages/progress",
    "stages/sample",
    "stages/store",
)
SERVED_PACKAGES = ("torch", "numpy", "safetensors", "pydantic", "ruamel.yaml")


# Where MLflow's data lie.


@dataclass(frozen=True)
class Place:
    """A tracking store. artifacts: the folder for new experiments, or None where a server decides."""

    uri: str
    lock: Path
    artifacts: Path | None

    @property
    def shown(self) -> str:
        """The URI without a password."""
        return re.sub(r"//[^/@]*@", "//", self.uri)


def repo_root(root: Path = Path()) -> Path:
    """The checkout that `root` belongs to; a temporary experiment of DVC lies in .dvc/tmp/exps of its own."""
    path = root.resolve()
    parts = path.parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return path


def tracking_uri(root: Path = Path()) -> str:
    """MLFLOW_TRACKING_URI if it is set, else mlflow.db at the root of the checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{quote(str(repo_root(root) / 'mlflow.db'))}"


def place(root: Path = Path()) -> Place:
    """The store that `tracking_uri` names, its lock, and where its artifacts go."""
    uri, home = tracking_uri(root), repo_root(root)
    lock, artifacts = home / store.CACHE / "mlflow.lock", home / "mlartifacts"
    scheme, _, rest = uri.partition(":///")
    if scheme.partition("+")[0] == "sqlite" and rest:
        file = Path(unquote(rest.partition("?")[0])).resolve()
        uri = f"{scheme}:///{quote(str(file))}{''.join(rest.partition('?')[1:])}"
        lock, artifacts = file.with_name(f"{file.name}.lock"), file.parent / "mlartifacts"
    return Place(uri, lock, None if scheme.partition(":")[0] in ("http", "https") else artifacts)


def model_name(params: Params) -> str:
    """The experiment's and the registered model's: ddpm-DATASET."""
    return f"ddpm-{params.data.source}"


def champion_uri(params: Params) -> str:
    return f"models:/{model_name(params)}@{CHAMPION}"


@dataclass(frozen=True)
class Target:
    """An open store and the experiment in it."""

    client: MlflowClient
    experiment: str
    place: Place


def prepare_store(params: Params, root: Path = Path()) -> str:
    """Creates the store and the experiment if they are missing, once however many processes ask; gives the experiment's id.

    Raises InputError.
    """
    return _open(params, root).experiment


def _import_mlflow() -> None:
    """The first import of mlflow reads the environment."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401


def _client(where: Place) -> MlflowClient:
    """Call it under the lock: the first client of a database file migrates it."""
    _import_mlflow()
    from mlflow.tracking import MlflowClient

    return MlflowClient(where.uri, registry_uri=where.uri)


def _open(params: Params, root: Path) -> Target:
    where, name = place(root), model_name(params)
    _require_reachable(where)
    with _plain_errors(where), _locked(where):
        client = _client(where)
        return Target(client, _experiment(client, where, name, params.data.source), where)


def _experiment(client: MlflowClient, where: Place, name: str, dataset: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = (where.artifacts / name).as_uri() if where.artifacts else None
        tags = {
            "ddpm.dataset": dataset,
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.note.content": f"Denoising diffusion on {dataset}: a run per schedule, with a child per sampler whose"
            " `fid` is logged at step = network evaluations.",
        }
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another host was quicker
    if found is None or found.lifecycle_stage != "active":
        raise InputError(f"MLflow at {where.shown}: experiment {name} was deleted; restore it, or delete it for good")
    if where.artifacts and found.artifact_location.startswith("mlflow-artifacts:"):
        raise InputError(
            f"MLflow at {where.shown}: experiment {name} keeps its artifacts behind a server;"
            " set MLFLOW_TRACKING_URI to that server"
        )
    return str(found.experiment_id)


@contextmanager
def _locked(where: Place, name: str = "") -> Iterator[None]:
    where.lock.parent.mkdir(parents=True, exist_ok=True)
    path = where.lock.with_name(where.lock.name + name)
    try:
        with FileLock(path, timeout=LOCK_SECONDS if not name else -1):
            yield
    except Timeout:
        raise InputError(f"MLflow at {where.shown} is in use by another process since {LOCK_SECONDS:.0f} s") from None


# An unreachable server.


def _require_reachable(where: Place) -> None:
    """A quick look before mlflow is even imported: its own attempts take far longer. Raises InputError."""
    parts = urlsplit(where.uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        raise InputError(_unreachable(where)) from None


def _unreachable(where: Place) -> str:
    return f"MLflow at {where.shown} cannot be reached; publish later with `ddpm publish`"


@contextmanager
def _plain_errors(where: Place) -> Iterator[None]:
    """What MLflow, its server or the disk answer becomes one line. Raises InputError."""
    _import_mlflow()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        text = " ".join(str(error).split())
        if "API request to" in text or isinstance(error, ConnectionError):
            raise InputError(_unreachable(where)) from error
        raise InputError(f"MLflow at {where.shown}: {text[:300]}; publish later with `ddpm publish`") from error


_warned: set[str] = set()


def _warn(line: str, say: Say) -> None:
    """Once a process."""
    if line not in _warned:
        _warned.add(line)
        say(f"warning: {line}")


def publish_or_warn(params: Params, root: Path = Path(), only: str | None = None, say: Say = print) -> None:
    """`publish` at the end of a stage, whose outputs are safe by now: whatever goes wrong is one line and no more."""
    try:
        publish(params, root, only, say)
    except InputError as error:
        _warn(str(error), say)
    except Exception as error:  # noqa: BLE001 - who watches must not fail the work
        _warn(f"publishing {only or ''} failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})", say)


# Publishing.


def publish(params: Params, root: Path = Path(), only: str | None = None, say: Say = print) -> dict[str, int]:
    """Fills in what MLflow lacks of the outputs below `root`; counts what was added: runs, metrics, images, models, files.

    only: the output of one stage, such as "prepare", "train@linear", "sample@linear-ddim-50" or "report"; without it,
    all there is, and a line about it. An output older than what it was made from is left out. Raises InputError.
    """
    target, added = _open(params, root), Counter[str]()
    stage, _, item = (only or "").partition("@")
    with _plain_errors(target.place), _locked(target.place):
        if stage == "train":
            _publish_training(target, root, item, added)
        elif stage in ("sample", "evaluate"):
            point = Point.parse(item)
            _publish_points(target, root, [(point, PointSettings.of(params, point))], added)
        elif stage == "report":
            _publish_report(target, root, added)
        elif not stage:
            stale = _publish_all(target, params, root, added)
            for name in stale:
                say(f"publish: {name} left out: made with another model or other parameters; run dvc repro")
            summary = ", ".join(f"{count} {kind}" for kind, count in added.items())
            say(f"MLflow at {target.place.shown}: " + (f"added {summary}" if summary else "nothing to add"))
    return dict(added)


def _publish_all(target: Target, params: Params, root: Path, added: Counter[str]) -> list[str]:
    _end_orphans(target)
    for folder in sorted((root / "models").glob("*/model.json")):
        _publish_training(target, root, folder.parent.name, added)
    stages, groups, stale = _dvc_lock(root), dict[str, list[tuple[Point, PointSettings]]](), []
    for path in sorted((root / "samples").glob("*.npz")):
        point = Point.parse(path.stem)
        settings = _settings(params, point, root, stages)
        if settings is None:
            stale.append(point.name)
        else:
            identity = json.dumps([point.schedule, point.sampler, asdict(settings)])
            groups.setdefault(identity, []).append((point, settings))
    for group in groups.values():
        _publish_points(target, root, group, added)
    _publish_report(target, root, added)
    return stale


# What made an output.


@dataclass(frozen=True)
class PointSettings:
    """The parameters of a point: its sampler's row, and the sections that its stages depend on."""

    seed: int
    row: dict[str, Any]
    sampling: dict[str, Any]
    evaluation: dict[str, Any]

    @classmethod
    def of(cls, params: Params, point: Point) -> PointSettings:
        """Raises InputError when params has no such row."""
        if point.sampler not in params.samplers:
            raise InputError(f"no row '{point.sampler}' in samplers; there are {', '.join(params.samplers)}")
        return cls(
            params.seed,
            params.samplers[point.sampler].options(),
            params.sampling.model_dump(mode="json"),
            params.evaluation.model_dump(mode="json"),
        )


def _dvc_lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock, or nothing."""
    path = root / "dvc.lock"
    if not path.exists():
        return {}
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        lock = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    return dict(lock.get("stages") or {})


def _locked_md5(stages: Mapping[str, Any], stage: str, kind: str, path: Path) -> str | None:
    """The hash that dvc.lock holds for a stage's "outs" or "deps" at that path."""
    entries = stages.get(stage, {}).get(kind, [])
    return next((entry.get("md5") for entry in entries if entry.get("path") == path.as_posix()), None)


def _is_locked(stages: Mapping[str, Any], stage: str, root: Path, path: Path) -> bool:
    """Whether dvc.lock speaks of just this file."""
    recorded = _locked_md5(stages, stage, "outs", path)
    if recorded is None or not (root / path).exists():
        return False
    with (root / path).open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == recorded


def _settings(params: Params, point: Point, root: Path, stages: Mapping[str, Any]) -> PointSettings | None:
    """What a point on disk was made with, by dvc.lock if that knows the file, else by `params`; None when it is stale."""
    sample, evaluate = f"sample@{point.name}", f"evaluate@{point.name}"
    if point.sampler in params.samplers:
        settings = asdict(PointSettings.of(params, point))
    else:
        settings = {"seed": params.seed, "row": None, "sampling": {}, "evaluation": params.evaluation.model_dump()}
    try:
        if _is_locked(stages, sample, root, store.samples_file(point)):
            model = store.model_dir(point.schedule)
            made = _locked_md5(stages, f"train@{point.schedule}", "outs", model)
            if made != _locked_md5(stages, sample, "deps", model):
                return None
            values = stages[sample]["params"]["params.yaml"]
            settings["seed"] = values["seed"]
            settings["row"] = Sampler.model_validate(values[f"samplers.{point.sampler}"]).options()
            settings["sampling"] = Sampling.model_validate(values["sampling"]).model_dump(mode="json")
        if _is_locked(stages, evaluate, root, store.metrics_file(point)):
            values = stages[evaluate]["params"]["params.yaml"]
            settings["evaluation"] = Evaluation.model_validate(values["evaluation"]).model_dump(mode="json")
    except (KeyError, ValueError):  # made when params.yaml had other keys
        return None
    return PointSettings(**settings) if settings["row"] is not None else None


def _training_identity(params: Params, schedule: str, dataset: str) -> dict[str, Any]:
    """All that was configured of a training. dataset: sha256."""
    sections = params.model_dump(mode="json", include={"seed", "diffusion", "network", "training"})
    return {"schedule": schedule, "dataset_sha256": dataset, **sections}


def _identity_of_model(about: Mapping[str, Any]) -> dict[str, Any]:
    """The same, from model.json."""
    training = dict(about["training"])
    derived = ("kind", "image_channels", "image_size")  # they follow from the data
    return {
        "schedule": about["schedule"]["name"],
        "dataset_sha256": about["data"]["sha256"],
        "seed": training.pop("seed"),
        "diffusion": {"timesteps": about["schedule"]["timesteps"], "target": about["target"]},
        "network": {name: value for name, value in about["network"].items() if name not in derived},
        "training": training,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings -> MLflow parameters with dotted names."""
    flat: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{name}.")
        else:
            flat[prefix + name] = item if isinstance(item, str) else json.dumps(item)
    return flat


def _run_file(root: Path, output: Path) -> dict[str, Any]:
    """When, where and how fast an output was made; empty when that is not known."""
    path = root / store.run_file(output)
    return store.read_json(path) if path.exists() else {}


# Runs.


def _log(
    target: Target, run: Run, params: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
) -> None:
    """Parameters and tags that the run lacks or has otherwise."""
    from mlflow.entities import Param, RunTag

    new_params = [Param(name, value) for name, value in (params or {}).items() if name not in run.data.params]
    new_tags = [RunTag(name, value) for name, value in (tags or {}).items() if run.data.tags.get(name) != value]
    for chunk in _chunks(new_params, 100):
        target.client.log_batch(run.info.run_id, params=chunk)
    for chunk in _chunks(new_tags, 100):
        target.client.log_batch(run.info.run_id, tags=chunk)


def _chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _history(target: Target, run: Run, key: str) -> dict[int, float]:
    """step -> value of a metric."""
    if key not in run.data.metrics:
        return {}
    return {metric.step: metric.value for metric in target.client.get_metric_history(run.info.run_id, key)}


def _log_metrics(target: Target, run: Run, metrics: Sequence[Metric], added: Counter[str]) -> None:
    """Those whose step has no value yet."""
    known = {key: _history(target, run, key) for key in {metric.key for metric in metrics}}
    missing = [metric for metric in metrics if metric.step not in known[metric.key]]
    for chunk in _chunks(missing, 1000):
        target.client.log_batch(run.info.run_id, metrics=chunk)
    if missing:
        added["metrics"] += len(missing)


def _log_image(target: Target, run: Run, picture: Any, step: int, timestamp: int, added: Counter[str]) -> None:
    """A PIL image or an array H,W(,3) under the key `samples`, unless that step has one."""
    known = [Path(file.path).name for file in target.client.list_artifacts(run.info.run_id, "images")]
    if not any(name.startswith(f"samples+step+{step}+") for name in known):
        target.client.log_image(run.info.run_id, picture, key="samples", step=step, timestamp=timestamp)
        added["images"] += 1


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))


def _find_or_create(
    target: Target,
    key: str,
    name: str,
    agrees: Callable[[Run], bool],
    start: int,
    tags: Mapping[str, str],
    added: Counter[str],
) -> Run:
    """The run of that key whose content agrees with the outputs at hand; any other becomes superseded."""
    runs = [run for run in _search(target, f"tags.`{KEY}` = '{key}'") if not _is_live(run)]
    runs.sort(key=lambda run: (SUPERSEDED in run.data.tags, _is_unfinished(run), -run.info.start_time))
    agreeing = [run for run in runs if agrees(run)]
    if agreeing:
        chosen = agreeing[0]
    else:
        chosen = target.client.create_run(
            target.experiment, start_time=start, run_name=name, tags={KEY: key, "mlflow.source.name": "ddpm", **tags}
        )
        added["runs"] += 1
    for run in runs:
        if run.info.run_id == chosen.info.run_id:
            continue
        if _is_unfinished(run) and run in agreeing:
            target.client.delete_run(run.info.run_id)  # the live view of a training that gave what an earlier one gave
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


def _search(target: Target, where: str) -> list[Run]:
    runs, token = [], None
    while True:
        page = target.client.search_runs([target.experiment], where, page_token=token)
        runs += list(page)
        token = page.token
        if not token:
            return runs


def _finish(target: Target, run: Run, end: int) -> None:
    if run.info.status != "FINISHED" or (run.info.end_time or 0) < end:
        target.client.set_terminated(run.info.run_id, "FINISHED", end)


def _this_process() -> str:
    process = psutil.Process()
    return f"{platform.node()} {process.pid} {process.create_time():.2f}"


def _is_live(run: Run) -> bool:
    """Whether a process is streaming to it: one that runs here, or one of another host, of which nothing is known."""
    if run.info.status != "RUNNING" or PROCESS not in run.data.tags:
        return False
    host, pid, created = run.data.tags[PROCESS].split(" ")
    if host != platform.node():
        return True
    try:
        process = psutil.Process(int(pid))
        return f"{process.create_time():.2f}" == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_unfinished(run: Run) -> bool:
    """A training that was streamed and whose outputs were not published."""
    return PROCESS in run.data.tags and MODEL not in run.data.tags


def _end_orphans(target: Target) -> None:
    """Runs whose process was killed before it could end them."""
    for run in _search(target, "attributes.status = 'RUNNING'"):
        if PROCESS in run.data.tags and not _is_live(run):
            target.client.set_terminated(run.info.run_id, "KILLED")


# The run of a schedule.


def _publish_training(target: Target, root: Path, schedule: str, added: Counter[str]) -> Run | None:
    """None when there is no such model on disk."""
    folder, history = root / store.model_dir(schedule), root / store.history_file(schedule)
    if not (folder / "model.json").exists() or not history.exists():
        return None
    about = store.read_json(folder / "model.json")
    weights, curves = about["weights_sha256"], store.sha256(history)
    identity, times = _identity_of_model(about), _run_file(root, store.model_dir(schedule))
    start, end = times.get("started", UNKNOWN_TIME), times.get("ended", UNKNOWN_TIME)
    rows = store.read_csv(history)
    values = {key: {int(row["step"]): float(row[key]) for row in rows if row.get(key)} for key in CURVES}

    def agrees(run: Run) -> bool:
        if MODEL in run.data.tags:
            return run.data.tags[MODEL] == weights and run.data.tags.get(CURVES_SHA) == curves
        return all(
            step in values[key] and _same(value, values[key][step])
            for key in CURVES
            for step, value in _history(target, run, key).items()
        )

    key = _digest(identity)
    tags = _training_tags(schedule, about["data"]["name"], identity)
    run = _find_or_create(target, key, schedule, agrees, start, tags, added)
    if run.data.tags.get(MODEL) == weights:
        return run
    _log(target, run, _flat(identity), {**tags, **_commit(times)})
    _log_dataset(target, run, root, about["data"], "training")
    last = max((step for steps in values.values() for step in steps), default=1)
    _log_metrics(target, run, _curve_metrics(values, last, start, end), added)
    _log_metrics(target, run, _measurements(times, about, last, end), added)
    _log_checkpoint(target, run, folder, about, last, added)
    _finish(target, run, end)
    _log(target, run, tags={MODEL: weights, CURVES_SHA: curves})
    return target.client.get_run(run.info.run_id)


def _training_tags(schedule: str, dataset: str, identity: Mapping[str, Any]) -> dict[str, str]:
    steps = identity["training"]["steps"]
    return {
        "ddpm.stage": "train",
        "ddpm.schedule": schedule,
        "ddpm.dataset": dataset,
        "ddpm.dataset_sha256": identity["dataset_sha256"],
        "mlflow.note.content": f"The {schedule} schedule, {steps:,} training steps on {dataset}."
        " Its child runs hold the scores, one run per sampler.",
    }


def _commit(times: Mapping[str, Any]) -> dict[str, str]:
    """Tags about where the output was made."""
    if not times:
        return {"ddpm.times": "unknown"}
    tags = {"ddpm.device": str(times.get("device")), "ddpm.hardware": json.dumps(times.get("hardware"))}
    if times.get("git_commit"):
        tags["mlflow.source.git.commit"] = times["git_commit"]
        tags["mlflow.source.git.dirty"] = str(times.get("git_dirty", False)).lower()
    return tags


def _curve_metrics(values: Mapping[str, Mapping[int, float]], last: int, start: int, end: int) -> list[Metric]:
    """At even times between start and end."""
    from mlflow.entities import Metric

    return [
        Metric(key, value, start + (end - start) * step // last, step)
        for key, steps in values.items()
        for step, value in steps.items()
    ]


def _measurements(times: Mapping[str, Any], about: Mapping[str, Any], last: int, end: int) -> list[Metric]:
    from mlflow.entities import Metric

    measured = {}
    if times.get("per_second") and times.get("unit") == "steps":
        measured["images_per_second"] = times["per_second"] * about["training"]["batch"]
    measured |= _peak_memory(times)
    return [Metric(key, value, end, last) for key, value in measured.items()]


def _peak_memory(times: Mapping[str, Any]) -> dict[str, float]:
    names = {
        "peak_memory_bytes": "system/peak_memory_megabytes",
        "gpu_peak_memory_bytes": "system/gpu_peak_memory_megabytes",
    }
    return {metric: times[name] / 1e6 for name, metric in names.items() if times.get(name)}


def _log_dataset(target: Target, run: Run, root: Path, data: Mapping[str, Any], context: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    md5 = _locked_md5(_dvc_lock(root), "prepare", "outs", store.dataset_dir()) or ""
    counts = {}
    about = root / store.dataset_dir() / "dataset.json"
    if about.exists() and store.read_json(about).get("sha256") == data["sha256"]:
        counts = store.read_json(about)["counts"]
    elif md5:
        md5 = ""  # dvc.lock speaks of another version
    dataset = Dataset(
        name=data["name"],
        digest=data["sha256"][:16],
        source_type="dvc",
        source=json.dumps({"path": str(store.dataset_dir()), "sha256": data["sha256"], "md5": md5 or None}),
        schema=json.dumps({"shape": data["shape"], "dtype": "uint8", "classes": data["classes"]}),
        profile=json.dumps(counts),
    )
    tags = [InputTag("mlflow.data.context", context), InputTag("ddpm.dataset_sha256", data["sha256"])]
    if md5:
        tags.append(InputTag("ddpm.dataset_md5", md5))
        target.client.set_tag(run.info.run_id, "ddpm.dataset_md5", md5)
    target.client.log_inputs(run.info.run_id, [DatasetInput(dataset, tags)])


def _checkpoint_model(target: Target, run: Run, weights: str) -> Any:
    """The logged model of a training run with those weights, or None."""
    found = target.client.search_logged_models([target.experiment], f"tags.`{MODEL}` = '{weights}'")
    return next((model for model in found if model.source_run_id == run.info.run_id), None)


def _log_checkpoint(
    target: Target, run: Run, folder: Path, about: Mapping[str, Any], step: int, added: Counter[str]
) -> None:
    """safetensors and JSON, as they are."""
    from mlflow.entities import LoggedModelOutput

    model = _checkpoint_model(target, run, about["weights_sha256"])
    if model is None:
        model = target.client.create_logged_model(
            target.experiment,
            name=about["schedule"]["name"],
            source_run_id=run.info.run_id,
            tags={MODEL: about["weights_sha256"], "ddpm.dataset": about["data"]["name"]},
            params=_flat({"network": about["network"], "target": about["target"], "schedule": about["schedule"]}),
            model_type="diffusion",
        )
        added["models"] += 1
    if str(model.status) != "READY":
        target.client.log_model_artifacts(model.model_id, str(folder))
        target.client.finalize_logged_model(model.model_id, "READY")
        target.client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])


# The run of a schedule and sampler.


@dataclass(frozen=True)
class PointFiles:
    """What is on disk of a point. metrics: None before it was evaluated, or when that was done on other samples."""

    point: Point
    evaluations: int
    samples: str  # sha256
    metrics: dict[str, Any] | None
    scores: str  # sha256 of the metrics file
    sampled: dict[str, Any]  # run files
    evaluated: dict[str, Any]

    @classmethod
    def read(cls, root: Path, point: Point) -> PointFiles:
        path, scores = store.samples_file(point), store.metrics_file(point)
        samples = store.sha256(root / path)
        metrics = store.read_json(root / scores) if (root / scores).exists() else None
        if metrics is not None and metrics["samples"] != samples:
            metrics = None
        evaluations = metrics["evaluations"] if metrics else store.read_evaluations(root / path)
        return cls(
            point,
            evaluations,
            samples,
            metrics,
            store.sha256(root / scores) if metrics else "",
            _run_file(root, path),
            _run_file(root, scores) if metrics else {},
        )

    @property
    def times(self) -> list[dict[str, Any]]:
        return [times for times in (self.sampled, self.evaluated) if times]

    @property
    def tags(self) -> dict[str, str]:
        tags = {f"ddpm.samples.{self.point.steps}": self.samples}
        return tags | {f"ddpm.scores.{self.point.steps}": self.scores} if self.scores else tags


def _publish_points(
    target: Target, root: Path, group: Sequence[tuple[Point, PointSettings]], added: Counter[str]
) -> Run | None:
    """Points of one schedule, sampler and settings. None when there is nothing on disk."""
    first, settings = group[0]
    training = _publish_training(target, root, first.schedule, added)
    points = [PointFiles.read(root, point) for point, _ in group if (root / store.samples_file(point)).exists()]
    if training is None or not points:
        return None
    about = store.read_json(root / store.model_dir(first.schedule) / "model.json")
    weights = about["weights_sha256"]

    def agrees(run: Run) -> bool:
        if run.data.tags.get(MODEL) != weights:
            return False
        return all(run.data.tags.get(tag, value) == value for files in points for tag, value in files.tags.items())

    key = _digest([training.data.tags[KEY], first.sampler, asdict(settings)])
    name = f"{first.schedule}-{first.sampler}"
    start = min((times["started"] for files in points for times in files.times), default=UNKNOWN_TIME)
    tags = {
        **_point_tags(first, about, settings),
        MODEL: weights,
        "mlflow.parentRunId": training.info.run_id,
        **_commit(points[0].evaluated or points[0].sampled),
    }
    run = _find_or_create(target, key, name, agrees, start, tags, added)
    if not run.data.params:
        _log(target, run, _point_params(first, about, settings))
        _log_dataset(target, run, root, about["data"], "evaluation")
        _link_model(target, run, training, weights)
    for files in points:
        if any(run.data.tags.get(tag) != value for tag, value in files.tags.items()):
            _publish_point(target, root, run, files, added)
    _finish(target, run, max((times["ended"] for files in points for times in files.times), default=UNKNOWN_TIME))
    return run


def _point_tags(point: Point, about: Mapping[str, Any], settings: PointSettings) -> dict[str, str]:
    layer, images = settings.evaluation["layer"], settings.evaluation["images"]
    return {
        "ddpm.stage": "sample",
        "ddpm.schedule": point.schedule,
        "ddpm.sampler": point.sampler,
        "ddpm.dataset": about["data"]["name"],
        "ddpm.dataset_sha256": about["data"]["sha256"],
        "mlflow.note.content": f"Sampler {point.sampler} on the {point.schedule} schedule. Step = network evaluations per"
        f" image. FID (lower is better) of at most {images:,} samples, at Inception layer {layer}.",
    }


def _point_params(point: Point, about: Mapping[str, Any], settings: PointSettings) -> dict[str, str]:
    sections = {"seed": settings.seed, "sampling": settings.sampling, "evaluation": settings.evaluation}
    names = {"schedule": point.schedule, "sampler": point.sampler, "dataset": about["data"]["name"]}
    return _flat({**names, "sampler_row": settings.row, **sections})


def _link_model(target: Target, run: Run, training: Run, weights: str) -> None:
    from mlflow.entities import LoggedModelInput

    model = _checkpoint_model(target, training, weights)
    if model is not None:
        target.client.log_inputs(run.info.run_id, models=[LoggedModelInput(model.model_id)])


def _publish_point(target: Target, root: Path, run: Run, files: PointFiles, added: Counter[str]) -> None:
    from mlflow.entities import Metric
    from PIL import Image

    sampled, evaluated = (times.get("ended", UNKNOWN_TIME) for times in (files.sampled, files.evaluated))
    metrics = [Metric(key, value, sampled, files.evaluations) for key, value in _peak_memory(files.sampled).items()]
    if files.sampled.get("per_second"):
        pace = 1 / files.sampled["per_second"]
        metrics.append(Metric("seconds_per_image", pace, sampled, files.evaluations))
    if files.metrics is not None:
        scores = files.metrics
        metrics += [
            Metric(key, scores[key], evaluated, files.evaluations) for key in SCORES if scores.get(key) is not None
        ]
    _log_metrics(target, run, metrics, added)
    preview = (root / store.samples_file(files.point)).with_suffix(".png")
    if preview.exists():
        with Image.open(preview) as picture:
            _log_image(target, run, picture, files.evaluations, sampled, added)
    if files.metrics is not None:
        record = {"scores": files.metrics, "sampled": files.sampled, "evaluated": files.evaluated}
        target.client.log_dict(run.info.run_id, record, f"points/{files.point.name}.json")
        added["files"] += 1
    _log(target, run, tags=files.tags)


# The run of the report.


def _publish_report(target: Target, root: Path, added: Counter[str]) -> None:
    """One run whose artifacts are the report as it is now."""
    folder = root / store.report_dir()
    if not (folder / "best.json").exists():
        return
    best, times = store.read_json(folder / "best.json"), _run_file(root, store.report_dir())
    content = store.sha256(folder)
    note = f"Best point: **{best['point']}**, FID {best['fid']:.4g} at {best['evaluations']} network evaluations."
    tags = {"ddpm.stage": "report", "ddpm.best": str(best["point"]), "mlflow.note.content": note}
    start, end = times.get("started", UNKNOWN_TIME), times.get("ended", UNKNOWN_TIME)
    run = _find_or_create(target, "report", "report", lambda run: True, start, tags, added)
    if run.data.tags.get("ddpm.report_sha256") == content:
        return
    target.client.log_artifacts(run.info.run_id, str(folder), "report")
    added["files"] += sum(file.is_file() for file in folder.rglob("*"))
    _finish(target, run, end)
    _log(target, run, tags={**tags, **_commit(times), "ddpm.report_sha256": content})


# Training as it happens.


class TrainingWatch:
    """A Report that streams the loss curves of one training to its run, in batches, from a thread of its own."""

    def __init__(self, params: Params, schedule: str, root: Path, say: Say) -> None:
        self._params, self._schedule, self._root, self._say = params, schedule, root, say
        self._values: list[tuple[str, float, int, int]] = []  # key, value, timestamp, step
        self._pictures: list[tuple[int, store.Images, int]] = []
        self._mutex, self._wake, self._ending = threading.Lock(), threading.Event(), False
        self._step = 0
        self._target: Target | None = None
        self._run: Run | None = None
        self._known: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._stream, name="tracking", daemon=True)
        psutil.cpu_percent()  # the first call only starts the clock
        self._thread.start()

    def __call__(self, progress: Progress) -> None:
        now = _now()
        with self._mutex:
            self._step = progress.done
            self._values += [
                (key, progress.values[key], now, progress.done) for key in CURVES if key in progress.values
            ]

    def log_preview(self, step: int, picture: store.Images) -> None:
        """A sample grid drawn at that step: uint8 C,H,W."""
        with self._mutex:
            self._pictures.append((step, picture, _now()))

    def close(self, status: str) -> None:
        """Sends what is left and ends the run as FINISHED, FAILED or KILLED."""
        self._ending = True
        self._wake.set()
        self._thread.join(timeout=60)
        if self._thread.is_alive() or self._target is None or self._run is None:
            return
        try:
            with _plain_errors(self._target.place):
                self._target.client.set_terminated(self._run.info.run_id, status)
        except InputError as error:
            _warn(str(error), self._say)

    def _stream(self) -> None:
        while True:
            ending = self._ending
            try:
                self._flush()
            except InputError as error:
                _warn(str(error), self._say)
            except Exception as error:  # noqa: BLE001 - who watches must not fail the work
                _warn(f"streaming to MLflow failed ({type(error).__name__}: {error})", self._say)
            if ending:
                return
            self._wake.wait(FLUSH_SECONDS if self._run or self._target is None else 1.0)

    def _flush(self) -> None:
        if self._target is None:
            self._target = _open(self._params, self._root)
        else:
            _require_reachable(self._target.place)
        if not self._step:
            return  # a training that fails at once leaves no run
        with _plain_errors(self._target.place), _locked(self._target.place):
            from mlflow.entities import Metric

            if self._run is None:
                self._run = _open_training(self._target, self._params, self._schedule, self._root)
                self._known = {
                    (key, step) for key in self._run.data.metrics for step in _history(self._target, self._run, key)
                }
            with self._mutex:
                values, pictures, step = list(self._values), list(self._pictures), self._step
            system = [(key, value, _now(), step) for key, value in _system_load().items()] if step else []
            new = [value for value in values + system if (value[0], value[3]) not in self._known]
            for chunk in _chunks([Metric(*value) for value in new], 1000):
                self._target.client.log_batch(self._run.info.run_id, metrics=chunk)
            self._known |= {(key, step) for key, _, _, step in new}
            for picture_step, picture, timestamp in pictures:
                image = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
                _log_image(self._target, self._run, image, picture_step, timestamp, Counter())
        with self._mutex:
            del self._values[: len(values)], self._pictures[: len(pictures)]


def _now() -> int:
    return int(time.time() * 1000)


def _system_load() -> dict[str, float]:
    """Under MLflow's own names, which its System metrics tab shows."""
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
    """The run to stream to: the one that an interrupted training of this configuration left, or a new one."""
    about = store.read_json(root / store.dataset_dir() / "dataset.json")
    identity = _training_identity(params, schedule, about["sha256"])
    tags = {**_training_tags(schedule, about["name"], identity), PROCESS: _this_process()}
    left = [
        run
        for run in _search(target, f"tags.`{KEY}` = '{_digest(identity)}'")
        if _is_unfinished(run) and SUPERSEDED not in run.data.tags and not _is_live(run)
    ]
    if left:
        run = max(left, key=lambda run: run.info.start_time)
        target.client.update_run(run.info.run_id, status="RUNNING")
        _log(target, run, tags=tags)
    else:
        run = target.client.create_run(
            target.experiment,
            start_time=_now(),
            run_name=schedule,
            tags={KEY: _digest(identity), "mlflow.source.name": "ddpm", **tags},
        )
        _log(target, run, _flat(identity))
    return target.client.get_run(run.info.run_id)


@contextmanager
def watch_training(params: Params, schedule: str, root: Path = Path(), say: Say = print) -> Iterator[TrainingWatch]:
    """Streams a training while the block runs: call the result with each Progress, and its `log_preview` with grids.

    The run ends FINISHED, FAILED on an error, or KILLED on an interrupt. A server that cannot be reached costs one line.
    """
    watch = TrainingWatch(params, schedule, root, say)
    try:
        yield watch
    except Exception:
        watch.close("FAILED")
        raise
    except BaseException:  # KeyboardInterrupt, SystemExit
        watch.close("KILLED")
        raise
    watch.close("FINISHED")


# The registry.


def fetch_model(uri: str, destination: Path, root: Path = Path()) -> tuple[Path, dict[str, Any]]:
    """models:/NAME@ALIAS or models:/NAME/VERSION -> its checkpoint folder, copied below `destination`, and the sampler
    settings that earned its promotion: a row's options and `steps`. Raises InputError.
    """
    where = place(root)
    if not re.fullmatch(r"models:/[^/@]+(@[^/@]+|/[0-9]+)", uri):
        raise InputError(f"'{uri}' names no registered model: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    _require_reachable(where)
    with _plain_errors(where):
        with _locked(where):
            client = _client(where)
        version = _version(client, uri)
        if version is None:
            raise InputError(f"{uri}: MLflow at {where.shown} has no such model; `ddpm promote` registers one")
        if SETTINGS not in version.tags:
            raise InputError(f"{uri} was not registered by `ddpm promote`: it has no tag {SETTINGS}")
        return _download(client, where, version, destination), json.loads(version.tags[SETTINGS])


def _version(client: MlflowClient, uri: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    name, sign, which = re.split(r"([@/])", uri.removeprefix("models:/"), maxsplit=1)
    try:
        return client.get_model_version_by_alias(name, which) if sign == "@" else client.get_model_version(name, which)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None  # the second is its answer to an alias that is not there
        raise


def _download(client: MlflowClient, where: Place, version: ModelVersion, destination: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    location = client.get_model_version_download_uri(version.name, version.version)
    destination.mkdir(parents=True, exist_ok=True)
    path = download_artifacts(f"{location}/artifacts/checkpoint", dst_path=str(destination), tracking_uri=where.uri)
    return Path(path)


@dataclass(frozen=True)
class Challenger:
    """The best point of the report, with all that its promotion needs."""

    name: str
    point: Point
    settings: dict[str, Any]  # a sampler row's options, and `steps`
    clip: bool
    seed: int
    metrics: dict[str, Any]
    score: Score
    about: dict[str, Any]  # model.json
    folder: Path

    @property
    def identity(self) -> dict[str, str]:
        """Tags that say which images it makes."""
        return {MODEL: self.about["weights_sha256"], SETTINGS: json.dumps(self.settings, sort_keys=True)}

    def is_version(self, version: ModelVersion) -> bool:
        return all(version.tags.get(tag) == value for tag, value in self.identity.items())

    @property
    def tags(self) -> dict[str, str]:
        return {
            **self.identity,
            "ddpm.point": self.point.name,
            "ddpm.schedule": self.point.schedule,
            "ddpm.sampler": self.point.sampler,
            "ddpm.steps": str(self.point.steps),
            "ddpm.evaluations": str(self.score.evaluations),
            "ddpm.fid": str(self.score.fid),
            "ddpm.dataset": self.about["data"]["name"],
            "ddpm.dataset_sha256": self.score.protocol.dataset,
            "ddpm.protocol": json.dumps(asdict(self.score.protocol)),
            _score_tag(self.score.protocol): json.dumps(self.metrics),
        }


def _score_tag(protocol: Protocol) -> str:
    return f"ddpm.score.{protocol.id}"


def _challenger(params: Params, root: Path) -> Challenger:
    best = store.read_json(root / store.report_dir() / "best.json")
    point = Point.parse(str(best.get("point")))
    metrics = store.read_json(root / store.metrics_file(point))
    settings = _settings(params, point, root, _dvc_lock(root))
    if metrics.get("fid") != best.get("fid") or settings is None:
        raise InputError(f"{root / store.report_dir()}: the report is older than its scores; run dvc repro")
    folder = root / store.model_dir(point.schedule)
    return Challenger(
        model_name(params),
        point,
        {**settings.row, "steps": point.steps},
        bool(settings.sampling.get("clip", True)),
        settings.seed,
        metrics,
        Score.of(metrics),
        store.read_json(folder / "model.json"),
        folder,
    )


Rescore = Callable[[Path, dict[str, Any]], dict[str, Any]]


def promote(
    params: Params, root: Path = Path(), replace: bool = False, rescore: Rescore | None = None, say: Say = print
) -> Decision:
    """Registers the report's best point as `ddpm-DATASET` with alias `champion`, if it beats the champion there is.

    A champion with a score under another dataset version or protocol is scored again first: rescore(checkpoint folder,
    sampler settings) -> what metrics/POINT.json would hold. replace: take its place without comparing. The decision and
    what led to it stay as tags in the registry. Raises InputError.
    """
    challenger = _challenger(params, root)
    target = _open(params, root)
    with _plain_errors(target.place), _locked(target.place, ".promote"):
        seen = max((int(version.version) for version in _versions(target.client, challenger.name)), default=0)
        registered: ModelVersion | None = None
        while True:
            champion = _version(target.client, champion_uri(params))
            if champion is not None and challenger.is_version(champion):
                return _already(target, champion, challenger)
            wins, reason, score = _compare(target, champion, challenger, replace, rescore, say)
            if not wins:
                return _decided(target, challenger, champion, champion, score, reason)
            registered = registered or _register(target, params, root, challenger)
            now = _version(target.client, champion_uri(params))
            if (now and now.version) == (champion and champion.version):
                break  # else somebody else promoted meanwhile: compare with that one
        target.client.set_registered_model_alias(challenger.name, CHAMPION, registered.version)
        if not replace:
            registered = _settle(target, challenger, registered, seen)
        return _decided(target, challenger, champion, registered, score, reason)


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    versions, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        versions += list(page)
        token = page.token
        if not token:
            return versions


def _score(version: ModelVersion, protocol: Protocol) -> Score | None:
    """A version's score under a protocol, if it was ever computed."""
    found = version.tags.get(_score_tag(protocol))
    return Score.of(json.loads(found)) if found else None


def _compare(
    target: Target,
    champion: ModelVersion | None,
    challenger: Challenger,
    replace: bool,
    rescore: Rescore | None,
    say: Say,
) -> tuple[bool, str, Score | None]:
    """-> whether the challenger wins, why, and the champion's score."""
    if champion is None:
        return True, f"{challenger.point.name} is the first champion", None
    protocol, title = (
        challenger.score.protocol,
        f"champion version {champion.version} ({champion.tags.get('ddpm.point')})",
    )
    score = _score(champion, protocol)
    if score is None and not replace:
        before = champion.tags.get("ddpm.protocol")
        changed = protocol.differences(Protocol(**json.loads(before))) if before else "unknown protocol"
        if rescore is None:
            raise InputError(f"{title} has no score to compare with ({changed}); score it again, or promote --replace")
        say(f"promote: scoring the {title} again: {changed}")
        score = _score_again(target, champion, protocol, rescore)
    wins, why = decide(challenger.score, score or challenger.score, replace)
    return wins, f"{challenger.point.name} {'replaces' if wins else 'does not replace'} {title}: {why}", score


def _score_again(target: Target, champion: ModelVersion, protocol: Protocol, rescore: Rescore) -> Score:
    with tempfile.TemporaryDirectory(prefix="ddpm-champion-") as name:
        folder = _download(target.client, target.place, champion, Path(name))
        try:
            metrics = rescore(folder, json.loads(champion.tags[SETTINGS]))
        except InputError as error:
            raise InputError(
                f"the champion cannot be scored again: {error} (`ddpm promote --replace` skips that)"
            ) from None
    score = Score.of(metrics)
    if score.protocol != protocol:
        raise InputError(f"the champion's new score differs in protocol ({protocol.differences(score.protocol)})")
    target.client.set_model_version_tag(champion.name, champion.version, _score_tag(protocol), json.dumps(metrics))
    return score


def _already(target: Target, champion: ModelVersion, challenger: Challenger) -> Decision:
    """The same images: no new version, though perhaps a score under a new protocol."""
    tag, value = _score_tag(challenger.score.protocol), json.dumps(challenger.metrics)
    if champion.tags.get(tag) != value:
        target.client.set_model_version_tag(champion.name, champion.version, tag, value)
    reason = f"{challenger.point.name} is champion already ({champion.name} version {champion.version})"
    return Decision(False, str(champion.version), reason, challenger.point.name, str(champion.version))


def _settle(target: Target, challenger: Challenger, mine: ModelVersion, seen: int) -> ModelVersion:
    """Of versions that were promoted at the same time, the best becomes champion, whoever set the alias last."""
    rivals = [version for version in _versions(target.client, mine.name) if int(version.version) > seen]
    scored = [
        (score.fid, int(rival.version), rival)
        for rival in rivals
        if (score := _score(rival, challenger.score.protocol))
    ]
    best = min(scored, key=lambda entry: entry[:2], default=(0.0, 0, mine))[2]
    if best.version != mine.version:
        target.client.set_registered_model_alias(mine.name, CHAMPION, best.version)
    return best


def _decided(
    target: Target,
    challenger: Challenger,
    before: ModelVersion | None,
    after: ModelVersion | None,
    score: Score | None,
    reason: str,
) -> Decision:
    """Writes the decision to the registry, unless the last one there says the same."""
    promoted = after is not None and challenger.is_version(after)
    if not promoted and before is not after and after is not None:
        reason = f"{challenger.point.name} was overtaken by {after.tags.get('ddpm.point')}, promoted at the same time"
    entry = {
        "promoted": promoted,
        "point": challenger.point.name,
        "fid": challenger.score.fid,
        "champion": after.version if after else None,
        "before": before.version if before else None,
        "before_fid": score.fid if score else None,
        "protocol": asdict(challenger.score.protocol),
        "reason": reason,
    }
    client, text = target.client, json.dumps(entry)
    tags = client.get_registered_model(challenger.name).tags
    past = sorted(tag for tag in tags if tag.startswith("ddpm.decision."))
    if not past or tags[past[-1]] != text:
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        client.set_registered_model_tag(challenger.name, f"ddpm.decision.{moment}", text)
    if promoted and after is not None:
        client.set_model_version_tag(after.name, after.version, "ddpm.decision", reason)
        if before is not None:
            client.set_model_version_tag(after.name, after.version, "ddpm.previous", before.version)
            client.set_model_version_tag(before.name, before.version, "ddpm.replaced_by", after.version)
    version, previous = (str(item.version) if item else None for item in (after, before))
    return Decision(promoted, version, reason, challenger.point.name, previous)


def _register(target: Target, params: Params, root: Path, challenger: Challenger) -> ModelVersion:
    """The version of this point, created if there is none yet."""
    from mlflow.exceptions import MlflowException

    client, name = target.client, challenger.name
    for version in _versions(client, name):
        if challenger.is_version(version) and version.status == "READY":
            tag = _score_tag(challenger.score.protocol)
            client.set_model_version_tag(name, version.version, tag, challenger.tags[tag])
            return client.get_model_version(name, version.version)
    settings = _settings(params, challenger.point, root, _dvc_lock(root))
    with _locked(target.place):
        run = _publish_points(target, root, [(challenger.point, settings)], Counter()) if settings else None
    if run is None:
        raise InputError(f"{store.samples_file(challenger.point)}: no such sample set; run dvc repro")
    dataset = challenger.about["data"]["name"]
    try:
        client.create_registered_model(
            name,
            tags={"ddpm.dataset": dataset},
            description=f"Denoising diffusion on {dataset}. `champion` is the best by FID; the tags `ddpm.decision.*` tell"
            " how it came to that.",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model_id = _log_served(target, run, challenger)
    return client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run.info.run_id,
        tags=challenger.tags,
        description=_describe(challenger),
        model_id=model_id,
        await_creation_for=60,
    )


def _describe(challenger: Challenger) -> str:
    score, settings = challenger.score, {name: value for name, value in challenger.settings.items() if name != "steps"}
    options = ", ".join(f"{name} {value}" for name, value in settings.items())
    return (
        f"**{challenger.point.name}**: {options}; {score.evaluations} network evaluations an image. FID {score.fid:.4g} of"
        f" {score.protocol.images:,} samples against {score.protocol.reference_images:,} images of"
        f" {challenger.about['data']['name']}, at Inception layer {score.protocol.layer}."
    )


def _log_served(target: Target, run: Run, challenger: Challenger) -> str:
    """The model of served.py, with code and checkpoint, as a logged model of the sampler's run; gives its id."""
    from mlflow.entities import LoggedModelOutput

    client = target.client
    model = client.create_logged_model(
        target.experiment,
        name=challenger.point.name,
        source_run_id=run.info.run_id,
        tags=challenger.identity,
        params=_flat(challenger.settings),
        model_type="diffusion",
    )
    with tempfile.TemporaryDirectory(prefix="ddpm-served-") as name:
        folder = Path(name) / "model"
        save_served(folder, challenger, run.info.run_id, model.model_id)
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, challenger.score.evaluations)])
    return str(model.model_id)


def save_served(folder: Path, challenger: Challenger, run_id: str | None = None, model_id: str | None = None) -> None:
    """Writes a model folder for mlflow.pyfunc that needs none of this checkout, and holds no pickle."""
    import mlflow.pyfunc
    import numpy as np
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    inputs = [
        ColSpec("long", "n"),
        ColSpec("long", "seed", required=False),
        ColSpec("long", "steps", required=False),
        ColSpec("string", "sampler", required=False),
    ]
    shape = (-1, *challenger.about["data"]["shape"])
    steps = challenger.settings["steps"]
    package = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory(prefix="ddpm-code-") as name:
        code = Path(name) / package.name
        for module in SERVED_MODULES:
            (code / module).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / f"{module}.py", code / f"{module}.py")
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(package / "stages" / "served.py"),
            artifacts={"checkpoint": str(challenger.folder.resolve())},
            code_paths=[str(code)],
            signature=ModelSignature(Schema(inputs), Schema([TensorSpec(np.dtype(np.uint8), shape)])),
            input_example=pd.DataFrame(
                {"n": [4], "seed": [challenger.seed], "steps": [steps], "sampler": [challenger.settings["sampler"]]}
            ),
            pip_requirements=[f"mlflow=={installed_version('mlflow')}", *map(_requirement, SERVED_PACKAGES)],
            model_config={"settings": challenger.settings, "seed": challenger.seed, "clip": challenger.clip},
            metadata={"point": challenger.point.name, "fid": challenger.score.fid, **asdict(challenger.score.protocol)},
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )


def _requirement(package: str) -> str:
    """At least the running version, below the next major one."""
    release = installed_version(package).partition("+")[0]
    return f"{package}>={release},<{int(release.split('.')[0]) + 1}"
