"""An empty MLflow database, made once when the project is installed: its tables take seconds of computing to create."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from ddpm.files import store

EMPTY = Path(sys.prefix) / "share" / "mlflow" / "mlflow.db"


def create(file: Path) -> None:
    """A copy at `file` if nothing is there; what is missing then, or an older one's tables, MLflow makes itself.

    Call it under the store's lock, which a server that makes its own does not hold: what it has made stays.
    """
    if EMPTY.exists() and not file.exists():
        with store.replacing(file, keep=True) as copy:
            copy.write_bytes(EMPTY.read_bytes())


def make() -> None:
    """What the installation calls."""
    from ddpm.tracking.place import Place, client_of

    with store.replacing(EMPTY) as file:
        client_of(Place(f"sqlite:///{file}", EMPTY, None)).search_experiments()
        with closing(sqlite3.connect(file)) as database:
            database.execute("DELETE FROM experiments")  # MLflow makes the default one again, with its new place
            database.commit()
