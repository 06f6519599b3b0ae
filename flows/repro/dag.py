"""The pipeline as dvc.yaml has it: which stages there are, what each waits for, which have nothing to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.errors import InputError


@dataclass(frozen=True)
class Dag:
    """waits_for: each stage's address -> the addresses it depends on, in dvc.yaml's order.

    unchanged: the stages that `dvc repro` would leave alone, as nothing before them changes either.
    """

    waits_for: dict[str, tuple[str, ...]]
    unchanged: frozenset[str]


def read(root: Path) -> Dag:
    """Asks DVC. One look in one process: 30 stages take about a second, 30 `dvc repro --single-item` take 30.

    Raises InputError when there is no DVC repository, or DVC can't make sense of dvc.yaml and params.yaml.
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
    return Dag(waits_for, frozenset(name for name in waits_for if not _reaches(name, changed, waits_for)))


def _address(stage: Any, root: Path) -> str:
    """The name that `dvc repro` takes at the root: of a stage in dvc.yaml, or the path of a .dvc file."""
    path = Path(stage.path).relative_to(root).as_posix()
    name = getattr(stage, "name", None)
    return path if name is None else name if path == "dvc.yaml" else f"{path}:{name}"


def _changed(stage: Any) -> bool:
    """What `dvc repro` asks before it runs a stage. A stage that another process is writing counts as changed."""
    from dvc.lock import LockError

    try:
        return bool(stage.changed())
    except LockError:
        return True


def _reaches(name: str, changed: set[str], waits_for: dict[str, tuple[str, ...]]) -> bool:
    """Whether `name` or anything before it is among `changed`."""
    seen, queue = set(), [name]
    while queue:
        stage = queue.pop()
        if stage in changed:
            return True
        if stage not in seen:
            seen.add(stage)
            queue.extend(waits_for[stage])
    return False
