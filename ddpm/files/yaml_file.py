"""Reads YAML files, except deeply nested ones, and changes single values without touching the rest of the text."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddpm.errors import InputError

DEEPEST = 100  # levels of nesting; the C parser crashes at about ten thousand


def read_yaml(path: Path) -> Any:
    """Reads a YAML file into plain values. Raises InputError."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        above = next((folder for folder in path.absolute().parent.parents if (folder / path.name).is_file()), None)
        advice = (
            f"run this in {above}"
            if above
            else "run this in a checkout or a project (`ddpm init` makes a project), or copy a recipe"
        )
        raise InputError(f"{path}: no such file; {advice}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: not UTF-8 in line {line}; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: not readable: {error.strerror}; put a readable file there") from None


def parse_yaml(text: str, where: str) -> Any:
    """Parses a YAML text into plain values. where: the name of the text in messages. Raises InputError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    parser, depth = YAML(typ="safe"), 0
    try:
        for event in parser.parse(text):
            depth += type(event).__name__.endswith("StartEvent") - type(event).__name__.endswith("EndEvent")
            # protects: tests/files/test_bad_input.py::test_a_text[101 brackets]
            if depth > DEEPEST:
                raise InputError(f"{where}: nested more than {DEEPEST} levels deep; reduce the nesting")
        return parser.load(text)
    except InputError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise InputError(f"{where}: not readable as YAML: {error.problem}{place}; mend it there") from None
    except Exception as error:  # noqa: BLE001 - a tag such as !!int passes on the errors of int()
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: not readable as YAML: {why}; mend it") from None


def rewritten(text: str, change: Callable[[Any], None]) -> str:
    """Applies `change` to the document of a YAML text. Returns the new text, which keeps comments, order and other values."""
    from ruamel.yaml import YAML
    from ruamel.yaml.nodes import ScalarNode
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """Writes None as `null`; ruamel's own class writes an empty value."""

        def represent_none(self, data: None) -> ScalarNode:
            return self.represent_scalar("tag:yaml.org,2002:null", "null")

    Representer.add_representer(type(None), Representer.represent_none)
    yaml = YAML()
    yaml.Representer = Representer
    yaml.preserve_quotes = True
    yaml.width = 1_000_000  # so that no line is folded
    document = yaml.load(text)
    change(document)
    written = io.StringIO()
    yaml.dump(document, written)
    return written.getvalue()


def flow_row(row: Mapping[str, Any]) -> Any:
    """Returns a mapping that is written on one line: {key: value, ...}."""
    from ruamel.yaml.comments import CommentedMap

    mapping = CommentedMap(row)
    mapping.fa.set_flow_style()
    return mapping
