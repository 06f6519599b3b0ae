"""EXTRACTORS: what turns images into features, by the value of `evaluation.extractor`. Each is one module of this folder.

Such a module tells of itself in literals, and loads itself:

    TITLE = "Inception"  # what people call it
    LAYERS = (64, 192, 768, 2048)  # the values of evaluation.layer
    DEFAULT = 2048  # the layer where params.yaml names none: that of published scores

    def load(layer: int, cache: Path, device: torch.device | str = "cpu") -> Features: ...

The literals are read from the source, as setuptools reads a version: importing the module would import torch, and processes that
never do check params.yaml too. So adding an extractor is adding a file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Extractor:
    """A row of EXTRACTORS. layers: what evaluation.layer may be. default: the layer of published scores."""

    name: str
    title: str
    layers: tuple[int, ...]
    default: int

    @property
    def module(self) -> str:
        return f"{__package__}.{self.name}"


class _Extractors(Mapping[str, Extractor]):
    def __getitem__(self, name: str) -> Extractor:
        told = _literals(FOLDER / f"{name}.py") if name.isidentifier() else {}
        if not {"TITLE", "LAYERS", "DEFAULT"} <= told.keys():
            raise KeyError(name)
        return Extractor(name, str(told["TITLE"]), tuple(told["LAYERS"]), int(told["DEFAULT"]))

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem in self)

    def __len__(self) -> int:
        return len(list(iter(self)))


@cache
def _literals(path: Path) -> dict[str, Any]:
    """The names in capitals that a source file assigns literals to."""
    found = {}
    try:
        body = ast.parse(path.read_bytes()).body if path.is_file() else []
    except SyntaxError:  # a file that somebody is writing
        return {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
            with suppress(ValueError):  # no literal
                found[target.id] = ast.literal_eval(node.value)
    return {name: value for name, value in found.items() if name.isupper()}


EXTRACTORS: Mapping[str, Extractor] = _Extractors()
