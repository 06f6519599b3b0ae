"""Copies an empty MLflow database. The installation creates that database once, since creating its tables takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from ddpm.files import atomic

EMPTY = Path(sys.prefix) / "share" / "mlflow" / "mlflow.db"


def create(file: Path) -> None:
    """Copies the empty database to `file`, unless that file exists. MLflow itself creates or migrates missing tables.

    The caller holds the store's lock. A server that starts does not take this lock, so it may create `file` at the same time.
    This function keeps the server's file.
    """
    if EMPTY.exists() and not file.exists():
        with atomic.replacing(file, keep=True) as copy:
            copy.write_bytes(EMPTY.read_bytes())
