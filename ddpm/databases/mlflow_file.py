"""Checks the database file of an MLflow store, and its artifact addresses, before MLflow opens the file.

MLflow records absolute addresses of artifacts and has no command that changes them (mlflow/mlflow#3144). Without this module a
copied or moved checkout would read and write the artifacts of the place where the records were made. MLflow also takes a lost
database for a new one. This is the only module that knows MLflow's tables.
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote

from ddpm.errors import InputError

ARTIFACTS = "mlartifacts"  # the folder beside the database
SHARED = re.compile(r"-[0-9a-f]{8}$")  # ends the name of an experiment's folder below MLFLOW_DEFAULT_ARTIFACT_ROOT
# Columns that hold addresses of artifacts. Each address starts with that of its experiment.
COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
RESTORE = "restore it from a backup (docs/storage.md)"
REBUILD = "run `ddpm publish`, which records the outputs anew, without earlier champions and their history"


def lock_of(file: Path) -> Path:
    """The lock file of the store, which whoever opens the database holds meanwhile."""
    return file.with_name(f"{file.name}.lock")


def check(file: Path) -> bool:
    """Makes sure that a database file is whole, and that its artifacts lie beside it or in a place of the user's choice.

    Addresses of another `mlartifacts` become those of the one beside the file. Call it under the store's lock. Returns whether
    the file holds experiments. Raises InputError for a damaged file, and where records or artifacts are missing.
    """
    home = file.parent / ARTIFACTS
    with _opened(file) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        found = "experiments" in tables
        rows = database.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall() if found else []
        if all(number == 0 for number, _ in rows) and _has_files(home):
            raise InputError(
                f"{file} holds no experiment, and {home} holds the artifacts of some: the records are lost; {RESTORE},"
                f" or move {ARTIFACTS} away and {REBUILD}"
            )
        moved = {location: new for number, location in rows if (new := _moved(database, file, number, location))}
        for old, new in moved.items():
            _rewrite(database, tables, old, new)
    if moved:
        print(f"{file} was moved or copied: its records now name the artifacts in {home}", file=sys.stderr, flush=True)
    return bool(rows)


def require_new(file: Path, experiment: str) -> None:
    """Raises InputError where the folder of an experiment that is about to be created holds files of an earlier one."""
    folder = file.parent / ARTIFACTS / experiment
    if _has_files(folder):
        raise InputError(
            f"{file} has no experiment {experiment}, and {folder} holds the artifacts of one: the file is not the one that"
            f" recorded them; {RESTORE}, or move that folder away and {REBUILD}"
        )


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection whose changes are kept together when the block ends well. A file that is missing counts as an empty one."""
    address = f"{file.as_uri()}?mode=rw" if file.exists() else ":memory:"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=60)) as database, database:
            (result,) = database.execute("PRAGMA quick_check(1)").fetchone()  # 2 ms per megabyte
            if result != "ok":
                raise InputError(_damaged(file, result))
            (page,) = database.execute("PRAGMA page_size").fetchone()
            if file.exists() and file.stat().st_size % page:  # SQLite takes what is missing of its last page for zeros
                raise InputError(_damaged(file, "its last page is cut off"))
            yield database
    except UnicodeDecodeError as error:  # of SQLite's message, which quotes the damaged bytes
        raise InputError(_damaged(file, f"malformed: {error.reason}")) from None
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
            raise InputError(_damaged(file, str(error))) from None
        raise InputError(f"{file}: {error}; check that this file and its folder can be read and written") from None


def _damaged(file: Path, why: str) -> str:
    return f"{file} is damaged ({' '.join(why.split())}): {RESTORE}, or move it and {ARTIFACTS} away and {REBUILD}"


def _moved(database: sqlite3.Connection, file: Path, experiment: int, location: str) -> str | None:
    """The address that an experiment's artifacts should have, or None where the recorded one is right. Raises InputError."""
    recorded, home = _path(location), file.parent / ARTIFACTS
    if recorded is None or recorded.parent.name != ARTIFACTS or SHARED.search(recorded.name):
        return None
    if recorded.parent.resolve() in (home.resolve(), _chosen()):
        return None
    here = home / recorded.name
    if not here.exists() and recorded.exists():
        if not (recorded.parents[1] / file.name).exists():
            return None  # kept apart from the database on purpose
        raise InputError(
            f"{file} is a copy whose artifacts lie in {recorded.parent}; copy that folder to {home} too, so that the original's"
            " artifacts stay as they are"
        )
    used = database.execute("SELECT 1 FROM runs WHERE experiment_id = ? LIMIT 1", (experiment,)).fetchone()
    if used and not home.exists():
        raise InputError(
            f"{file} names artifacts in {recorded.parent}, which are neither there nor in {home}; bring that folder to {home},"
            " or make an empty one to go on without them"
        )
    return here.as_uri() if location.startswith("file:") else str(here)


def _chosen() -> Path | None:
    """The local folder that MLFLOW_DEFAULT_ARTIFACT_ROOT names, if it names one."""
    named = _path(os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT", ""))
    return named and named.resolve()


def _path(location: str) -> Path | None:
    """The absolute local path that an address names, or None for any other address."""
    path = unquote(location.removeprefix("file://")) if location.startswith("file:///") else location
    return Path(path) if path.startswith("/") else None


def _rewrite(database: sqlite3.Connection, tables: set[str], old: str, new: str) -> None:
    """Replaces the beginning of every address that names `old` or something below it."""
    for table in COLUMNS.keys() & tables:
        for column in COLUMNS[table]:
            database.execute(
                f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1)"
                f" WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                {"old": old, "new": new},
            )


def _has_files(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))
