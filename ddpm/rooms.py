"""Finds the variants in a room: a package in which each variant has a module of its own.

The object that describes a variant is called a row. A key of params.yaml selects a row by the name of its module. To add a
variant, add its file. There is no list to extend. A variant's module is imported when the variant is used.

The arguments of `Room(...)` must be string literals, because `ddpm.provenance.code` reads these calls in source files to find the
modules that a params.yaml selects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

from ddpm.errors import InputError

Row = TypeVar("Row")


class Room(Mapping[str, Row], Generic[Row]):
    """Maps the name of each variant's module to the variant's row, which is the object that describes the variant.

    A module holds a row if it assigns the variable named by `row` at its top level. The remaining modules of the package are
    shared parts.

    Args:
        package: the package's full name, such as "ddpm.sources".
        key: the key of params.yaml that selects a row, such as "data.source".
        row: the variable that holds the row in every module, such as "SOURCE".
    """

    def __init__(self, package: str, key: str, row: str) -> None:
        self.package, self.key, self.row = package, key, row

    def __iter__(self) -> Iterator[str]:
        assignment = re.compile(rf"^{self.row}\b[^=\n]*=", re.MULTILINE)
        (folder,) = import_module(self.package).__path__
        paths = sorted(Path(folder).glob("*.py"))
        return (path.stem for path in paths if assignment.search(path.read_text(encoding="utf-8")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def __getitem__(self, name: str) -> Row:
        if name not in self:
            raise KeyError(name)
        row: Row = getattr(import_module(self.module(name)), self.row)
        return row

    def module(self, name: str) -> str:
        """Returns the full name of a variant's module."""
        return f"{self.package}.{name}"

    def select(self, name: str) -> Row:
        """Returns the row of the variant of this name. Raises an InputError that lists all variants if there is none."""
        self.require(name)
        return self[name]

    def require(self, name: str) -> None:
        """Raises an InputError that lists all variants if there is no variant of this name. Imports no variant."""
        if name not in self:
            folder = self.package.replace(".", "/")
            raise InputError(f"{self.key}: no '{name}' in {folder}; there are {', '.join(self)}")
