"""Where MLflow's data lie, and how to reach them: store, lock, experiment, and what to say when they cannot be reached."""

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
CONNECT_SECONDS = 3.0
LOCK_SECONDS = 120.0
SILENT_SECONDS = 1.0  # of a wait without end

# Bounded waiting, and quiet. What the user has set stays.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the password that it may hold
    "MLFLOW_UV_AUTO_DETECT": "false",
}


@dataclass(frozen=True)
class Place:
    """A tracking store. artifacts: the URI below which new experiments keep theirs, or None where a server decides."""

    uri: str
    lock: Path
    artifacts: str | None
    database: Path | None = None  # the file, if the store is one

    @property
    def shown(self) -> str:
        """The URI without a password, or the path of a database file, as a reader knows it."""
        if self.database:
            return f"sqlite:///{self.database}"
        return without_password(self.uri)


def repo_root(root: Path = Path()) -> Path:
    """The checkout that `root` belongs to; a temporary experiment of DVC lies in .dvc/tmp/exps of its own."""
    path = root.resolve()
    parts = path.parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return path


def tracking_uri(root: Path = Path()) -> str:
    """MLFLOW_TRACKING_URI if it is set, else the database that MLFLOW_BACKEND_STORE_URI names, else mlflow.db at the root of
    the checkout.
    """
    named = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_BACKEND_STORE_URI")
    return with_driver(named) if named else sqlite.address_of(repo_root(root) / "mlflow.db")


def find_place(root: Path = Path()) -> Place:
    """The store that `tracking_uri` names, its lock, and where its artifacts go: MLFLOW_DEFAULT_ARTIFACT_ROOT if it is set."""
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
    """Names the experiment and the registered model: ddpm-DATASET. Raises InputError for a name that is another source's."""
    SOURCES.require(params.data.source)
    check_name(params)
    return f"ddpm-{params.dataset_name}"


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
    return open_target(params, root).experiment


def import_mlflow() -> None:
    """The first import of mlflow reads the environment."""
    # protects: tests/tracking/test_secrets.py::test_no_secret_reaches_mlflow_the_outputs_or_the_log
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401


def client_of(where: Place) -> MlflowClient:
    """Checks a database file, then opens it. Call it under the lock: the first client creates or migrates the file.

    Raises InputError.
    """
    import_mlflow()
    known = where.database is None or mlflow_file.check(where.database)
    if where.database:
        empty.create(where.database)
    from mlflow.tracking import MlflowClient
    from mlflow.tracking._tracking_service.utils import _get_store

    if (
        not known
    ):  # MLflow gives experiment 0 a place below the working folder, and fails where its path holds both quotes
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
            found = client.get_experiment_by_name(name)  # another host was quicker
    if found is None or found.lifecycle_stage != "active":
        raise InputError(f"MLflow at {where.shown}: experiment {name} was deleted; restore it, or delete it for good")
    if where.artifacts and found.artifact_location.startswith("mlflow-artifacts:"):
        raise InputError(
            f"MLflow at {where.shown}: experiment {name} keeps its artifacts behind a server;"
            " set MLFLOW_TRACKING_URI to that server"
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
        location += f"-{secrets.token_hex(4)}"  # other databases may keep theirs below the same root
    tags = {"ddpm.dataset": dataset, "mlflow.experimentKind": "custom_model_development"}
    created = str(client.create_experiment(name, artifact_location=location, tags=tags))
    client.set_experiment_tag(created, "mlflow.note.content", _note(created, dataset))
    return created


def chart(experiment: str) -> str:
    """The chart of all points, as the fragment of an address.

    MLflow 3.17 chooses between its pages for agents and for models by the address and by what the browser was last told; no tag
    of the experiment has a say.
    """
    return (
        f"#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART"
        "&searchFilter=tags.%60ddpm.stage%60%20%3D%20'sample'&orderByKey=tags.%60mlflow.runName%60&orderByAsc=true"
    )


def _note(experiment: str, dataset: str) -> str:
    """What the experiment's page says on top; it shows the first line, and the rest when that is opened."""
    return (
        f"**[{RANKING.title} against steps]({chart(experiment)})** of denoising diffusion on {dataset}: a line per"
        " schedule and sampler, with the images beside it.\n\n"
        "Step = network evaluations per image; the images at step 0 are real ones, and the slider moves on to the samples."
        " A run per schedule (`linear`: the training) has a child per sampler"
        " (`linear-ddim`: the scores and images). Filters: ``tags.`ddpm.schedule` = 'cosine'``,"
        " ``tags.`ddpm.sampler` = 'ddim'``, ``tags.`ddpm.dataset_sha256` LIKE 'c8c4%'``,"
        f" ``tags.`mlflow.source.git.commit` LIKE '0123%'``, ``metrics.{HEADLINE} < 20``."
    )


@contextmanager
def as_default(where: Place) -> Iterator[None]:
    """MLflow's database registry asks the store of the whole process about logged models; what was set comes back."""
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
    """The store's lock, which nobody holds for long; or that of a promotion, of any length. Raises InputError."""

    def waiting() -> None:
        if not name:
            raise InputError(
                f"MLflow at {where.shown} is in use by another process since {LOCK_SECONDS:.0f} s"
            ) from None
        print(f"MLflow at {where.shown}: another process promotes there; waiting for it", file=sys.stderr, flush=True)

    patience = SILENT_SECONDS if name else LOCK_SECONDS
    return locks.held(where.lock.with_name(where.lock.name + name), patience, waiting)


# An unreachable server.


PUBLISH_LATER = "publish later with `ddpm publish`"


def require_reachable(where: Place, advice: str = PUBLISH_LATER) -> None:
    """A quick look before mlflow is even imported: its own attempts take far longer. Raises InputError with that advice."""
    host, port = (None, None) if where.database else _address(where.uri)
    if not host or not port:
        return
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        raise InputError(_unreachable(where, advice)) from None


def _address(uri: str) -> tuple[str | None, int | None]:
    """The host and port of a server, or None for what cannot be asked: a file, a server behind a proxy, one of another kind."""
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
        return None, None  # MLflow says what is wrong
    return url.host, url.port or {"postgresql": 5432, "mysql": 3306}.get(url.get_backend_name())


def _unreachable(where: Place, advice: str, why: str = "") -> str:
    return f"MLflow at {where.shown} cannot be reached{why and f' ({why})'}; {advice}"


@contextmanager
def plain_errors(where: Place, advice: str = PUBLISH_LATER) -> Iterator[None]:
    """What MLflow, its server, S3 or the disk answer becomes one line. Raises InputError.

    advice: what to do where it cannot be reached.
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
        if _is_of_a_database(error) and where.database is None:
            raise InputError(_unreachable(where, advice, text.partition(" (Background")[0][:300])) from error
        if not isinstance(error, _s3_errors()):
            raise
        raise InputError(f"S3, where MLflow keeps its files: {text[:300]}; {advice}") from error


def _is_of_a_database(error: Exception) -> bool:
    from sqlalchemy.exc import OperationalError

    return isinstance(error, OperationalError)


def _s3_errors() -> tuple[type[Exception], ...]:
    """Asked for when something was raised: to import them takes a moment."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return Boto3Error, BotoCoreError, ClientError


_warned: set[str] = set()


def warn(line: str, say: Say) -> None:
    """Once a process."""
    if line not in _warned:
        _warned.add(line)
        say(f"warning: {line}")


def make_empty() -> None:
    """Creates the empty database; the installation calls this."""
    with atomic.replacing(empty.EMPTY) as file:
        client_of(Place(f"sqlite:///{file}", empty.EMPTY, None)).search_experiments()
        with closing(sqlite3.connect(file)) as database:
            database.execute("DELETE FROM experiments")  # MLflow makes the default one again, with its new place
            database.commit()
