"""Finds and removes old files that this project keeps in .cache, for `ddpm gc`.

These are two steps, so that files can be listed without removing them. DVC and MLflow have commands of their own that
clean their stores (docs/storage.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

from ddpm.errors import InputError
from ddpm.files import dataset
from ddpm.files.params import Params
from ddpm.files.paths import CACHE
from ddpm.scores.extractors import EXTRACTORS

# What each folder below .cache holds. The folder of downloads is not listed, since users may put files there.
KINDS = {
    "training": "training states",
    "sampling": "kept images",
    "features": "reference features",
    "previews": "previews",
    **dict.fromkeys(EXTRACTORS, "converted weights"),
}


@dataclass(frozen=True)
class Leftover:
    """Files or folders below .cache that are removed together.

    Args:
        kind: a value of KINDS.
        paths: a file or folder, with its lock and temporary files.
        used: the time of the last use, in seconds since 1970.
        size: bytes of all files together.
    """

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
    """Finds old files in .cache that no run with these parameters would resume from.

    Skips the training states of the schedules in `params`, since a longer training would resume from them, but not those of
    another decay of the learning rate. Skips the kept images of the sweep's points, since sampling resumes from them or
    replaces them. If dataset.json or auto.json cannot be read, skips all training states, since it is unknown which of them
    `params` need. A run that needs one of the other files computes it again.

    Args:
        params: the present parameters.
        root: the top of the project.
        before: the limit of the last use, in seconds since 1970. Files used later are skipped.
    """
    keep = {"sampling": {point.name for point in params.points()}, "training": _trainings(params, root)}
    for folder, kind in KINDS.items():
        kept = keep.get(folder, set())
        if kept is None:
            continue
        entries = sorted((root / CACHE / folder).glob("*"), key=_name)
        for name, paths in groupby(entries, key=_name):
            group = tuple(paths)
            if name in kept:
                descents = (_other_descents(path, params) for path in group if folder == "training")
                group = tuple(chain.from_iterable(descents))
                if not group:
                    continue
            try:
                found = _leftover(kind, group)
            except FileNotFoundError:
                continue  # another process is replacing these files, so they are in use
            if found.used < before:
                yield found


def _trainings(params: Params, root: Path) -> set[str] | None:
    """Returns the folders of training states that `params` need, by name; None if dataset.json or auto.json is unknown."""
    from ddpm.stages.train import training_key

    try:
        data, params = dataset.read_dataset_record(root).sha256, params.resolved(root)
    except InputError:  # missing, damaged, or of version 0.1.0: `prepare` and `probe` may make the same files again
        return None
    return {f"{schedule}-{training_key(params, schedule, data)[:16]}" for schedule in params.schedules}


def _other_descents(folder: Path, params: Params) -> Iterator[Path]:
    """Yields the folders of states from decays of the learning rate other than that of `params`."""
    from ddpm.stages.train import descent_folder

    present = descent_folder(folder, params.training)
    return (path for path in sorted(folder.glob("*")) if path.is_dir() and path != present)


def _leftover(kind: str, paths: tuple[Path, ...]) -> Leftover:
    """Measures last use and size. Reading or writing a file counts as a use; listing a folder does not."""
    inside = [(path, path.stat()) for top in paths for path in (top, *top.rglob("*"))]
    used = max(status.st_mtime if path.is_dir() else max(status.st_atime, status.st_mtime) for path, status in inside)
    return Leftover(kind, paths, used, sum(status.st_size for path, status in inside if path.is_file()))


def _name(path: Path) -> str:
    """Returns the name that a file shares with its lock and temporary files: `a` for a.npz, a.lock and .a.npz.tmp-1-x."""
    return path.name.lstrip(".").partition(".")[0]
