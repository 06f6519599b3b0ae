"""Reads the stages of dvc.yaml from DVC and prints them as one JSON line: `python -m flows.processes.dvc_graph`.

This module runs in a process of its own, so that the flow need not import DVC. The process starts fast if it is forked from the
fork server, which has imported DVC already.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ddpm.provenance import atomic_lock
from ddpm.runtime import display

COMMAND = (sys.executable, "-B", "-m", "flows.processes.dvc_graph")
KEY = "dag"  # in the JSON line


def main() -> int:
    """Prints the stages of the repository in the working folder, or an error message, as a JSON line. Returns the exit code."""
    from dvc.exceptions import DvcException

    try:
        found: dict[str, Any] = _read(Path.cwd())
    except DvcException as error:
        found = {"error": " ".join(str(error).split())}
    print(f"{display.PREFIX}{json.dumps({KEY: found})}", flush=True)
    return int("error" in found)


def _read(root: Path) -> dict[str, Any]:
    """Reads the stages and their dependencies.

    Returns:
        waits_for: for each stage, in the order of dvc.yaml, the stages on which it depends.
        changed: the stages that `dvc repro` would run.
    """
    from dvc.repo import Repo, lock_repo

    atomic_lock.patch()
    with Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
        graph = repo.index.graph
        names = {stage: _address(stage, Path(repo.root_dir)) for stage in repo.index.stages}
        waits_for = {name: sorted(names[before] for before in graph.successors(stage)) for stage, name in names.items()}
        return {"waits_for": waits_for, "changed": [name for stage, name in names.items() if _changed(stage)]}


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


if __name__ == "__main__":
    sys.exit(main())
