"""dvc.lock, changed as DVC changes it, but at once: who is killed meanwhile leaves the old one or the new one, never half of it.

DVC empties the file and then writes all stages anew, as a text with comments: half a second for 60 stages, a quarter of a
minute for 300. There are no comments in it; so it is read without them, only the stages that changed are written, and the
others keep their text. The bytes are the same.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm.stages import store

NAME = "dvc.lock"
ADVICE = (
    "may be cut off, by a `dvc repro` that was killed while it wrote it: `git checkout dvc.lock` (or delete it), and run"
    " this again; what was made since comes back from DVC's cache"
)
_DAMAGED = re.compile(r"dvc\.lock'?,? (validation failed|is not valid|YAML file structure)")
_HEAD = "schema: '2.0'\nstages:\n"
_STAGE = re.compile(r"^(?=  \S)", re.MULTILINE)  # where the text of a stage begins

Dump = Callable[[Any, Any], Any]


def is_damaged(error: str) -> bool:
    """Whether this message of DVC's is about a dvc.lock that it cannot read."""
    return bool(_DAMAGED.search(error))


def write_at_once() -> None:
    """From here on this process's DVC does."""
    import dvc.utils.serialize._yaml as serialize

    of_dvc = serialize._modify_data

    @contextmanager
    def modified(path: Any, parser: Callable[[str, Any], Any], dump: Dump, fs: Any = None) -> Iterator[Any]:
        if Path(path).name == NAME:
            with changed(Path(path), serialize.parse_yaml, dump) as data:
                yield data
        else:
            with of_dvc(path, parser, dump, fs=fs) as data:
                yield data

    serialize._modify_data = modified  # modify_yaml looks it up there


@contextmanager
def changed(path: Path, parse: Callable[[str, Path], Any], dump: Dump) -> Iterator[dict[str, Any]]:
    """What the file holds, which the block changes; then the file holds that."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    data = parse(text, path)
    before = dict(data.get("stages") or {})
    yield data
    written = _spliced(data, before, text, dump) or _dumped(data, dump)
    with store.replacing(path) as temporary:
        temporary.write_text(written, encoding="utf-8")


def _spliced(data: dict[str, Any], before: dict[str, Any], text: str, dump: Dump) -> str:
    """`text` with the stages that are no longer what they were before written anew; "" where it is not as DVC writes it."""
    head, *stages = _STAGE.split(text)
    as_dvc_does = head == _HEAD and list(data) == ["schema", "stages"] and len(stages) == len(before)
    if not as_dvc_does or not all(own.startswith(f"  {name}:\n") for name, own in zip(before, stages, strict=True)):
        return ""
    own = dict(zip(before, stages, strict=True))
    # DVC puts a new object in the place of a stage's old one, and changes none.
    return _HEAD + "".join(
        own[name] if stage is before.get(name) else _dumped({"stages": {name: stage}}, dump).removeprefix("stages:\n")
        for name, stage in data["stages"].items()
    )


def _dumped(data: dict[str, Any], dump: Dump) -> str:
    text = io.StringIO()
    dump(data, text)
    return text.getvalue()
