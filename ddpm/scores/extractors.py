"""EXTRACTORS: the models that turn images into features, by the value of `evaluation.extractor`.

Each extractor is a module of this folder, with literals that describe the extractor and a function that loads it:

    TITLE = "Inception"  # the usual name
    LAYERS = (64, 192, 768, 2048)  # the values of evaluation.layer
    DEFAULT = 2048  # the layer if params.yaml names none: the layer of published scores
    JUDGES = {"sfid": 2023}  # optional: values of evaluation.judges, each with the layer that it uses

    def load(layer: int, cache: Path, device: torch.device | str = "cpu") -> Features: ...

The literals are read from the module's source. Importing the module would import torch, but processes without torch check
params.yaml too. To add an extractor, add its file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


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
        literals = _literals(FOLDER / f"{name}.py") if name.isidentifier() else {}
        if not {"TITLE", "LAYERS", "DEFAULT"} <= literals.keys():
            raise KeyError(name)
        title, layers, default = (literals[key] for key in ("TITLE", "LAYERS", "DEFAULT"))
        return Extractor(name, str(title), tuple(layers), int(default), literals.get("JUDGES", {}))

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem in self)

    def __len__(self) -> int:
        return len(list(iter(self)))


@cache
def _literals(path: Path) -> dict[str, Any]:
    """Returns the literals that a source file assigns to names in capitals."""
    literals = {}
    try:
        body = ast.parse(path.read_bytes()).body if path.is_file() else []
    except SyntaxError:  # for example in a file that an editor is writing
        return {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
            with suppress(ValueError):  # raised if the value is not a literal
                literals[target.id] = ast.literal_eval(node.value)
    return {name: value for name, value in literals.items() if name.isupper()}


EXTRACTORS: Mapping[str, Extractor] = _Extractors()


def judges() -> dict[str, Extractor]:
    """Maps each metric that evaluation.judges may name to the extractor that computes the features of that metric."""
    return {name: row for row in EXTRACTORS.values() for name in row.judges}
