"""Changes to a parameter file that leave its comments, its order and its other values as they are."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter


class _Representer(RoundTripRepresenter):
    """Writes `null` as it was read; ruamel's own writes nothing."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def rewritten(text: str, change: Callable[[Any], None]) -> str:
    """YAML text after `change` has been at its document."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 1_000_000  # never folds a line
    document = yaml.load(text)
    change(document)
    written = io.StringIO()
    yaml.dump(document, written)
    return written.getvalue()


def flow_row(row: Mapping[str, Any]) -> CommentedMap:
    """A row of a table, written on one line: {key: value, ...}."""
    mapping = CommentedMap(row)
    mapping.fa.set_flow_style()
    return mapping
