"""Allows only one flow run at a time to work in a checkout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files import paths, records
from ddpm.provenance import lock_mending
from ddpm.runtime import locks
from flows.watch import watcher


@contextmanager
def alone(root: Path, flow_run: str | None = None, asked_by: str = "") -> Iterator[None]:
    """Holds the lock of the checkout while the `with` block runs. A second run waits, and names the process that holds it.

    Args:
        root: the checkout.
        flow_run: the id of the flow run that works here.
        asked_by: on a host, the id of the flow run that asked for the stage.

    Raises:
        InputError: `asked_by` itself holds the lock, so both flow runs would wait for ever.
    """
    path = root / paths.CACHE / "train-eval.lock"
    holder = path.with_suffix(".json")

    def waiting() -> None:
        record: dict[str, Any] = {}
        with suppress(InputError):  # the record may be missing or damaged, but only these messages need it
            record = records.read_json(holder)
        if asked_by and record.get("flow_run") == asked_by:
            raise InputError(
                "the flow is already running in this clone; start the worker in a clone of its own"
            ) from None
        watcher.get().line(
            "train-eval", f"waiting: another run (process {record.get('pid', 'unknown')}) is at work in this checkout"
        )

    with locks.held(path, waiting=waiting):
        records.write_json(holder, {"pid": os.getpid(), "flow_run": flow_run})
        lock_mending.check(root, lambda line: watcher.get().line("train-eval", line))
        yield
