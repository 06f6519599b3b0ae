"""Fails a stage whose parameters or code change while it runs. DVC hashes both only after the stage has ended."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files import records
from ddpm.files.yaml_file import read_yaml
from ddpm.provenance import code, project


@contextmanager
def unchanged(stage: str, root: Path = Path()) -> Iterator[None]:
    """Raises InputError if a parameter or module on which the stage depends changed while the `with` block ran.

    The stage then fails, so DVC does not record in dvc.lock that the edited version made these outputs. Checks nothing outside
    DVC, where DVC_STAGE is not set.
    """
    if "DVC_STAGE" not in os.environ:
        yield
        return
    project.require_current(root)
    before = _read(stage, root)
    imported = {str(path): digest for path, digest in code.AT_IMPORT.items()}
    before |= {name: imported[name] for name, digest in before.items() if digest is not None and name in imported}
    yield
    project.require_current(root, code.AT_IMPORT, code.hashes())
    changed = changes(before, _read(stage, root))
    # protects: tests/provenance/test_inputs.py::test_code_that_changes_while_a_stage_runs_is_noticed[report.py]
    if changed:
        raise InputError(
            f"{stage}: {changed} changed while it ran, so its outputs belong to neither version; run again"
        )


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns the dotted names of the values that differ, such as "training.steps, seed", or ""."""
    old, new = leaves(before), leaves(after)
    return ", ".join(name for name in {**old, **new} if old.get(name) != new.get(name))


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = leaves(value, f"{prefix}{name}." if name else prefix) if isinstance(value, dict) else {}
        found |= inner or {f"{prefix}{name}": value}
    return found


def _read(stage: str, root: Path) -> dict[str, Any]:
    """Reads the stage's inputs in dvc.yaml: parameter values by key, and the sha256 of code files by path.

    A dependency is code if it is a file whose path has no ${...}, or a module that params.yaml selects, such as
    ddpm/sources/${data.source}.py. Other dependencies are data.
    """
    name, _, values = stage.partition("@")
    about = read_yaml(root / "dvc.yaml")["stages"].get(name, {}) if (root / "dvc.yaml").exists() else {}
    item = dict(zip(about.get("matrix", ()), values.split("-"), strict=False))
    params, found = read_yaml(root / "params.yaml"), dict[str, Any]()
    for key in about.get("params", ()):
        if isinstance(key, dict):
            found |= _read_other_files(key, root)
        else:
            key = re.sub(r"\$\{item\.(\w+)\}", lambda match: item[match[1]], key)  # noqa: PLW2901
            found[key] = _value(params, key)
    modules = [name for name in about.get("deps", ()) if "${" not in name or name.startswith(f"{code.PACKAGE}/")]
    named = [root / re.sub(r"\$\{([\w.]+)\}", lambda key: str(_value(params, key[1])), name) for name in modules]
    sources = [path for path in named if not path.is_dir()]
    return found | {str(path.relative_to(root)): records.sha256(path) if path.exists() else None for path in sources}


def _read_other_files(keys: Mapping[str, Sequence[str]], root: Path) -> dict[str, Any]:
    """Reads parameters that dvc.yaml takes from auto.json and, in a project, from ddpm.json. keys: the keys, by file name."""
    files = {name: records.read_json(root / name) if (root / name).exists() else {} for name in keys}
    return {f"{key} of {name}": _value(files[name], key) for name in keys for key in keys[name]}


def _value(params: Any, key: str) -> Any:
    """Returns the value at a dotted key, or None."""
    for part in key.split("."):
        params = params.get(part) if isinstance(params, dict) else None
    return params
