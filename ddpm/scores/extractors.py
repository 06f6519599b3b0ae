"""EXTRACTORS: the models that turn images into features, by the value of `evaluation.extractor`.

Each extractor is a module of this folder, with three or four lines that describe the extractor and a function that loads it:

    TITLE = "Inception"
    LAYERS = [64, 192, 768, 2048]
    DEFAULT = 2048
    JUDGES = {"sfid": 2023}

    def load(layer: int, cache: Path, device: torch.device | str = "cpu") -> Features: ...

- TITLE is the usual name.
- LAYERS has the values of evaluation.layer.
- DEFAULT is the layer if params.yaml names none: the layer of published scores.
- JUDGES is optional. It has values of evaluation.judges, each with the layer that it uses.

Each value is JSON in one line, since it is read from the module's source. Importing the module would import torch, but processes
without torch check params.yaml too. To add an extractor, add its file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ddpm.errors import InputError

FOLDER = Path(__file__).parent
_LINES = re.compile(r"^(TITLE|LAYERS|DEFAULT|JUDGES)\b[^=\n]*=(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Extractor:
    """An extractor, as the literals in its module describe it.

    Args:
        name: the value of evaluation.extractor.
        title: the usual name.
        layers: the allowed values of evaluation.layer.
        default: the layer if evaluation.layer is not set: the layer of published scores.
        judges: the names in evaluation.judges that use this extractor, each with its layer.
    """

    name: str
    title: str
    layers: tuple[int, ...]
    default: int
    judges: Mapping[str, int] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """The full name of the extractor's Python module."""
        return f"{__package__}.{self.name}"


class _Extractors(Mapping[str, Extractor]):
    """Maps the name of an extractor to an Extractor. Reads each module of this folder once per process."""

    def __getitem__(self, name: str) -> Extractor:
        values = _values(FOLDER / f"{name}.py") if name.isidentifier() else {}
        if not values:
            raise KeyError(name)
        return Extractor(name, values["TITLE"], tuple(values["LAYERS"]), values["DEFAULT"], values.get("JUDGES", {}))

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem in self)

    def __len__(self) -> int:
        return len(list(iter(self)))


@cache
def _values(path: Path) -> dict[str, Any]:
    """Returns the values that describe an extractor, or an empty dict if the file describes none.

    `ast` would read any Python literal. But CPython 3.11 before 3.11.8 fails with "AST constructor recursion depth mismatch" if
    two threads use it at once (python/cpython#106905), and Prefect's threads use it.
    """
    lines = dict(_LINES.findall(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    if not {"TITLE", "LAYERS", "DEFAULT"} <= lines.keys():
        return {}
    try:
        return {name: json.loads(value) for name, value in lines.items()}
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path.name}: TITLE, LAYERS, DEFAULT and JUDGES must be JSON, each in one line: {error}"
        ) from None


EXTRACTORS: Mapping[str, Extractor] = _Extractors()


def judges() -> dict[str, Extractor]:
    """Maps each metric that evaluation.judges may name to the extractor that computes the features of that metric."""
    return {name: row for row in EXTRACTORS.values() for name in row.judges}
