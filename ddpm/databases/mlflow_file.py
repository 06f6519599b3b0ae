"""Checks the database file of an MLflow store, and its artifact addresses, before MLflow opens the file.

MLflow records absolute addresses of artifacts and has no command that changes them (mlflow/mlflow#3144). Without this module, a
copied or moved checkout would read and write the artifacts of the original. If a database is lost, MLflow silently creates
a new database. No other module knows MLflow's tables.
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote

from ddpm.errors import InputError

ARTIFACTS = "mlartifacts"  # the folder beside the database
SHARED = re.compile(r"-[0-9a-f]{8}$")  # the end of an experiment's folder name below MLFLOW_DEFAULT_ARTIFACT_ROOT
# Columns that hold addresses of artifacts. Each address starts with the address of its experiment.
COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
EXPERIMENTS = """
    SELECT experiment_id, artifact_location, EXISTS (
        SELECT 1 FROM runs WHERE runs.experiment_id = experiments.experiment_id AND runs.lifecycle_stage = 'active'
    ) FROM experiments
"""
NEWEST = """
    SELECT experiments.experiment_id FROM experiments JOIN runs ON runs.experiment_id = experiments.experiment_id
    WHERE experiments.lifecycle_stage = 'active' AND runs.lifecycle_stage = 'active' AND experiments.name LIKE 'ddpm-%'
    GROUP BY experiments.experiment_id ORDER BY max(experiments.name = :name) DESC, max(runs.start_time) DESC LIMIT 1
"""
SUFFIXES = (".db", ".sqlite", ".sqlite3")  # suffixes of databases in use; a backup may have any other suffix
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
RESTORE = "restore the database from a backup (docs/storage.md)"
REBUILD = "run `ddpm publish`, which records the outputs anew, without earlier champions and their history"


def lock_of(file: Path) -> Path:
    """Returns the lock file of the MLflow database `file`. A process holds this lock while it opens the database."""
    return file.with_name(f"{file.name}.lock")


def check(file: Path) -> bool:
    """Checks that a database file is undamaged, and that its artifacts were not lost or left with another database.

    A moved or copied database still names its old `mlartifacts` folder. If an experiment's folder lies in the `mlartifacts`
    beside the file, this function corrects the experiment's addresses. Artifacts below other folders are not checked. The
    caller holds the lock of the MLflow store.

    Returns whether the file holds experiments. Raises InputError if the file is damaged, or if records or artifacts are missing.
    """
    home = file.parent / ARTIFACTS
    with _opened(file) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        rows = database.execute(EXPERIMENTS).fetchall() if "experiments" in tables else []
        # protects: tests/tracking/test_tracking.py::test_lost_records_are_not_taken_for_a_new_store[emptied]
        if all(number == 0 for number, _, _ in rows) and _are_lost(file, home.glob("*")):
            raise InputError(
                f"{file} holds no experiment, but {home} holds artifacts of experiments: the records are lost; {RESTORE},"
                f" or move {ARTIFACTS} away and {REBUILD}"
            )
        moved = _new_addresses(file, {location: bool(used) for _, location, used in rows})
        for old, new in moved.items():
            _rewrite(database, tables, old, new)
    if moved:
        print(f"{file} was moved or copied: its records now name the artifacts in {home}", file=sys.stderr, flush=True)
    return bool(rows)


def require_new(file: Path, experiment: str) -> None:
    """Raises InputError if the artifact folder for a new experiment already holds files of an earlier experiment."""
    folder = file.parent / ARTIFACTS / experiment
    if _are_lost(file, [folder]):
        raise InputError(
            f"{file} has no experiment {experiment}, but {folder} holds its artifacts: another database recorded"
            f" them; {RESTORE}, or move that folder away and {REBUILD}"
        )


def require_in_place(file: Path, location: str) -> None:
    """Raises InputError if the database was copied without an experiment's artifact folder, or the folder cannot be found."""
    _new_addresses(file, {location: True})


def newest_experiment(file: Path, name: str) -> str:
    """Returns the id of the experiment `name` if it has runs, or else the id of the ddpm experiment that ran last.

    Returns "" if no experiment has runs, or if the file is missing, new or unreadable. `check` reports such faults.
    """
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=10)) as database:
            found = database.execute(NEWEST, {"name": name}).fetchone()
    except sqlite3.Error:
        return ""
    return str(found[0]) if found else ""


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """Yields a connection that commits if the `with` block raises nothing. A missing file counts as an empty database."""
    address = f"{file.as_uri()}?mode=rw" if file.exists() else ":memory:"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=60)) as database, database:
            (result,) = database.execute("PRAGMA quick_check(1)").fetchone()  # takes 2 ms per megabyte
            if result != "ok":
                raise InputError(_damaged(file, result))
            (page,) = database.execute("PRAGMA page_size").fetchone()
            # SQLite would read the missing part of the last page as zeros.
            if file.exists() and file.stat().st_size % page:
                raise InputError(_damaged(file, "its last page is cut off"))
            yield database
    except UnicodeDecodeError as error:  # SQLite's error message quotes the damaged bytes
        raise InputError(_damaged(file, f"malformed: {error.reason}")) from None
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
            raise InputError(_damaged(file, str(error))) from None
        raise InputError(f"{file}: {error}; check that this file and its folder can be read and written") from None


def _damaged(file: Path, why: str) -> str:
    return f"{file} is damaged ({' '.join(why.split())}): {RESTORE}, or move it and {ARTIFACTS} away and {REBUILD}"


def _new_addresses(file: Path, experiments: dict[str, bool]) -> dict[str, str]:
    """Maps each artifact address that must change in the database to its new address.

    experiments: maps the artifact address of each experiment to whether the experiment has runs. Raises InputError if artifacts
    are missing.
    """
    home = file.parent / ARTIFACTS
    foreign = {location: path for location in experiments if (path := _foreign_folder(location, home))}
    moved_from = {path.parent for path in foreign.values() if _exists(home / path.name)}
    moved = {}
    for location, path in foreign.items():
        here = home / path.name
        if _exists(here) or _moves_without_files(file, path, experiments[location], moved_from):
            moved[location] = here.as_uri() if location.startswith("file:") else str(here)
    return moved


def _foreign_folder(location: str, home: Path) -> Path | None:
    """Returns the folder that an address names if the folder lies in a `mlartifacts` other than `home`, else None."""
    path = _path(location)
    if path is None or path.parent.name != ARTIFACTS or SHARED.search(path.name):
        return None
    folder = path.parent
    mounted_twice = _exists(folder) and _exists(home) and folder.samefile(home)
    return None if mounted_twice or folder.resolve() in (home.resolve(), _default_root()) else path


def _moves_without_files(file: Path, recorded: Path, used: bool, moved_from: set[Path]) -> bool:
    """Returns whether an experiment's address must change although its folder does not lie in the `mlartifacts` beside the file.

    True if the database is a copy and its original still exists: the copy must not write to the original's `mlartifacts`. Also
    true if the recorded `mlartifacts` is gone, the experiment has no runs, and folders of other experiments were moved from it.

    Args:
        file: the database.
        recorded: the experiment's folder, as the database names it.
        used: whether the experiment has runs.
        moved_from: the recorded `mlartifacts` folders of the experiments whose folders now lie beside the database.

    Raises:
        InputError: the experiment's files were left in the original's folder, or cannot be found.
    """
    here = file.parent / ARTIFACTS / recorded.name
    if _exists(recorded.parent):
        copied = _exists(recorded.parents[1] / file.name)  # otherwise the user may keep the artifacts in another place
        if copied and _exists(recorded):
            raise InputError(
                f"{file} is a copy of a database whose artifacts lie in {recorded.parent}; copy this folder of artifacts to"
                f" {here.parent} too"
            )
        return copied
    if used:
        raise InputError(
            f"{file} names artifacts in {recorded}, which are neither there nor in {here}; mount or restore {recorded},"
            f" or make an empty {here} to go on without those files"
        )
    return recorded.parent in moved_from


def _exists(path: Path) -> bool:
    """Returns whether this user can reach the path. Path.exists would raise for a path in another user's folder."""
    return os.access(path, os.F_OK)


def _default_root() -> Path | None:
    """Returns the local folder that MLFLOW_DEFAULT_ARTIFACT_ROOT names, or None."""
    named = _path(os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT", ""))
    return named and named.resolve()


def _path(location: str) -> Path | None:
    """Returns the absolute local path that an address names, or None if the address is not local."""
    path = unquote(location.removeprefix("file://")) if location.startswith("file:///") else location
    return Path(path) if path.startswith("/") else None


def _rewrite(database: sqlite3.Connection, tables: set[str], old: str, new: str) -> None:
    """Replaces the beginning of every address that names `old` or a path below `old`."""
    for table in COLUMNS.keys() & tables:
        for column in COLUMNS[table]:
            database.execute(
                f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1)"
                f" WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                {"old": old, "new": new},
            )


def _are_lost(file: Path, folders: Iterable[Path]) -> bool:
    """Returns whether one of these artifact folders has lost its records.

    The records are lost if the folder holds files and no other database beside `file` names it.
    """
    others = [other for other in file.parent.iterdir() if other.suffix in SUFFIXES and other != file]
    named = {name for other in others for name in _recorded_folders(other)}
    return any(folder.name not in named and any(path.is_file() for path in folder.rglob("*")) for folder in folders)


def _recorded_folders(file: Path) -> set[str]:
    """Returns the names of the artifact folders of a database's experiments. Empty if the file is no readable MLflow database."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            return {Path(location).name for _, location, _ in database.execute(EXPERIMENTS)}
    except sqlite3.DatabaseError:
        return set()
