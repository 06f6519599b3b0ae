"""An empty MLflow database, made once when the project is installed: its tables take seconds of computing to create."""

from __future__ import annotations

import sys
from pathlib import Path

from ddpm.files import atomic

EMPTY = Path(sys.prefix) / "share" / "mlflow" / "mlflow.db"


def create(file: Path) -> None:
    """A copy at `file` if nothing is there; what is missing then, or an older one's tables, MLflow makes itself.

    Call it under the store's lock, which a server that makes its own does not hold: what it has made stays.
    """
    if EMPTY.exists() and not file.exists():
        with atomic.replacing(file, keep=True) as copy:
            copy.write_bytes(EMPTY.read_bytes())
