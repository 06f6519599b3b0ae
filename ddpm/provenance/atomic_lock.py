"""Replaces dvc.lock atomically: a kill leaves the old file or the new one, never half of it.

The installed `dvc` command runs this module. DVC itself empties dvc.lock and then writes all stages again
(https://github.com/treeverse/dvc/issues/10629), so a kill during the write leaves a truncated file. The next ddpm command
would mend that file, but DVC reads the file before it runs any ddpm command, and may refuse the file.

This module is also faster. DVC writes with a parser that keeps comments, which takes 0.5 s for 60 stages and 15 s for 300 stages.
To run one stage, DVC parses and checks all stages three times. This module parses only the stages that DVC looks at. It ignores
comments, since DVC writes none. It formats only the changed stages and copies the text of all other stages. The written bytes are
the same as DVC's.
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
from ddpm.provenance import dvc_lock, lock_mending
from ddpm.provenance.dvc_lock import HEAD, NAME, Stages

TEMPLATE = r"ddpm/\w+/\$\{(\w+)\.(\w+)\}"  # matches the path in dvc.yaml of a module that params.yaml selects
Dump = Callable[[Any, Any], Any]


def main() -> int:
    """Runs the DVC command in sys.argv.

    Mends a dvc.lock that an unpatched DVC truncated, before DVC reads it. Checks params.yaml before a pipeline runs: without
    this check, DVC would remove a stage's outputs before the stage itself could report a fault in params.yaml.
    """
    from dvc.cli import main as dvc_main

    root = _root()
    try:
        if (root / paths.CACHE).is_dir():  # a project of this package in which a command has run
            lock_mending.check(root, partial(print, file=sys.stderr))
        if {"repro", "exp", "queue"} & set(sys.argv[1:]):
            _check_parameters(root)
    except InputError as error:
        print(f"dvc: {error}", file=sys.stderr)
        return 2
    patch()
    return int(dvc_main(sys.argv[1:]))


def _root() -> Path:
    """Returns the top folder of the DVC repository that the command line selects, or the working folder if there is none."""
    given = sys.argv[sys.argv.index("--cd") + 1 :][:1] if "--cd" in sys.argv else []
    here = Path.cwd().joinpath(*given)
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def pipeline() -> Path | None:
    """Returns the folder of the pipeline that the command line selects, or None if the pipeline is not of this package."""
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
        raise InputError(f"params.yaml lacks the sections {', '.join(absent)}, which dvc.yaml needs; add `{sections}`")
    for section, key in re.findall(TEMPLATE, text):
        name = getattr(getattr(params, section), key)
        if given[section].get(key) != name:
            raise InputError(
                f"params.yaml lacks {section}.{key}, which dvc.yaml needs; write `{key}: {name}` below {section}"
            )


def absent_sections(wiring: str, given: Mapping[str, Any]) -> list[str]:
    """Returns the sections that the stages in dvc.yaml read and that params.yaml lacks.

    Args:
        wiring: the text of dvc.yaml.
        given: the content of params.yaml.
    """
    from ddpm.files.params import Params

    read = (name for stage in parse_yaml(wiring, "dvc.yaml")["stages"].values() for name in stage.get("params", ()))
    sections = dict.fromkeys(name for name in read if isinstance(name, str))  # skips the keys of other files
    return [name for name in sections if name in Params.model_fields and name not in given]


def patch() -> None:
    """Patches DVC in this process to read the stages of dvc.lock one by one, and to write the file atomically."""
    import dvc.utils.serialize._yaml as serialize
    from dvc.dvcfile import Lockfile
    from dvc.exceptions import DvcException

    original, load = serialize._modify_data, Lockfile._load_yaml
    parsed: dict[str, Any] = {}  # stages by their text, since `dvc repro` loads the file twice

    @contextmanager
    def modified(path: Any, parser: Callable[[str, Any], Any], dump: Dump, fs: Any = None) -> Iterator[Any]:
        if Path(path).name == NAME:
            with changed(Path(path), serialize.parse_yaml, dump) as data:
                yield data
        else:
            with original(path, parser, dump, fs=fs) as data:
                yield data

    def loaded(lockfile: Any, round_trip: bool = False) -> tuple[Any, str]:
        with lockfile.repo.fs.open(lockfile.path, "rb") as file:
            text = file.read().decode("utf-8", "replace")
        texts = None if round_trip or "\ufffd" in text else dvc_lock.split(text)
        if texts is None:
            return load(lockfile, round_trip=round_trip)

        def parse(stage: str) -> Any:
            if stage not in parsed:
                try:
                    found = serialize.parse_yaml(stage, lockfile.path)
                    lockfile.validate({"schema": "2.0", "stages": found})
                except DvcException:  # `load` raises the same error with its place in the whole file, for DVC to show
                    return load(lockfile)[0]["stages"]
                parsed[stage] = found
            return parsed[stage]

        return {"schema": "2.0", "stages": Stages(texts, parse)}, text

    # protects: tests/flows/test_atomic_lock.py::test_the_dvc_of_this_environment_mends_and_writes_the_file_at_once
    serialize._modify_data = modified  # DVC's modify_yaml looks the function up by this name
    Lockfile._load_yaml = loaded


@contextmanager
def changed(path: Path, parse: Callable[[str, Path], Any], dump: Dump) -> Iterator[dict[str, Any]]:
    """Yields the content of dvc.lock. After the `with` block, writes the content as the block changed it, atomically."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    texts = dvc_lock.split(text)
    stages = None if texts is None else Stages(texts, lambda stage: parse(stage, path))
    data = parse(text, path) if stages is None else {"schema": "2.0", "stages": stages}
    yield data
    with atomic.replacing(path) as temporary:
        temporary.write_text(_text(data, dump), encoding="utf-8")


def _text(data: dict[str, Any], dump: Dump) -> str:
    """Returns the text of dvc.lock. The stages that DVC did not replace keep their texts."""
    stages = data.get("stages")
    if not isinstance(stages, Stages):
        return _dumped(data, dump)
    if list(data) != ["schema", "stages"]:
        return _dumped({**data, "stages": dict(stages)}, dump)
    return HEAD + "".join(
        stages.texts.get(name) or _dumped({"stages": {name: stages[name]}}, dump).removeprefix("stages:\n")
        for name in stages
    )


def _dumped(data: dict[str, Any], dump: Dump) -> str:
    text = io.StringIO()
    dump(data, text)
    return text.getvalue()
