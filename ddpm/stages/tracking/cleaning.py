"""What MLflow keeps and nothing refers to. What a registered version was made from is always kept, champion or not.

`mlflow gc` looks at neither the registry nor files without a run, and clears other projects' experiments too.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ddpm.stages.cleaning import Garbage, incomplete_uploads
from ddpm.stages.errors import InputError
from ddpm.stages.tracking.place import client_of, find_place, locked, plain_errors, require_reachable

if TYPE_CHECKING:
    from mlflow.entities import Experiment, LoggedModel
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.tracking import MlflowClient

RUN, MODEL_ID = re.compile(r"[0-9a-f]{32}"), re.compile(r"m-[0-9a-f]{32}")
OWN = re.compile(r"/[^/]+-[0-9a-f]{8}$")  # a folder that place.py made for one experiment of one database


def unreferenced(before: float, root: Path = Path()) -> list[Garbage]:
    """Deleted runs, models that no run has and no version is, files that belong to neither, and unfinished uploads, in the
    experiments that this project made; of what is older than `before` (seconds since 1970).

    Raises InputError, also behind a server: only at the database can something be removed for good.
    """
    where = find_place(root)
    if where.artifacts is None:
        raise InputError(
            f"MLflow at {where.shown} is a server, which removes nothing for good; run `ddpm gc` with MLFLOW_TRACKING_URI set to"
            " its database"
        )
    require_reachable(where)
    with plain_errors(where), locked(where):
        client, found = client_of(where), list[Garbage]()
        held = _held(client)
        for experiment in _experiments(client):
            found += _of(client, where.uri, experiment, held, before)
        return found


def _held(client: MlflowClient) -> set[str]:
    """Ids of the runs and models that a registered version was made from."""
    held = set[str]()
    for version in _pages(client.search_model_versions, ""):
        source = str(version.source or "").removeprefix("models:/").partition("/")[0]
        held |= {name for name in (version.run_id, version.model_id, source) if name}
    return held


def _experiments(client: MlflowClient) -> list[Experiment]:
    from mlflow.entities import ViewType

    everything = _pages(client.search_experiments, view_type=ViewType.ALL)
    return [experiment for experiment in everything if "ddpm.dataset" in experiment.tags]


def _of(client: MlflowClient, uri: str, experiment: Experiment, held: set[str], before: float) -> Iterator[Garbage]:
    from mlflow.entities import ViewType
    from mlflow.tracking._tracking_service.utils import _get_store

    location = experiment.artifact_location
    # Files first: a record is made before its files, so what somebody publishes meanwhile has one.
    folders = _folders(location) if _is_own(location, experiment.name, uri) else []
    records, age = _get_store(uri), int((time.time() - before) * 1000)
    runs = _pages(client.search_runs, [experiment.experiment_id], run_view_type=ViewType.ALL)
    removed = set(records._get_deleted_runs(older_than=age)) - held
    for run in runs:
        if run.info.run_id in removed:
            forget = partial(records._hard_delete_run, run.info.run_id)
            yield _garbage("deleted runs", run.info.run_name, "deleted in MLflow", run.info.artifact_uri, forget)
    kept = {run.info.run_id for run in runs} - removed
    models = _models(client, records, experiment.experiment_id)
    idle = [
        model
        for model in models
        if not {model.model_id, model.source_run_id} & (held | kept) and model.creation_timestamp < before * 1000
    ]
    used = {model for run in kept for model in _models_of(client, run)} if idle else set()
    for model in idle:
        if model.model_id not in used:
            forget = partial(_forget_model, records, model.model_id)
            yield _garbage("models without a run", model.name, "their runs are gone", model.artifact_location, forget)
    known = {run.info.run_id for run in runs} | {model.model_id for model in models}
    for folder in folders:
        if Path(folder).name not in known:
            yield _garbage("folders without a record", folder, "no run and no model", f"{location}/{folder}")
    yield from incomplete_uploads(location, os.environ.get("MLFLOW_S3_ENDPOINT_URL"), before)


def _garbage(kind: str, name: str, why: str, location: str, forget: Callable[[], Any] | None = None) -> Garbage:
    """The files at a location, and the record that `forget` removes after them: cut off in between, it is found again."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    files = get_artifact_repository(location.removesuffix("/artifacts"))  # with the folder around them

    def remove() -> None:
        files.delete_artifacts()
        if forget:
            forget()

    return Garbage(kind, name, why, _size(files, ""), remove)


def _size(files: ArtifactRepository, path: str) -> int:
    entries = files.list_artifacts(path or None)
    return sum(_size(files, entry.path) if entry.is_dir else entry.file_size or 0 for entry in entries)


def _folders(location: str) -> list[str]:
    """Of runs and models, below an experiment's location."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    files = get_artifact_repository(location)
    runs = [entry.path for entry in files.list_artifacts() if entry.is_dir and RUN.fullmatch(Path(entry.path).name)]
    models = files.list_artifacts("models") if any(entry.path == "models" for entry in files.list_artifacts()) else []
    return runs + [entry.path for entry in models if entry.is_dir and MODEL_ID.fullmatch(Path(entry.path).name)]


def _is_own(location: str, name: str, uri: str) -> bool:
    """Whether no other database keeps files there, so that what this one does not know nobody does."""
    if OWN.search(location):
        return True
    file = Path(unquote(uri.partition(":///")[2]))
    beside = file.parent / "mlartifacts" / name
    return Path(unquote(location.removeprefix("file://"))) == beside and [*file.parent.glob("*.db")] == [file]


def _models(client: MlflowClient, records: Any, experiment: str) -> list[LoggedModel]:
    """Those marked as deleted too."""
    deleted = [records.get_logged_model(name, allow_deleted=True) for name in records._get_deleted_logged_models()]
    return _pages(client.search_logged_models, [experiment]) + [
        model for model in deleted if str(model.experiment_id) == experiment
    ]


def _models_of(client: MlflowClient, run_id: str) -> set[str]:
    run = client.get_run(run_id)
    linked: list[Any] = [
        *(run.inputs.model_inputs if run.inputs else []),
        *(run.outputs.model_outputs if run.outputs else []),
    ]
    return {link.model_id for link in linked}


def _forget_model(records: Any, model: str) -> None:
    if model not in records._get_deleted_logged_models():
        records.delete_logged_model(model)
    records._hard_delete_logged_model(model)


def _pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    found, token = list[Any](), None
    while True:
        page = search(*arguments, **options, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found
