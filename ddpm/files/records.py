"""Reads and writes CSV tables and JSON records. A record holds the hashes of its own content and of the files it describes."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ddpm.errors import InputError
from ddpm.files import atomic

T = TypeVar("T")
REMEDY = "restore it, or make it again (dvc repro)"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    atomic.write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises InputError when the file is missing or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; an earlier stage makes it (dvc repro)") from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}; {REMEDY}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; {REMEDY}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")  # NaN or Infinity, which write_json never writes


# Records: JSON files that hold the hash of their own content, and of the files that they describe.

CHECKSUM = "record_sha256"
LARGE = 1 << 26  # bytes; the hashes of larger files are kept in a file between processes
SETTLED = 2.0  # seconds; a file that changes this long after its last change surely gets another modification time


def record_digest(value: Mapping[str, Any]) -> str:
    """Hashes the content of a record, independent of its layout as text."""
    content = {key: item for key, item in value.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(path: Path, value: Mapping[str, Any], files: Sequence[Path] = ()) -> dict[str, Any]:
    """Writes a JSON record with its checksum. Returns the content as `read_record` would read it.

    Args:
        path: the path of the record.
        value: the content of the record.
        files: the files that the record describes, already written. The entry `files` holds their sha256 by name.
    """
    content = dict(value) | ({"files": {file.name: sha256(file) for file in files}} if files else {})
    write_json(path, {**content, CHECKSUM: record_digest(content)})
    return content


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record, verifies its checksum, and returns the content without the checksum. Raises InputError."""
    return _checked(path, read_json(path))


def read_typed(path: Path, kind: type[T]) -> T:
    """Reads a record into a dataclass. Raises InputError."""
    content = read_record(path)
    try:
        return build(kind, content)
    except ValueError as error:
        raise InputError(f"{path}: {error}; {REMEDY}") from None


def build(kind: type[T], value: Any, place: str = "") -> T:
    """Builds a dataclass from a JSON object, which may hold more entries than the dataclass has fields.

    Args:
        kind: a dataclass. A field named `content` takes the object itself.
        value: the object.
        place: the dotted name of the object in messages; "" for a whole file.

    Raises:
        ValueError: an entry is missing or has another type; the message names the entry.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{place or kind.__name__}: expected an object, found {_shown(value)}")
    hints, given = typing.get_type_hints(kind), dict[str, Any]()
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        where = f"{place}.{field.name}" if place else field.name
        if field.name == "content":
            given[field.name] = value
        elif field.name in value:
            given[field.name] = _typed(hints[field.name], value[field.name], where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: missing")
    return kind(**given)


def _typed(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        hints = [argument for argument in arguments if argument is not types.NoneType]
        fits = (hint for hint in hints if isinstance(value, list) == (typing.get_origin(hint) is list))
        return _typed(next(fits, hints[0]), value, place)
    if origin is list:
        _require(isinstance(value, list), place, "a list", value)
        return [_typed(arguments[0], item, f"{place}.{index}") for index, item in enumerate(value)]
    if origin is dict or origin is Mapping:
        _require(isinstance(value, dict), place, "an object", value)
        return {key: _typed(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        read = getattr(hint, "from_json", functools.partial(build, typing.cast("type[Any]", hint)))
        return read(value, place)
    return _plain(hint, value, place)


def _plain(hint: Any, value: Any, place: str) -> Any:
    names = {str: "a text", bool: "true or false", int: "an integer", float: "a finite number"}
    if hint is float:
        _require(type(value) in (int, float) and abs(value) <= sys.float_info.max, place, names[hint], value)
    elif hint is not Any:
        _require(type(value) is hint, place, names[hint], value)
    return value


def _require(sound: bool, place: str, expected: str, value: Any) -> None:
    if not sound:
        raise ValueError(f"{place}: expected {expected}, found {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _checked(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    content = {key: item for key, item in value.items() if key != CHECKSUM}
    if CHECKSUM not in value:
        raise InputError(f"{path}: holds no checksum, so another version of ddpm made it; make it again (dvc repro)")
    # protects: tests/files/test_bad_input.py::test_what_a_report_reads[scores that were edited]
    if value[CHECKSUM] != record_digest(content):
        raise InputError(
            f"{path}: its content is not what its checksum says, so it was edited or damaged; restore it, or make it again"
            " (dvc repro)"
        )
    return content


def read_described(record: Path, files: Mapping[str, str], path: Path) -> Path:
    """Compares a file with the hash in the record that describes it.

    Args:
        record: the path of the record, for messages.
        files: the hashes that the record holds, by the names of the files.
        path: the file.

    Returns:
        `path`.

    Raises:
        InputError: the file is missing, or its hash differs from the recorded one.
    """
    _compare(record, files, path, sha256)
    return path


def _compare(record: Path, files: Mapping[str, str], path: Path, digest: Callable[[Path], str]) -> None:
    expected = files.get(path.name) if isinstance(files, dict) else None
    if not path.is_file():
        raise InputError(f"{path}: no such file; restore it, or make it again (dvc repro)")
    # protects: tests/files/test_bad_input.py::test_what_a_report_reads[losses of another training]
    if expected is None or digest(path) != expected:
        raise InputError(f"{path}: not the file that {record} describes; restore it, or make it again (dvc repro)")


def _remembered_sha256(path: Path, memory: Path) -> str:
    """Returns the sha256 of a file. The hash of a large file is kept in the JSON file `memory` until the file changes."""
    about = path.stat()
    if about.st_size < LARGE:
        return sha256(path)
    key, version = str(path.resolve()), [about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    known: dict[str, Any] = {}
    with suppress(InputError):  # `memory` only saves time, so that file may be absent or damaged
        known = read_record(memory)
    entry = known.get(key)
    if isinstance(entry, list) and entry[:-1] == version:
        return str(entry[-1])
    digest = sha256(path)
    if time.time() - max(about.st_mtime, about.st_ctime) > SETTLED:
        with suppress(InputError, OSError):  # a full disk, or a read-only checkout
            write_record(memory, {**known, key: [*version, digest]})
    return digest


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows, which have the same keys in the same order. None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic.write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a table. Raises InputError for a file that is no table."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, restkey="", restval=None))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as CSV: {error}; make it again (dvc repro)") from None
    for number, row in enumerate(rows, 2):
        if "" in row or None in row.values():
            raise InputError(
                f"{path}: row {number} has another number of cells than the first row; make it again (dvc repro)"
            )
    return rows


def sha256(path: Path) -> str:
    """Hashes the bytes of a file, or the names and bytes of a folder's files."""
    if path.is_dir():
        total = hashlib.sha256()
        for item in sorted(item for item in path.rglob("*") if item.is_file()):
            total.update(f"{item.relative_to(path).as_posix()}\0{sha256(item)}\n".encode())
        return total.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
