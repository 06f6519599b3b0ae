"""Reads from DVC how the stages of dvc.yaml depend on each other, and which stages are unchanged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.runtime import display
from flows.processes import children, dvc_graph


@dataclass(frozen=True)
class Dag:
    """The stages of dvc.yaml and their dependencies.

    Args:
        waits_for: for each stage, in the order of dvc.yaml, the names of the stages on which it depends.
        unchanged: the stages that need not run, since neither they nor the stages before them have changed.
    """

    waits_for: dict[str, tuple[str, ...]]
    unchanged: frozenset[str]


def read(root: Path) -> Dag:
    """Reads all stages in one call.

    This takes about a second for 30 stages. 30 calls of `dvc repro --single-item` would take 30 seconds.

    Raises:
        InputError: `root` is not a DVC repository, or dvc.yaml or params.yaml is invalid.
        children.FlowStopped: the flow is ending.
    """
    found: dict[str, Any] = {}
    lines: list[str] = []

    def on_line(line: str) -> None:
        if line.startswith(display.PREFIX):
            found.update(json.loads(line.removeprefix(display.PREFIX))[dvc_graph.KEY])
        else:
            lines.append(line)

    code = children.run(dvc_graph.COMMAND, root, on_line)
    if "waits_for" not in found:
        reason = found.get("error") or next(
            filter(None, reversed(lines)), f"DVC could not read this file (exit code {code})"
        )
        raise InputError(f"{root / 'dvc.yaml'}: {reason}")
    waits_for, changed = {name: tuple(before) for name, before in found["waits_for"].items()}, set(found["changed"])
    if not waits_for:
        raise InputError(f"{root / 'dvc.yaml'}: no stages; run this at the top of a checkout")
    return Dag(waits_for, frozenset(name for name in waits_for if not _is_affected(name, changed, waits_for)))


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
