"""Reads the stages of dvc.yaml from DVC: their dependencies, and which stages are unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.errors import InputError


@dataclass(frozen=True)
class Dag:
    """The stages of dvc.yaml and their dependencies.

    Args:
        waits_for: for each stage, the stages on which it depends, by name, in the order of dvc.yaml.
        unchanged: the stages that need not run, since neither they nor the stages before them have changed.
    """

    waits_for: dict[str, tuple[str, ...]]
    unchanged: frozenset[str]


def read(root: Path) -> Dag:
    """Reads all stages at once: 30 stages in about a second. 30 calls of `dvc repro --single-item` would take 30 seconds.

    Raises InputError if `root` is no DVC repository, or if dvc.yaml or params.yaml is invalid.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    try:
        with Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
            graph = repo.index.graph
            names = {stage: _address(stage, Path(repo.root_dir)) for stage in repo.index.stages}
            waits_for = {
                name: tuple(sorted(names[before] for before in graph.successors(stage)))
                for stage, name in names.items()
            }
            changed = {name for stage, name in names.items() if _changed(stage)}
    except DvcException as error:
        raise InputError(f"{root / 'dvc.yaml'}: {' '.join(str(error).split())}") from None
    if not waits_for:
        raise InputError(f"{root / 'dvc.yaml'}: no stages; run this at the top of a checkout")
    return Dag(waits_for, frozenset(name for name in waits_for if not _is_affected(name, changed, waits_for)))


def _address(stage: Any, root: Path) -> str:
    """Returns the name that `dvc repro` takes at the root: the name of a stage, or the path of a .dvc file."""
    path = Path(stage.path).relative_to(root).as_posix()
    name = getattr(stage, "name", None)
    return path if name is None else name if path == "dvc.yaml" else f"{path}:{name}"


def _changed(stage: Any) -> bool:
    """Returns whether `dvc repro` would run this stage. A stage that another process is writing counts as changed."""
    from dvc.lock import LockError

    try:
        return bool(stage.changed())
    except LockError:
        return True


def _is_affected(name: str, changed: set[str], waits_for: dict[str, tuple[str, ...]]) -> bool:
    """Returns whether `changed` contains the stage `name` or any stage on which it depends."""
    seen, queue = set(), [name]
    while queue:
        stage = queue.pop()
        if stage in changed:
            return True
        if stage not in seen:
            seen.add(stage)
            queue.extend(waits_for[stage])
    return False
