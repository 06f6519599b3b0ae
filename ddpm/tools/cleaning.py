"""`ddpm gc`: removes old files that this project keeps in .cache, outside DVC and MLflow.

Finding and removing are two steps, so that a look changes nothing. The docs name the commands of DVC and MLflow that clean their
stores (docs/storage.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ddpm.errors import InputError
from ddpm.files import dataset
from ddpm.files.params import Params
from ddpm.files.paths import CACHE
from ddpm.scores.extractors import EXTRACTORS

# Folders below .cache. Downloads are missing: a user may have put them there.
KINDS = {
    "training": "training states",
    "sampling": "kept images",
    "features": "reference features",
    "previews": "previews",
    **dict.fromkeys(EXTRACTORS, "converted weights"),
}


@dataclass(frozen=True)
class Leftover:
    """Files or folders of one name below .cache. kind: a value of KINDS. used: seconds since 1970. size: bytes."""

    kind: str
    paths: tuple[Path, ...]
    used: float
    size: int

    @property
    def name(self) -> str:
        return ", ".join(map(str, self.paths))

    def remove(self) -> None:
        for path in self.paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def leftovers(params: Params, root: Path, before: float) -> Iterator[Leftover]:
    """Finds what was last used before that moment (seconds since 1970) and what no run under `params` would go on from.

    Training states of any length are kept for each schedule of `params`: more `training.steps` go on from them. Kept images are
    kept for each point of the sweep: sampling the point uses or replaces them. Without a readable dataset.json the trainings
    that `params` would continue are unknown, so all states are kept. Features, weights and previews are made again when they are
    missing.
    """
    keep = {"sampling": {point.name for point in params.points()}, "training": _trainings(params, root)}
    for folder, kind in KINDS.items():
        kept = keep.get(folder, set())
        if kept is None:
            continue
        entries = sorted((root / CACHE / folder).glob("*"), key=_name)
        for name, paths in groupby(entries, key=_name):
            if name in kept:
                continue
            try:
                found = _leftover(kind, tuple(paths))
            except FileNotFoundError:
                continue  # another process is replacing these files, so they are in use
            if found.used < before:
                yield found


def _trainings(params: Params, root: Path) -> set[str] | None:
    """The folders of states from which a schedule would go on, or None where the dataset is unknown."""
    from ddpm.stages.train import training_key

    try:
        data = dataset.read_dataset_record(root).sha256
    except InputError:  # missing, damaged, or of version 0.1.0: `prepare` may make it again, and states go on
        return None
    return {f"{schedule}-{training_key(params, schedule, data)[:16]}" for schedule in params.schedules}


def _leftover(kind: str, paths: tuple[Path, ...]) -> Leftover:
    """Counts a file as used when it was read or written. Looking into a folder is no use of it."""
    inside = [(path, path.stat()) for top in paths for path in (top, *top.rglob("*"))]
    used = max(about.st_mtime if path.is_dir() else max(about.st_atime, about.st_mtime) for path, about in inside)
    return Leftover(kind, paths, used, sum(about.st_size for path, about in inside if path.is_file()))


def _name(path: Path) -> str:
    """Returns the name that groups a file with its lock and temporary files: `a` for a.npz, a.lock and .a.npz.tmp-1-x."""
    return path.name.lstrip(".").partition(".")[0]
