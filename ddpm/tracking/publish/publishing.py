"""Publishes the outputs on disk to MLflow, except the outputs that MLflow already has."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.databases.mlflow_page import chart
from ddpm.errors import InputError
from ddpm.files import arrays, atomic, models, paths
from ddpm.files.dataset import read_dataset, read_dataset_record, spread
from ddpm.files.models import DataEntry, ModelRecord
from ddpm.files.params import Params
from ddpm.files.records import read_csv, read_described, sha256
from ddpm.files.samples import read_samples, read_samples_record
from ddpm.files.scores import Row, Scores, extractor, read_report, read_scores
from ddpm.parameters import USUAL_EXTRACTOR, Point
from ddpm.provenance import dvc_lock
from ddpm.provenance.runs import RunRecord, read_run
from ddpm.reporting import compared
from ddpm.reporting.compared import Compared
from ddpm.reporting.page import publish_with
from ddpm.reporting.published import published, run_records, with_previous, write_script
from ddpm.scores.metrics import METRICS, RANKING
from ddpm.tracking.lineage import (
    PointSettings,
    digest,
    flat,
    identity_of_model,
)
from ddpm.tracking.place import Say, Target, locked, open_target, plain_errors, warn
from ddpm.tracking.runs import (
    CURVES,
    CURVES_SHA,
    KEY,
    MODEL,
    SUPERSEDED,
    end_orphans,
    find_or_create,
    finish,
    history,
    log,
    log_image,
    log_metrics,
    same,
    search,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

FOLLOW_SECONDS = 1.0  # seconds between two checks of dvc.lock
REAL = 64  # the number of real images that are logged at step 0
CONTENT = "ddpm.content_sha256"  # tag with the hash of the outputs that a run shows
PUBLISHED = "ddpm.published_sha256"  # tag with the same hash, set when the run is complete
UNKNOWN_TIME = 946_684_800_000  # 2000-01-01, for outputs without a run file


# A function that compares the report with the champion, and returns None without a champion. ddpm.tracking.outputs passes it.
WithChampion = Callable[[Target, Params, Path, Say], Compared | None]


def publish_or_warn(
    params: Params,
    root: Path = Path(),
    only: str | None = None,
    say: Say = print,
    champion: WithChampion | None = None,
) -> None:
    """Calls `publish` at the end of a stage. Turns any error into a one-line warning, since the outputs are already on disk."""
    try:
        publish(params, root, only, say, champion)
    except InputError as error:
        warn(str(error), say)
    except Exception as error:  # noqa: BLE001 - tracking must not fail the stage
        warn(f"publishing {only or ''} failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})", say)


def follow(
    params: Params, root: Path, ended: threading.Event, say: Say = print, champion: WithChampion | None = None
) -> None:
    """Publishes the outputs of each stage as soon as dvc.lock lists them. Turns errors of publishing into warnings.

    Args:
        params: the parameters of the sweep.
        root: the top of the checkout.
        ended: the function returns once this event is set.
        say: prints a line for the user.
        champion: the function that compares the report with the champion; None to leave this comparison out.
    """

    def locked() -> Mapping[str, Any]:
        try:
            return dvc_lock.versions(root)
        except InputError:  # DVC is writing the file
            return {}

    path, changed, seen = root / dvc_lock.NAME, -1, locked()
    publish_or_warn(
        params, root, "prepare", say
    )  # imports mlflow and creates the store; `prepare` has nothing to publish
    while not ended.wait(FOLLOW_SECONDS):
        now = path.stat().st_mtime_ns if path.exists() else -1
        if now == changed:
            continue
        if not (stages := locked()):
            continue
        for stage in stages:
            if stages[stage] != seen.get(stage):
                publish_or_warn(params, root, stage, say, champion)
        changed, seen = now, stages


# Publishing.


def publish(
    params: Params,
    root: Path = Path(),
    only: str | None = None,
    say: Say = print,
    champion: WithChampion | None = None,
) -> dict[str, int]:
    """Publishes the outputs below `root` that MLflow lacks. Leaves out outputs that are older than their inputs.

    Args:
        params: the parameters of the sweep.
        root: the top of the checkout.
        only: the stage whose output to publish, such as "train@linear", "sample@linear-ddim-50" or "report". None publishes
            all outputs, and prints what was added.
        say: prints a line for the user.
        champion: the function that compares the report with the champion; None to leave this comparison out.

    Returns:
        The numbers of added runs, metrics, images, models and files, by these names.

    Raises:
        InputError: an output is damaged, or MLflow cannot be reached.
    """
    target, added = open_target(params, root), Counter[str]()
    stage, _, item = (only or "").partition("@")

    def publish_point() -> None:
        point = Point.parse(item)
        if settings := PointSettings.read(params, point, root):
            publish_points(target, root, [(point, settings)], added)

    def report() -> None:
        _publish_report(target, params, root, added, say, champion)

    of_stage: dict[str, Callable[[], Any]] = {
        "train": lambda: _publish_training(target, root, item, added),
        "likelihood": lambda: _publish_likelihood(target, root, item, added),
        "sample": publish_point,
        "evaluate": publish_point,
        "schedules": lambda: _publish_schedules(target, root, Path(item), added),
        "report": report,
        "": lambda: _publish_all(target, params, root, added, say, report),
    }
    with plain_errors(target.place), locked(target.place):
        of_stage.get(stage, lambda: None)()  # `prepare` has nothing to publish
    return dict(added)


def _publish_all(
    target: Target, params: Params, root: Path, added: Counter[str], say: Say, report: Callable[[], None]
) -> None:
    for name in _fill_in(target, params, root, added, report):
        say(
            f"publish: {name} is not published, since its model or samples have changed since it was made; run dvc repro"
        )
    summary = ", ".join(f"{count} {kind}" for kind, count in added.items())
    atomic.write_text(root / paths.CHART, chart(target.experiment))
    say(f"MLflow at {target.place.shown}: " + (f"added {summary}" if summary else "nothing to add"))


def _fill_in(target: Target, params: Params, root: Path, added: Counter[str], report: Callable[[], None]) -> list[str]:
    """Publishes all outputs that are up to date. Returns the names of the outputs that are older than their inputs."""
    end_orphans(target)
    stale = list[str]()
    for folder in sorted((root / "models").glob("*/model.json")):
        schedule = folder.parent.name
        _publish_training(target, root, schedule, added)
        if not _publish_likelihood(target, root, schedule, added):
            stale.append(f"likelihood of {schedule}")
    groups = dict[str, list[tuple[Point, PointSettings]]]()
    for point in _points(root):
        settings = PointSettings.read(params, point, root)
        if settings is None:
            stale.append(point.name)
        else:
            identity = json.dumps([point.schedule, point.sampler, asdict(settings)])
            groups.setdefault(identity, []).append((point, settings))
    for group in groups.values():
        publish_points(target, root, group, added)
    report()
    _publish_schedules(target, root, paths.schedules_dir(), added)
    return stale


def _points(root: Path) -> Iterator[Point]:
    """Yields the point (schedule, sampler and steps) of each file samples/POINT.npz. Skips files with other names."""
    for path in sorted((root / "samples").glob("*.npz")):
        with contextlib.suppress(InputError):
            yield Point.parse(path.stem)


def _publish_training(target: Target, root: Path, schedule: str, added: Counter[str]) -> Run | None:
    """Publishes the training of a schedule. Returns its MLflow run, or None if the model or its loss curves are not on disk."""
    folder, record = root / paths.model_dir(schedule), root / paths.training_metrics_file(schedule)
    if not (folder / "model.json").exists() or not record.exists():
        return None
    model, trained = models.read_trained(root, schedule), models.read_training(root, schedule)
    table = read_described(record, trained.files, root / paths.history_file(schedule))
    by_time = read_described(record, trained.files, root / paths.losses_by_time_file(schedule))
    weights, curves = model.weights_sha256, sha256(table)
    identity, times = identity_of_model(model), read_run(root, paths.model_dir(schedule))
    start, end = _times(times)
    rows = read_csv(table)
    values = {key: {int(row["step"]): float(row[key]) for row in rows if row.get(key)} for key in CURVES}

    def agrees(run: Run) -> bool:
        if MODEL in run.data.tags:
            return run.data.tags[MODEL] == weights and run.data.tags.get(CURVES_SHA) == curves
        return all(
            step in values[key] and same(value, values[key][step])
            for key in CURVES
            for step, value in history(target, run, key).items()
        )

    key = digest(identity)
    tags = training_tags(schedule, model.data.name, identity)
    run = find_or_create(target, key, schedule, agrees, start, tags, added)
    if run.data.tags.get(MODEL) == weights:
        return run
    log(target, run, flat(identity), {**tags, **_commit(times)})
    _log_dataset(target, run, root, model.data, "training")
    last = model.training.steps
    log_metrics(target, run, _curve_metrics(values, last, start, end), added)
    log_metrics(target, run, _by_time_metrics(by_time, end), added)
    log_metrics(target, run, _measurements(times, model, last, end), added)
    _log_checkpoint(target, run, folder, model, last, added)
    finish(target, run, end)
    log(target, run, tags={MODEL: weights, CURVES_SHA: curves})
    return target.client.get_run(run.info.run_id)


def training_tags(schedule: str, dataset: str, identity: Mapping[str, Any]) -> dict[str, str]:
    steps = identity["training"]["steps"]
    return {
        "ddpm.stage": "train",
        "ddpm.schedule": schedule,
        "ddpm.dataset": dataset,
        "ddpm.dataset_sha256": identity["dataset_sha256"],
        "mlflow.note.content": f"The {schedule} schedule, {steps:,} training steps on {dataset}."
        " Its child runs hold the scores, one run per sampler.",
    }


def _times(run: RunRecord | None) -> tuple[int, int]:
    """Returns the start and the end in a run file, in milliseconds since the epoch. Without a run file, both are 2000-01-01."""
    return (UNKNOWN_TIME, UNKNOWN_TIME) if run is None else (run.started, run.ended)


def _commit(run: RunRecord | None) -> dict[str, str]:
    """Returns MLflow tags with the machine and the commit in a run file, or a tag for unknown times if `run` is None."""
    if run is None:
        return {"ddpm.times": "unknown"}
    tags = {"ddpm.device": run.device, "ddpm.hardware": json.dumps(run.hardware)}
    if run.git_commit:
        tags["mlflow.source.git.commit"] = run.git_commit
        tags["mlflow.source.git.dirty"] = str(run.git_dirty).lower()
    return tags


def _curve_metrics(values: Mapping[str, Mapping[int, float]], last: int, start: int, end: int) -> list[Metric]:
    """Returns the metrics of the loss curves. The steps 0 ... `last` get time stamps spread evenly between `start` and `end`."""
    from mlflow.entities import Metric

    return [
        Metric(key, value, start + (end - start) * step // max(last, 1), step)
        for key, steps in values.items()
        for step, value in steps.items()
    ]


def _by_time_metrics(table: Path, end: int) -> list[Metric]:
    """Returns the losses in each range of timesteps as MLflow metrics. Their step is the middle of the range."""
    from mlflow.entities import Metric

    return [
        Metric(f"by_time/{key}", float(row[key]), end, int(row["t"]))
        for row in read_csv(table)
        for key in ("loss_simple", "loss_vlb")
        if row[key]
    ]


def _measurements(made: RunRecord | None, model: ModelRecord, last: int, end: int) -> list[Metric]:
    """Returns peak memory and images per second as metrics at the last step."""
    from mlflow.entities import Metric

    measured = _peak_memory(made)
    if made is not None and made.per_second and made.unit == "steps":
        measured["images_per_second"] = made.per_second * model.training.batch
    return [Metric(key, value, end, last) for key, value in measured.items()]


def _peak_memory(made: RunRecord | None) -> dict[str, float]:
    names = {
        "peak_memory_bytes": "system/peak_memory_megabytes",
        "gpu_peak_memory_bytes": "system/gpu_peak_memory_megabytes",
    }
    return {metric: size / 1e6 for name, metric in names.items() if (size := getattr(made, name, None))}


def _log_dataset(target: Target, run: Run, root: Path, data: DataEntry, context: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    md5 = dvc_lock.locked_md5(dvc_lock.read(root), "prepare", "outs", paths.dataset_dir()) or ""
    counts = {}
    dataset_file = root / paths.dataset_dir() / "dataset.json"
    if dataset_file.exists() and (present := read_dataset_record(root)).sha256 == data.sha256:
        counts = present.counts
    elif md5:
        md5 = ""  # dvc.lock describes another version of the dataset
    dataset = Dataset(
        name=data.name,
        digest=data.sha256[:16],
        source_type="dvc",
        source=json.dumps({"path": str(paths.dataset_dir()), "sha256": data.sha256, "md5": md5 or None}),
        schema=json.dumps({"shape": data.shape, "dtype": "uint8", "classes": data.classes}),
        profile=json.dumps(counts),
    )
    tags = [InputTag("mlflow.data.context", context), InputTag("ddpm.dataset_sha256", data.sha256)]
    if md5:
        tags.append(InputTag("ddpm.dataset_md5", md5))
        target.client.set_tag(run.info.run_id, "ddpm.dataset_md5", md5)
    target.client.log_inputs(run.info.run_id, [DatasetInput(dataset, tags)])


def _checkpoint_model(target: Target, run: Run, weights: str) -> Any:
    """Returns the logged model of the training's run that has these weights, or None. weights: sha256."""
    found = target.client.search_logged_models([target.experiment], f"tags.`{MODEL}` = '{weights}'")
    return next((model for model in found if model.source_run_id == run.info.run_id), None)


def _log_checkpoint(
    target: Target, run: Run, folder: Path, record: ModelRecord, step: int, added: Counter[str]
) -> None:
    """Logs the checkpoint folder, which holds safetensors and JSON, as a logged model of the training's run."""
    from mlflow.entities import LoggedModelOutput

    model = _checkpoint_model(target, run, record.weights_sha256)
    if model is None:
        model = target.client.create_logged_model(
            target.experiment,
            name=record.schedule.name,
            source_run_id=run.info.run_id,
            tags={MODEL: record.weights_sha256, "ddpm.dataset": record.data.name},
            params=flat(
                {"network": record.network.content, "target": record.target, "schedule": record.schedule.to_json()}
            ),
            model_type="diffusion",
        )
        added["models"] += 1
    if str(model.status) != "READY":
        models.check_weights(folder, record)
        target.client.log_model_artifacts(model.model_id, str(folder))
        target.client.finalize_logged_model(model.model_id, "READY")
        target.client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])


# The runs of samplers.


@dataclass(frozen=True)
class PointFiles:
    """The samples and scores of a point on disk.

    Args:
        point: the schedule, the sampler and the number of steps.
        evaluations: network evaluations per image.
        model: the sha256 of the weights that drew the samples.
        samples: the sha256 of the sample set.
        metrics: the scores of these samples; None if they have no scores.
        scores: the sha256 of the metrics file; "" without scores.
        sampled: the content of the samples' run file (times and machine), or None.
        evaluated: the content of the scores' run file, or None.
    """

    point: Point
    evaluations: int
    model: str
    samples: str
    metrics: Scores | None
    scores: str
    sampled: RunRecord | None
    evaluated: RunRecord | None

    @classmethod
    def read(cls, root: Path, point: Point) -> PointFiles:
        path, scores = paths.samples_file(point), paths.metrics_file(point)
        record = read_samples_record(root / path)
        samples = record.record_sha256
        metrics = read_scores(root, point) if (root / scores).exists() else None
        if metrics is not None and metrics.samples != samples:
            metrics = None
        return cls(
            point,
            record.evaluations,
            record.model,
            samples,
            metrics,
            sha256(root / scores) if metrics else "",
            read_run(root, path),
            read_run(root, scores) if metrics else None,
        )

    @property
    def runs(self) -> list[RunRecord]:
        return [run for run in (self.sampled, self.evaluated) if run is not None]

    @property
    def tags(self) -> dict[str, str]:
        tags = {f"ddpm.samples.{self.point.steps}": self.samples}
        return tags | {f"ddpm.scores.{self.point.steps}": self.scores} if self.scores else tags


def publish_points(
    target: Target, root: Path, group: Sequence[tuple[Point, PointSettings]], added: Counter[str]
) -> Run | None:
    """Publishes points that have the same schedule, sampler and settings, and differ only in the number of steps.

    Returns the run of these points, or None if no samples of the present model are on disk.
    """
    first, settings = group[0]
    training = _publish_training(target, root, first.schedule, added)
    if training is None:
        return None
    model = models.read_trained(root, first.schedule)
    weights = model.weights_sha256
    found = [PointFiles.read(root, point) for point, _ in group if (root / paths.samples_file(point)).exists()]
    points = [files for files in found if files.model == weights]
    if not points:
        return None

    def agrees(run: Run) -> bool:
        if run.data.tags.get(MODEL) != weights:
            return False
        return all(run.data.tags.get(tag, value) == value for files in points for tag, value in files.tags.items())

    key = digest([training.data.tags[KEY], first.sampler, asdict(settings)])
    name = f"{first.schedule}-{first.sampler}"
    start = min((made.started for files in points for made in files.runs), default=UNKNOWN_TIME)
    tags = {
        **_point_tags(first, model, settings),
        MODEL: weights,
        "mlflow.parentRunId": training.info.run_id,
        **_commit(points[0].evaluated or points[0].sampled),
    }
    run = find_or_create(target, key, name, agrees, start, tags, added)
    complete = bool(run.data.params)  # new runs, and runs that an older version published, have no parameters
    log(target, run, _point_params(first, model, settings))
    if not complete:
        _log_dataset(target, run, root, model.data, "evaluation")
        _link_model(target, run, training, weights)
        _log_real(target, run, root, model.data, start, added)
    for files in points:
        if any(run.data.tags.get(tag) != value for tag, value in files.tags.items()):
            _publish_point(target, root, run, files, added)
    finish(target, run, max((made.ended for files in points for made in files.runs), default=UNKNOWN_TIME))
    return run


def _point_tags(point: Point, model: ModelRecord, settings: PointSettings) -> dict[str, str]:
    layer, images = settings.evaluation["layer"], settings.evaluation["images"]
    title = extractor(settings.evaluation.get("extractor", USUAL_EXTRACTOR)).title
    return {
        **flat({"ddpm": asdict(settings)}),
        "ddpm.stage": "sample",
        "mlflow.runType": "evaluation",  # for this type, MLflow's pages unfold the parent run, so the scores are visible
        "ddpm.schedule": point.schedule,
        "ddpm.sampler": point.sampler,
        "ddpm.dataset": model.data.name,
        "ddpm.dataset_sha256": model.data.sha256,
        "mlflow.note.content": f"Sampler {point.sampler} on the {point.schedule} schedule. A step is the number of network"
        f" evaluations per image; the images at step 0 are real. {RANKING.title} ({RANKING.words}) is computed from at most"
        f" {images:,} samples, at {title} layer {layer}.",
    }


def _point_params(point: Point, model: ModelRecord, settings: PointSettings) -> dict[str, str]:
    """Returns the MLflow parameters of a sampler's run: schedule, sampler, dataset, and the sampler's options in params.yaml.

    The other settings are tags: MLflow writes all parameters above each picture, so many parameters would hide the picture.
    """
    row = {name: value for name, value in settings.row.items() if name not in ("sampler", "fitted_to")}
    about = {"schedule": point.schedule, "sampler": point.sampler, "dataset": model.data.name}
    solver = settings.row.get("sampler", point.sampler)
    return {**flat(row), **about, **({} if solver == point.sampler else {"solver": solver})}


def _link_model(target: Target, run: Run, training: Run, weights: str) -> None:
    from mlflow.entities import LoggedModelInput

    model = _checkpoint_model(target, training, weights)
    if model is not None:
        target.client.log_inputs(run.info.run_id, models=[LoggedModelInput(model.model_id)])


def _log_real(target: Target, run: Run, root: Path, data: DataEntry, start: int, added: Counter[str]) -> None:
    """Logs real images at step 0, where MLflow's slider starts, so that the reader can compare samples with real images."""
    dataset_file = root / paths.dataset_dir() / "dataset.json"
    if dataset_file.exists() and read_dataset_record(root).sha256 == data.sha256:
        picture = arrays.grid(spread(read_dataset(root).train, REAL))
        log_image(target, run, _picture(picture), 0, start, added)


def _picture(picture: arrays.Images) -> arrays.Images:
    """Converts a uint8 picture from C,H,W to H,W or H,W,3, as MLflow expects."""
    return picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)


def _publish_point(target: Target, root: Path, run: Run, files: PointFiles, added: Counter[str]) -> None:
    from mlflow.entities import Metric

    images = read_samples(root / paths.samples_file(files.point)).images
    (_, sampled), (_, evaluated) = _times(files.sampled), _times(files.evaluated)
    metrics = [Metric(key, value, sampled, files.evaluations) for key, value in _peak_memory(files.sampled).items()]
    if files.sampled is not None and files.sampled.per_second:
        seconds = 1 / files.sampled.per_second
        metrics.append(Metric("seconds_per_image", seconds, sampled, files.evaluations))
    if files.metrics is not None:
        values = files.metrics.values
        metrics += [
            Metric(name, values[name], evaluated, files.evaluations)
            for name, row in METRICS.items()
            if row.direction and name in values
        ]
    log_metrics(target, run, metrics, added)
    log_image(target, run, _picture(arrays.preview(images)), files.evaluations, sampled, added)
    if files.metrics is not None:
        record = {"scores": files.metrics.to_json(), "sampled": files.sampled, "evaluated": files.evaluated}
        target.client.log_dict(run.info.run_id, record, f"points/{files.point.name}.json")
        added["files"] += 1
    log(target, run, tags=files.tags)


# The runs of likelihood bounds.


def _publish_likelihood(target: Target, root: Path, schedule: str, added: Counter[str]) -> bool:
    """Publishes a likelihood bound as a child run of the training's run.

    MLflow's step is the number of training steps for bits/dim, and the timestep for rate and distortion. Returns False if
    the bound belongs to another model.
    """
    from mlflow.entities import Metric

    path, table = root / paths.likelihood_file(schedule), root / paths.likelihood_curve_file(schedule)
    training = _publish_training(target, root, schedule, added)
    if training is None or not path.exists() or not table.exists():
        return True
    model, bound = models.read_trained(root, schedule), models.read_bound(root, schedule)
    if bound.model != model.weights_sha256:
        return False
    read_described(path, bound.files, table)
    content = digest([sha256(path), sha256(table)])
    settings = {name: getattr(bound, name) for name in ("seed", "variance", "clip", "times")}
    settings |= {f"images_{split}": found.images for split, found in bound.splits.items()}
    times = read_run(root, paths.likelihood_file(schedule))
    start, end = _times(times)
    tags = {
        "ddpm.stage": "likelihood",
        "ddpm.schedule": schedule,
        "ddpm.dataset": model.data.name,
        "ddpm.dataset_sha256": bound.dataset,
        MODEL: bound.model,
        CONTENT: content,
        "mlflow.parentRunId": training.info.run_id,
        "mlflow.note.content": f"The variational bound of the {schedule} model in bits/dim (lower is better), and its parts L_T"
        " (prior), the sum of all L_t (kl) and L_0 (decoder). The step of `rate` and `distortion` is the timestep.",
        **_commit(times),
    }
    run = find_or_create(
        target,
        digest([training.data.tags[KEY], "likelihood", settings]),
        f"{schedule}-likelihood",
        lambda run: run.data.tags.get(CONTENT) == content,
        start,
        tags,
        added,
    )
    if run.data.tags.get(PUBLISHED) == content:
        return True
    log(target, run, flat({"schedule": schedule, "likelihood": settings}))
    _log_dataset(target, run, root, model.data, "evaluation")
    _link_model(target, run, training, bound.model)
    last = model.training.steps
    names = [f"{part}{error}" for part in ("bits_per_dim", "prior", "kl", "decoder") for error in ("", "_error")]
    metrics = [
        Metric(f"{name}_{split}", getattr(found, name), end, last)
        for split, found in bound.splits.items()
        for name in names
    ]
    for row in read_csv(table):
        metrics += [Metric(key, float(row[key]), end, int(row["time"])) for key in ("rate", "distortion")]
    log_metrics(target, run, metrics, added)
    finish(target, run, end)
    log(target, run, tags={PUBLISHED: content})
    return True


# The run of the report.


def _publish_report(
    target: Target, params: Params, root: Path, added: Counter[str], say: Say, champion: WithChampion | None
) -> None:
    """Publishes the present report as artifacts of one run. The published page contains the lineage, times and comparisons."""
    folder = root / paths.report_dir()
    if not (folder / "best.json").exists():
        return
    (best, rows), times = read_report(root), read_run(root, paths.report_dir())
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in ("index.html", "run.js")]
    page = ""
    if (folder / "index.html").exists():
        parts = _parts_of_page(target, params, root, rows, say, champion)
        write_script(root, parts)
        page = publish_with((folder / "index.html").read_text(encoding="utf-8"), {**parts, "local": ""})
    content = digest([*(sha256(path) for path in files), page])
    row = best.row
    note = f"Best point: **{row.point}**, {RANKING.title} {RANKING.text(row.value)} at {row.evaluations} network evaluations."
    tags = {"ddpm.stage": "report", "ddpm.best": row.point, "mlflow.note.content": note}
    start, end = _times(times)
    run = find_or_create(target, "report", "report", lambda run: True, start, tags, added)
    # protects: tests/tracking/test_tracking.py::test_everything_is_there_once_and_a_second_time_adds_nothing
    if run.data.tags.get("ddpm.report_sha256") == content:
        return
    for path in files:
        target.client.log_artifact(run.info.run_id, str(path), "report")
    if page:
        target.client.log_text(run.info.run_id, page, "report/index.html")
    added["files"] += len(files) + bool(page)
    finish(target, run, end)
    log(target, run, tags={**tags, **_commit(times), "ddpm.report_sha256": content})


def _parts_of_page(
    target: Target, params: Params, root: Path, rows: Sequence[Row], say: Say, champion: WithChampion | None
) -> dict[str, str]:
    """Returns the HTML of the report sections `published` and `compared`, which DVC does not track."""
    place = target.place.shown
    link = f"{place}/{chart(target.experiment)}" if place.startswith("http") else ""
    found = with_previous(params, root, say)
    try:
        best = champion(target, params, root, say) if champion else None
    except InputError as error:
        say(f"publish: the report is not compared with the champion: {error}")
        best = None
    return {
        "published": published(rows, run_records(root, rows), _runs_of(target, root, rows), place, link, root),
        "compared": compared.html([*found, best] if best else found),
    }


def _runs_of(target: Target, root: Path, rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Returns, for each stage, the name and address of the run that shows its output. Without a server, the address is ""."""
    tags_of = dict[str, dict[str, str]]()  # stage -> the tags of the run that shows its output
    for row in rows:
        model_file, samples = (
            root / paths.model_dir(row.schedule) / "model.json",
            paths.samples_file(Point.parse(row.point)),
        )
        if model_file.exists():
            for stage in ("train", "likelihood"):
                weights = models.read_trained(root, row.schedule).weights_sha256
                tags_of[f"{stage}@{row.schedule}"] = {"ddpm.stage": stage, MODEL: weights}
        if (root / samples).exists():
            made = read_samples_record(root / samples).record_sha256
            tag = {"ddpm.stage": "sample", f"ddpm.samples.{row.steps}": made}
            tags_of |= {f"{stage}@{row.point}": tag for stage in ("sample", "evaluate")}
    uri, found = target.place.shown, dict[str, tuple[str, str]]()
    for run in search(target, ""):
        link = f"{uri}/#/experiments/{target.experiment}/runs/{run.info.run_id}" if uri.startswith("http") else ""
        if SUPERSEDED not in run.data.tags:
            mine = [stage for stage, tags in tags_of.items() if tags.items() <= run.data.tags.items()]
            found |= dict.fromkeys(mine, (run.info.run_name, link))
    return found


# The run of the schedules.


def _publish_schedules(target: Target, root: Path, folder: Path, added: Counter[str]) -> None:
    """Publishes the table of schedules as metrics, and the pictures as artifacts. A changed table or picture gets a new run."""
    from mlflow.entities import Metric

    if not (root / folder / "table.csv").exists():
        return
    files = [path for name in ("table.csv", "snr.png", "strip.png") if (path := root / folder / name).exists()]
    content = digest([sha256(path) for path in files])
    rows, times = read_csv(files[0]), read_run(root, folder)
    start, end = _times(times)
    note = "How close x_T is to noise, and how the schedules spread the T steps. The steps of `share_of_steps` are bands of the"
    bands = [name for name in rows[0] if name.startswith("snr ")]
    tags = {
        "ddpm.stage": "schedules",
        "mlflow.note.content": f"{note} signal-to-noise ratio: {', '.join(band.removeprefix('snr ') for band in bands)}.",
        **_commit(times),
    }
    run = find_or_create(
        target,
        "schedules",
        "schedules",
        lambda run: run.data.tags.get(CONTENT) == content,
        start,
        {**tags, CONTENT: content},
        added,
    )
    if run.data.tags.get(PUBLISHED) == content:
        return
    log(target, run, {"diffusion.timesteps": rows[0]["T"]}, tags)
    metrics = []
    for row in rows:
        name = row["schedule"]
        metrics += [Metric(f"{key}/{name}", float(row[key]), end, 0) for key in ("alpha_bar_T", "prior")]
        metrics += [Metric(f"share_of_steps/{name}", float(row[band]), end, step) for step, band in enumerate(bands)]
    log_metrics(target, run, metrics, added)
    for path in files:
        target.client.log_artifact(run.info.run_id, str(path), "schedules")
    added["files"] += len(files)
    finish(target, run, end)
    log(target, run, tags={PUBLISHED: content})
