"""Reads and writes *.run.json: when, where and how fast an output was made. DVC does not track these files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files import paths, records


@dataclass(frozen=True)
class RunRecord:
    """The run that made an output.

    Args:
        stage: the DVC stage.
        started, ended: milliseconds since the epoch.
        seconds: wall time.
        count, unit: the work done, such as 1000 "steps". A resumed run counts only the work since the resume.
        per_second: `unit`s per second; None for a run that took no time.
        peak_memory_bytes: the most memory in use.
        gpu_peak_memory_bytes: the most GPU memory in use; None on a CPU.
        device: "cpu" or "cuda".
        hardware: names and sizes, such as "cpu", "cores", "gpu".
        versions: the versions of Python and of packages.
        git_commit, git_dirty: the commit that was checked out, and whether tracked files differed from it.
    """

    stage: str
    started: int
    ended: int
    seconds: float
    count: int = 0
    unit: str = ""
    per_second: float | None = None
    peak_memory_bytes: int | None = None
    gpu_peak_memory_bytes: int | None = None
    device: str = "?"
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    git_dirty: bool = False


def write_run(output: Path, record: RunRecord) -> None:
    """Writes the run file beside an output."""
    records.write_json(paths.run_file(output), asdict(record))


def read_run(root: Path, output: Path) -> RunRecord | None:
    """Reads the run file of an output. Returns None if the file is missing. Raises InputError if the file is damaged."""
    path = root / paths.run_file(output)
    if not path.exists():
        return None
    try:
        return records.build(RunRecord, records.read_json(path))
    except (InputError, ValueError) as error:
        raise InputError(
            f"{path}: damaged ({error}); delete this file, which only describes the run: the output stays"
        ) from None
