"""Reads model.json and checks the weights that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files import paths, records

MODEL_FORMAT = 2  # of model.json; 1 had no checksum


def read_model_record(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's model.json. One of format 1, which had no checksum, is read as it is. Raises InputError."""
    path = folder / "model.json"
    about = records.read_json(path)
    if about.get("format") != 1 or records.CHECKSUM in about:
        about = records._checked(path, about)
        if about.get("format") != MODEL_FORMAT:
            raise InputError(
                f"{folder}: checkpoint format {about.get('format')} is not {MODEL_FORMAT}; it was made by another version"
            )
    if not isinstance(about.get("weights_sha256"), str):
        raise InputError(f"{path}: holds no hash of the weights; train again or restore it")
    return about


def check_weights(folder: Path, about: Mapping[str, Any]) -> Path:
    """Compares model.safetensors with model.json. Returns its path. Raises InputError."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise InputError(f"{weights}: no such file; train again or restore it")
    if records.sha256(weights) != about["weights_sha256"]:
        raise InputError(
            f"{folder}: not a usable checkpoint: the checksum of model.safetensors is not the one in model.json; train"
            " again or restore it"
        )
    return weights


def read_trained(root: Path, schedule: str) -> dict[str, Any]:
    """Reads models/SCHEDULE/model.json. Raises InputError, also for another schedule's model."""
    folder = root / paths.model_dir(schedule)
    about = read_model_record(folder)
    name = about["schedule"].get("name") if isinstance(about.get("schedule"), dict) else None
    if name != schedule:
        raise InputError(f"{folder}: holds the model of schedule '{name}'; train again or restore it (dvc repro)")
    return about
