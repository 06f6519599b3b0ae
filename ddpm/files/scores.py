"""Reads and checks scores: metrics/POINT.json, the influence of each image, and the report's answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import arrays, atomic, paths, records
from ddpm.files.params import Point

# The entries of metrics/POINT.json.
COUNTS = ("evaluations", "images", "reference_images", "layer")
SCORES: tuple[str, ...] = (
    "evaluations",
    "fid",
    "fid_low",
    "fid_high",
    "confidence",
    "kid",
    "kid_low",
    "kid_high",
    "kid_std",
    "precision",
    "recall",
    *COUNTS[1:],
)
OPTIONAL = ("fid_infinity", "inception_score", "copying", "copying_z")  # not every protocol allows them
PROTOCOL = ("reference", "extractor_sha256", "layer", "images", "reference_images")
HASHES = (*PROTOCOL[:2], "samples", "model")
ANY = (-1e9, 1e9)  # far from where squares overflow
RANGES = {
    **dict.fromkeys(COUNTS, (1, 2**31 - 1)),
    **dict.fromkeys(("fid", "fid_low", "fid_high", "kid_std"), (0, ANY[1])),
    **dict.fromkeys(("precision", "recall"), (0, 1)),
    "confidence": (0.01, 0.9999),
}


def read_scores(root: Path, point: Point) -> dict[str, Any]:
    """Reads metrics/POINT.json. Raises InputError for the scores of another point, a missing entry, or an impossible value."""
    path = root / paths.metrics_file(point)
    scores = records.read_record(path)
    if scores.get("point") != point.name:
        raise InputError(f"{path}: holds the scores of {scores.get('point')}; run `ddpm evaluate {point.name}` again")
    needed = dict.fromkeys((*SCORES, *HASHES))
    if absent := [key for key in needed if key not in scores]:
        raise InputError(f"{path}: without {', '.join(absent)}; run `ddpm evaluate {point.name}` again")
    if wrong := unsound(scores, [*needed, *(key for key in OPTIONAL if key in scores)]):
        raise InputError(f"{path}: no sound value of {', '.join(wrong)}; run `ddpm evaluate {point.name}` again")
    return scores


def unsound(scores: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """Returns those of the keys whose values no evaluation gives: of another type, out of range, or outside their interval."""
    wrong = [key for key in keys if not _in_range(key, scores.get(key))]
    for key in ("fid", "kid"):
        bounds = [scores[name] for name in (f"{key}_low", key, f"{key}_high") if name in keys and name not in wrong]
        if bounds != sorted(bounds):
            wrong.append(key)
    return wrong


def _in_range(key: str, value: Any) -> bool:
    if key in HASHES:
        return isinstance(value, str)
    low, high = RANGES.get(key, ANY)
    return type(value) in ((int,) if key in COUNTS else (int, float)) and low <= value <= high


def read_report(root: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Reads the report, once all its files are those that front.json describes. Raises InputError.

    Returns:
        What best.json holds, and the rows of points.csv if front.json names it.
    """
    folder = root / paths.report_dir()
    record = folder / "front.json"
    front = records.read_record(record)
    for name in front["files"]:
        records.read_described(record, front["files"], folder / name)
    rows = records.read_csv(folder / "points.csv") if "points.csv" in front["files"] else []
    return records.read_record(folder / "best.json"), rows


# Influence values.


def read_point_influence(root: Path, point: Point, scores: Mapping[str, Any]) -> NDArray[np.float32]:
    """Reads the influence values of a point, those that its scores were recorded with. Raises InputError."""
    path = root / paths.influence_file(point)
    files = scores.get("files")
    return read_influence(path, str(files.get(path.name)) if isinstance(files, dict) else "")


def write_influence(path: Path, influence: NDArray[np.floating]) -> None:
    """float32 [N], in the order of the images."""
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        arrays._write_array(file, influence.astype(np.float32))


def read_influence(path: Path, digest: str) -> NDArray[np.float32]:
    """Reads influence values whose file has that sha256. Raises InputError."""
    try:
        if path.is_file() and records.sha256(path) != digest:
            raise ValueError("its bytes are not those that were recorded with the scores")
        influence: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(influence, np.ndarray) or influence.dtype != np.float32 or influence.ndim != 1:
            raise ValueError("expected float32 values, one per image")
        influence = np.array(influence)
        if not np.isfinite(influence).all():
            raise ValueError("not all values are finite")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `ddpm evaluate` writes it beside the scores") from None
    except Exception as error:  # noqa: BLE001 - numpy raises half a dozen types on a damaged file
        raise InputError(
            f"{path}: not the influence values of a point: {arrays._unreadable(error)}; evaluate it again"
        ) from None
    return influence
