"""Replaces dvc.lock atomically: a kill leaves the old file or the new one, never half of it. The installed `dvc` uses this.

DVC itself empties the file and then writes all stages again (https://github.com/treeverse/dvc/issues/10629) with a parser that
keeps comments. That takes half a second for 60 stages and 15 seconds for 300. This module reads the file without
comments, since DVC writes none, and writes only the changed stages; the bytes are the same. Without this module, a kill during
the write leaves a truncated file. The next `ddpm` verb would mend that file, but DVC reads the file before any verb
runs, and may refuse it.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files import atomic, paths
from ddpm.files.yaml_file import parse_yaml, read_yaml
from ddpm.provenance import lock_mending
from ddpm.provenance.lock_mending import HEAD, NAME, STAGE

TEMPLATE = r"ddpm/\w+/\$\{(\w+)\.(\w+)\}"  # matches the path in dvc.yaml of a module that params.yaml selects
Dump = Callable[[Any, Any], Any]


def main() -> int:
    """Runs the DVC command in sys.argv.

    Mends a dvc.lock that another DVC truncated, before DVC reads the file. Checks params.yaml before a pipeline runs, since
    DVC removes the outputs of a stage, whose names come from params.yaml, before the stage's command could find the fault.
    """
    from dvc.cli import main as dvc_main

    root = _root()
    try:
        if (root / paths.CACHE).is_dir():  # a project of this package, where a verb has run
            lock_mending.check(root, partial(print, file=sys.stderr))
        if {"repro", "exp", "queue"} & set(sys.argv[1:]):
            _check_parameters(root)
    except InputError as error:
        print(f"dvc: {error}", file=sys.stderr)
        return 2
    write_at_once()
    return int(dvc_main(sys.argv[1:]))


def _root() -> Path:
    """Returns the top folder of the DVC repository that the command line selects; outside of a repository, the working folder."""
    given = sys.argv[sys.argv.index("--cd") + 1 :][:1] if "--cd" in sys.argv else []
    here = Path.cwd().joinpath(*given)
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def pipeline() -> Path | None:
    """Returns the folder of the pipeline that the command line selects, or None if it is not a pipeline of this package."""
    root = _root()
    return root if _is_own(root) else None


def _is_own(root: Path) -> bool:
    wiring = root / "dvc.yaml"
    return wiring.exists() and "-m ddpm " in wiring.read_text(encoding="utf-8")


def _check_parameters(root: Path) -> None:
    """Raises InputError if params.yaml is invalid, or lacks an entry that dvc.yaml uses."""
    if not _is_own(root) or not (root / "params.yaml").exists():
        return
    text = (root / "dvc.yaml").read_text(encoding="utf-8")
    from ddpm.files.params import Params

    params, given = Params.load(root / "params.yaml"), read_yaml(root / "params.yaml")
    if absent := absent_sections(text, given):
        sections = "; ".join(f"{name}: {json.dumps(value)}" for name, value in params.to_json(*absent).items())
        raise InputError(f"params.yaml: dvc.yaml takes {', '.join(absent)} from it; add `{sections}`")
    for section, key in re.findall(TEMPLATE, text):
        name = getattr(getattr(params, section), key)
        if given[section].get(key) != name:
            raise InputError(
                f"params.yaml: dvc.yaml takes {section}.{key} from it; write `{key}: {name}` below {section}"
            )


def absent_sections(wiring: str, given: Mapping[str, Any]) -> list[str]:
    """Returns the sections of params.yaml that stages read and that an old file lacks.

    Args:
        wiring: the text of dvc.yaml.
        given: the content of params.yaml.
    """
    from ddpm.files.params import Params

    read = (name for stage in parse_yaml(wiring, "dvc.yaml")["stages"].values() for name in stage.get("params", ()))
    sections = dict.fromkeys(name for name in read if isinstance(name, str))  # skips the keys of other files
    return [name for name in sections if name in Params.model_fields and name not in given]


def write_at_once() -> None:
    """Patches DVC in this process to write dvc.lock atomically."""
    import dvc.utils.serialize._yaml as serialize

    original = serialize._modify_data

    @contextmanager
    def modified(path: Any, parser: Callable[[str, Any], Any], dump: Dump, fs: Any = None) -> Iterator[Any]:
        if Path(path).name == NAME:
            with changed(Path(path), serialize.parse_yaml, dump) as data:
                yield data
        else:
            with original(path, parser, dump, fs=fs) as data:
                yield data

    # protects: tests/flows/test_atomic_lock.py::test_the_dvc_of_this_environment_mends_and_writes_the_file_at_once
    serialize._modify_data = modified  # DVC's modify_yaml calls it by this name


@contextmanager
def changed(path: Path, parse: Callable[[str, Path], Any], dump: Dump) -> Iterator[dict[str, Any]]:
    """Yields the content of dvc.lock, then writes the content with the changes of the block."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    data = parse(text, path)
    before = dict(data.get("stages") or {})
    yield data
    written = _spliced(data, before, text, dump) or _dumped(data, dump)
    with atomic.replacing(path) as temporary:
        temporary.write_text(written, encoding="utf-8")


def _spliced(data: dict[str, Any], before: dict[str, Any], text: str, dump: Dump) -> str:
    """Returns `text` with the changed stages replaced, or "" if `text` does not have the form that DVC writes."""
    head, *stages = STAGE.split(text)
    as_dvc_does = head == HEAD and list(data) == ["schema", "stages"] and len(stages) == len(before)
    if not as_dvc_does or not all(own.startswith(f"  {name}:\n") for name, own in zip(before, stages, strict=True)):
        return ""
    own = dict(zip(before, stages, strict=True))
    # DVC replaces the object of a changed stage and never modifies one, so `is` finds the unchanged stages.
    return HEAD + "".join(
        own[name] if stage is before.get(name) else _dumped({"stages": {name: stage}}, dump).removeprefix("stages:\n")
        for name, stage in data["stages"].items()
    )


def _dumped(data: dict[str, Any], dump: Dump) -> str:
    text = io.StringIO()
    dump(data, text)
    return text.getvalue()
