"""Finds and removes old files in .cache, for `ddpm gc`.

Finding and removing are separate functions, so that `ddpm gc` can first list the files. The stores of DVC and MLflow have
cleaning commands of their own (docs/storage.md).
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

# The folders below .cache, and what they hold. The folder of downloads is not listed, since users may put files there.
KINDS = {
    "training": "training states",
    "sampling": "kept images",
    "features": "reference features",
    "previews": "previews",
    "averages": "averaged weights",
    **dict.fromkeys(EXTRACTORS, "converted weights"),
}


@dataclass(frozen=True)
class Leftover:
    """An entry of .cache that no run needs: files and folders that are removed together.

    Args:
        kind: what the files hold, a value of KINDS such as "training states".
        paths: a file or folder, and the lock file and temporary files of the same name.
        used: the time of the last use, in seconds since 1970.
        size: the size of all files together, in bytes.
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
    """Finds old files in .cache from which no run with these parameters would resume.

    The following files are never found, whatever their age:

    - The training states of the schedules in `params`: a longer training would resume from them. But states that were saved
      with other settings of training.decay count as leftovers, because no training would resume from them.
    - The kept images of the sweep's points: sampling resumes from them or replaces them.
    - All training states if dataset.json or auto.json cannot be read: without these files it is unknown which states `params`
      need.

    Removing these files loses no result. A run with other parameters may have to compute their content again.

    Args:
        params: the present parameters.
        root: the top of the project.
        before: a time in seconds since 1970. Only files that were last used before it are found.
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
    """Returns the names of the folders of training states that `params` need; None if dataset.json or auto.json is unreadable."""
    from ddpm.stages.train import training_key

    try:
        data, params = dataset.read_dataset_record(root).sha256, params.resolved(root)
    except InputError:  # missing, damaged, or of version 0.1.0; `prepare` and `probe` may make the same files again
        return None
    return {f"{schedule}-{training_key(params, schedule, data)[:16]}" for schedule in params.schedules}


def _other_descents(folder: Path, params: Params) -> Iterator[Path]:
    """Yields the folders of training states whose decay of the learning rate differs from the decay in `params`."""
    from ddpm.stages.train import SNAPSHOTS, descent_folder

    kept = (descent_folder(folder, params.training), folder / SNAPSHOTS)
    return (path for path in sorted(folder.glob("*")) if path.is_dir() and path not in kept)


def _leftover(kind: str, paths: tuple[Path, ...]) -> Leftover:
    """Measures the last use and the size of files. Reading or writing a file counts as a use, but listing a folder does not."""
    inside = [(path, path.stat()) for top in paths for path in (top, *top.rglob("*"))]
    used = max(status.st_mtime if path.is_dir() else max(status.st_atime, status.st_mtime) for path, status in inside)
    return Leftover(kind, paths, used, sum(status.st_size for path, status in inside if path.is_file()))


def _name(path: Path) -> str:
    """Returns the name that a file shares with its lock file and temporary files: `a` for a.npz, a.lock and .a.npz.tmp-1-x."""
    return path.name.lstrip(".").partition(".")[0]
