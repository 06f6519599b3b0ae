"""Builds dataclasses from JSON values, and refuses a value of another type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def build(kind: type[T], value: Any, place: str = "") -> T:
    """Builds a dataclass from a JSON object, which may hold more entries than the dataclass has fields.

    Args:
        kind: a dataclass. A field named `content` takes the object itself.
        value: the object.
        place: the dotted name of the object, for messages; "" for a whole file.

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
            given[field.name] = _checked(hints[field.name], value[field.name], where)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: missing")
    return kind(**given)


def _checked(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not types.NoneType)
        return _checked(hint, value, place)
    if hasattr(hint, "from_json"):
        return hint.from_json(value, place)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, place)
    if origin is list:
        _require(isinstance(value, list), place, "a list", value)
        return [_checked(arguments[0], item, f"{place}.{index}") for index, item in enumerate(value)]
    if origin in (dict, Mapping):
        _require(isinstance(value, dict), place, "an object", value)
        return {key: _checked(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    wanted = (int, float) if hint is float else (hint,)
    _require(type(value) in wanted, place, {str: "a text", bool: "true or false", int: "an integer"}.get(hint, "a number"), value)
    return value


def _require(sound: bool, place: str, expected: str, value: Any) -> None:
    if not sound:
        raise ValueError(f"{place}: expected {expected}, found {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
