"""Finds, locks and opens the MLflow store, and turns MLflow's errors into one-line messages."""

from __future__ import annotations

import os
import secrets
import socket
import sqlite3
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ddpm.databases import empty, mlflow_file, sqlite
from ddpm.databases.addresses import with_driver
from ddpm.databases.mlflow_file import ARTIFACTS
from ddpm.databases.mlflow_page import chart
from ddpm.errors import InputError, without_password
from ddpm.files import atomic, paths
from ddpm.files.params import Params
from ddpm.runtime import locks
from ddpm.scores.metrics import HEADLINE, RANKING
from ddpm.sources.source import SOURCES, check_name

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Say = Callable[[str], None]

CHAMPION = "champion"
CONNECT_SECONDS = 3.0  # how long to wait for a server to answer
LOCK_SECONDS = 120.0  # how long to wait for the lock of the store
SILENT_SECONDS = 1.0  # how long to wait for another promotion before printing a message

# Environment variables that limit how long MLflow waits and how much it prints. Values that the user has set take precedence.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the URL may hold a password
    "MLFLOW_UV_AUTO_DETECT": "false",
}


@dataclass(frozen=True)
class Place:
    """An MLflow tracking store.

    Args:
        uri: the address of the store.
        lock: the lock file of the store.
        artifacts: the URI below which new experiments keep their files; None if a server decides.
        database: the SQLite file of the store; None for a server or another database.
    """

    uri: str
    lock: Path
    artifacts: str | None
    database: Path | None = None

    @property
    def shown(self) -> str:
        """The URI for messages: without the password, and with the plain path of a database file."""
        if self.database:
            return f"sqlite:///{self.database}"
        return without_password(self.uri)


def repo_root(root: Path = Path()) -> Path:
    """Returns the absolute path of `root`.

    If `root` is in a temporary folder of a DVC experiment, returns the checkout that holds this folder instead.
    """
    path = root.resolve()
    parts = path.parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return path


def tracking_uri(root: Path = Path()) -> str:
    """Returns the address of the store: MLFLOW_TRACKING_URI, else MLFLOW_BACKEND_STORE_URI, else mlflow.db in the checkout."""
    named = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_BACKEND_STORE_URI")
    return with_driver(named) if named else sqlite.address_of(repo_root(root) / "mlflow.db")


def find_place(root: Path = Path()) -> Place:
    """Returns the store that `tracking_uri` names. Artifacts go to MLFLOW_DEFAULT_ARTIFACT_ROOT if set, except with a server."""
    uri, home = tracking_uri(root), repo_root(root)
    lock, artifacts = home / paths.CACHE / "mlflow.lock", home / ARTIFACTS
    scheme = uri.partition(":///")[0]
    if file := sqlite.file_of(uri):
        beside = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or (file.parent / ARTIFACTS).as_uri()
        return Place(sqlite.address_of(file, uri.partition("?")[2]), mlflow_file.lock_of(file), beside, file)
    if scheme.partition(":")[0] in ("http", "https"):
        return Place(uri, lock, None)
    return Place(uri, lock, os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or artifacts.as_uri())


def model_name(params: Params) -> str:
    """Returns the name of the experiment and of the registered model: ddpm-DATASET.

    Raises InputError if tracking.name is the name of another data source than data.source.
    """
    SOURCES.require(params.data.source)
    check_name(params)
    return f"ddpm-{params.dataset_name}"


def champion_uri(params: Params) -> str:
    return f"models:/{model_name(params)}@{CHAMPION}"


@dataclass(frozen=True)
class Target:
    """An open store, and the id of the experiment of this dataset."""

    client: MlflowClient
    experiment: str
    place: Place


def prepare_store(params: Params, root: Path = Path()) -> str:
    """Creates the store and the experiment if they do not exist. Returns the id of the experiment.

    A lock ensures that only one process creates them. Raises InputError.
    """
    return open_target(params, root).experiment


def import_mlflow() -> None:
    """Sets the variables of ENVIRONMENT, then imports mlflow, which reads them when it is imported."""
    # protects: tests/tracking/test_secrets.py::test_no_secret_reaches_mlflow_the_outputs_or_the_log
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401


def client_of(where: Place) -> MlflowClient:
    """Checks the database file, and opens the store. Raises InputError.

    The caller must hold the lock, since the first client creates or migrates the file.
    """
    import_mlflow()
    known = where.database is None or mlflow_file.check(where.database)
    if where.database:
        empty.create(where.database)
    from mlflow.tracking import MlflowClient
    from mlflow.tracking._tracking_service.utils import _get_store

    if not known:
        # This sets the folder of experiment 0. Otherwise MLflow chooses a folder below the working folder, and fails if the
        # path of that folder has both kinds of quotes.
        _get_store(where.uri, where.artifacts)
    return MlflowClient(where.uri, registry_uri=where.uri)


def open_target(params: Params, root: Path) -> Target:
    where, name = find_place(root), model_name(params)
    require_reachable(where)
    with plain_errors(where), locked(where):
        client = client_of(where)
        return Target(client, _experiment(client, where, name, params.dataset_name), where)


def _experiment(client: MlflowClient, where: Place, name: str, dataset: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return _new_experiment(client, where, name, dataset)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another host has just created the experiment
    if found is None or found.lifecycle_stage != "active":
        raise InputError(
            f"MLflow at {where.shown}: experiment {name} was deleted; restore it, or delete it permanently"
        )
    if where.artifacts and found.artifact_location.startswith("mlflow-artifacts:"):
        raise InputError(
            f"MLflow at {where.shown}: the artifacts of experiment {name} can be reached only through an MLflow server;"
            " set MLFLOW_TRACKING_URI to the address of that server"
        )
    if where.database:
        mlflow_file.require_in_place(where.database, found.artifact_location)
    return str(found.experiment_id)


def _new_experiment(client: MlflowClient, where: Place, name: str, dataset: str) -> str:
    """Creates an experiment and returns its id. Raises MlflowException, InputError."""
    if where.database and "MLFLOW_DEFAULT_ARTIFACT_ROOT" not in os.environ:
        mlflow_file.require_new(where.database, name)
    location = f"{where.artifacts.rstrip('/')}/{name}" if where.artifacts else None
    if location and "MLFLOW_DEFAULT_ARTIFACT_ROOT" in os.environ:
        location += f"-{secrets.token_hex(4)}"  # the folder may hold an experiment of this name from another database
    tags = {"ddpm.dataset": dataset, "mlflow.experimentKind": "custom_model_development"}
    created = str(client.create_experiment(name, artifact_location=location, tags=tags))
    client.set_experiment_tag(created, "mlflow.note.content", _note(created, dataset))
    return created


def _note(experiment: str, dataset: str) -> str:
    """Returns the description of the experiment. MLflow's page shows only the first line until the reader unfolds the rest."""
    return (
        f"**[{RANKING.title} against steps]({chart(experiment)})** of denoising diffusion on {dataset}: a line per"
        " schedule and sampler, and the images at each step.\n\n"
        "A step is the number of network evaluations per image. The images at step 0 are real; move the slider to see the"
        " samples. Each schedule has a run (`linear`: the training) with a child run per sampler"
        " (`linear-ddim`: the scores and images). Examples of filters: ``tags.`ddpm.schedule` = 'cosine'``,"
        " ``tags.`ddpm.sampler` = 'ddim'``, ``tags.`ddpm.dataset_sha256` LIKE 'c8c4%'``,"
        f" ``tags.`mlflow.source.git.commit` LIKE '0123%'``, ``metrics.{HEADLINE} < 20``."
    )


@contextmanager
def as_default(where: Place) -> Iterator[None]:
    """Makes `where` the default store of this process while the `with` block runs.

    MLflow's registry looks up logged models in the default store.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(where.uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def locked(where: Place, name: str = "") -> AbstractContextManager[None]:
    """Holds a lock of the store while the `with` block runs.

    Without a name, this is the lock for reading and writing. Every process holds it only briefly, so a long wait raises
    InputError. A lock with a name, such as ".promote", may be held for hours, so this function waits without a limit.
    """

    def waiting() -> None:
        if not name:
            raise InputError(
                f"MLflow at {where.shown} is in use by another process, already for {LOCK_SECONDS:.0f} s; try again later"
            ) from None
        print(
            f"MLflow at {where.shown}: waiting for another process that promotes a model there",
            file=sys.stderr,
            flush=True,
        )

    patience = SILENT_SECONDS if name else LOCK_SECONDS
    return locks.held(where.lock.with_name(where.lock.name + name), patience, waiting)


# Errors.


PUBLISH_LATER = "publish later with `ddpm publish`"


def require_reachable(where: Place, advice: str = PUBLISH_LATER) -> None:
    """Raises InputError if the server does not answer. Without this check, MLflow would retry for minutes.

    advice: the end of the message, which tells the user what to do.
    """
    host, port = (None, None) if where.database else _address(where.uri)
    if not host or not port:
        return
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        raise InputError(_unreachable(where, advice)) from None


def _address(uri: str) -> tuple[str | None, int | None]:
    """Returns the host and port of a server. Returns (None, None) for a file, a server behind a proxy, or an unknown store."""
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or ""):
            return None, None
        return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        return None, None  # MLflow will report the error
    return url.host, url.port or {"postgresql": 5432, "mysql": 3306}.get(url.get_backend_name())


def _unreachable(where: Place, advice: str, why: str = "") -> str:
    return f"MLflow at {where.shown} cannot be reached{why and f' ({why})'}; {advice}"


@contextmanager
def plain_errors(where: Place, advice: str = PUBLISH_LATER) -> Iterator[None]:
    """Turns errors of MLflow, the server, the database, S3 or the disk into a one-line InputError.

    advice: the end of the message if the store cannot be reached or S3 fails. It tells the user what to do.
    """
    import_mlflow()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        text = " ".join(str(error).split())
        if "API request to" in text or isinstance(error, ConnectionError):
            raise InputError(_unreachable(where, advice)) from error
        raise InputError(f"MLflow at {where.shown}: {text[:300]}") from error
    except Exception as error:
        text = " ".join(str(error).split())
        if _is_database_error(error) and where.database is None:
            raise InputError(_unreachable(where, advice, text.partition(" (Background")[0][:300])) from error
        if not isinstance(error, _s3_errors()):
            raise
        raise InputError(f"MLflow cannot use its files in S3: {text[:300]}; {advice}") from error


def _is_database_error(error: Exception) -> bool:
    from sqlalchemy.exc import OperationalError

    return isinstance(error, OperationalError)


def _s3_errors() -> tuple[type[Exception], ...]:
    """Returns the error types of the S3 client. Called only after an error, because the imports are slow."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return Boto3Error, BotoCoreError, ClientError


_warned: set[str] = set()


def warn(line: str, say: Say) -> None:
    """Prints a warning once per process."""
    if line not in _warned:
        _warned.add(line)
        say(f"warning: {line}")


def make_empty() -> None:
    """Creates the empty database that `ddpm.databases.empty` copies. `make` calls this function."""
    with atomic.replacing(empty.EMPTY) as file:
        client_of(Place(f"sqlite:///{file}", empty.EMPTY, None)).search_experiments()
        with closing(sqlite3.connect(file)) as database:
            # MLflow then creates the default experiment again in each copy, with the address of that copy.
            database.execute("DELETE FROM experiments")
            database.commit()
