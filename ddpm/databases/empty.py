"""Copies an empty MLflow database, which the installation creates once because its tables take seconds to create."""

from __future__ import annotations

import sys
from pathlib import Path

from ddpm.files import atomic

EMPTY = Path(sys.prefix) / "share" / "mlflow" / "mlflow.db"


def create(file: Path) -> None:
    """Copies the empty database to `file`, unless that file exists. MLflow itself creates or migrates missing tables.

    Call this under the store's lock. A starting server does not hold that lock, so a file that it has created meanwhile is kept.
    """
    if EMPTY.exists() and not file.exists():
        with atomic.replacing(file, keep=True) as copy:
            copy.write_bytes(EMPTY.read_bytes())
