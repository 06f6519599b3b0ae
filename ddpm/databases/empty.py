"""Copies an empty MLflow database. `make` creates the empty database once, since creating its tables takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from ddpm.files import atomic

EMPTY = Path(sys.prefix) / "share" / "mlflow" / "mlflow.db"


def create(file: Path) -> None:
    """Copies the empty database to `file`, unless `file` exists. Without an empty database, MLflow creates the tables later.

    The caller holds the lock of the MLflow store. An MLflow server that starts does not take this lock, so it may create `file`
    at the same time. In that case this function keeps the server's file.
    """
    if EMPTY.exists() and not file.exists():
        with atomic.replacing(file, keep=True) as copy:
            copy.write_bytes(EMPTY.read_bytes())
