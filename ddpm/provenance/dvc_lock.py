"""Reads dvc.lock, where DVC records the hashes of stages' dependencies and outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files.yaml_file import read_yaml


def read(root: Path) -> dict[str, Any]:
    """Returns the stages of dvc.lock, or {} if there is no such file. The result is cached, so callers must not change it."""
    path = root / "dvc.lock"
    if not path.exists():
        return {}
    about = path.stat()
    return _read_stages(path.resolve(), about.st_ino, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_stages(path: Path, *version: int) -> dict[str, Any]:
    lock = read_yaml(path)
    stages = (lock or {}).get("stages") if isinstance(lock or {}, dict) else lock
    if not isinstance(stages or {}, dict):
        raise InputError(f"{path}: expected DVC's stages; restore the file with git")
    return dict(stages or {})


def locked_md5(stages: Mapping[str, Any], stage: str, kind: str, path: Path) -> str | None:
    """Returns the hash that dvc.lock holds for an output (kind "outs") or dependency ("deps") of a stage, or None."""
    entries = stages.get(stage, {}).get(kind, [])
    return next((entry.get("md5") for entry in entries if entry.get("path") == path.as_posix()), None)


def is_locked(stages: Mapping[str, Any], stage: str, root: Path, path: Path) -> bool:
    """Returns whether a file has the hash that dvc.lock records for this output of the stage. If so, DVC's cache has a copy."""
    recorded = locked_md5(stages, stage, "outs", path)
    if recorded is None or not (root / path).is_file():
        return False
    with (root / path).open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == recorded
