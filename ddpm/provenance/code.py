"""Finds the files that a module of this package runs, by reading the import statements of the sources.

The keys of saved states and caches hash these files, and registered models contain them. A test checks that the code dependencies
in dvc.yaml are these files. So all of these places notice a change of code.

An `__init__.py` counts too, because Python runs the file when a module below it is imported.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import resolve_name
from operator import attrgetter
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.rooms import Room

PACKAGE = __name__.partition(".")[0]
ROOT = Path(__file__).parents[__name__.count(".")]  # the folder that holds the package


@dataclass
class Source(ast.NodeVisitor):
    """Collects the imports and string literals of a module. Imports below `if TYPE_CHECKING` do not count.

    Attributes:
        package: the package of the module, from which relative imports start.
        imported: the full names of imported modules, also by `import_module(...)`, and `module.name` for each name imported from
            a module, since that name may be a module too.
        at_once: the names in `imported` that are imported outside of functions.
        literals: all string literals. Some of these name files beside the module.
        rooms: the arguments of each call `Room(...)`, which names a package of interchangeable modules (see ddpm.rooms).
    """

    package: str
    imported: set[str] = field(default_factory=set)
    at_once: set[str] = field(default_factory=set)
    literals: set[str] = field(default_factory=set)
    rooms: list[tuple[str, str, str]] = field(default_factory=list)
    _functions: int = 0

    def _add(self, *names: str) -> None:
        self.imported.update(names)
        if not self._functions:
            self.at_once.update(names)

    def visit_Import(self, node: ast.Import) -> None:
        self._add(*(alias.name for alias in node.names))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = resolve_name("." * node.level + (node.module or ""), self.package)
        self._add(module, *(f"{module}.{alias.name}" for alias in node.names))

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called == "import_module" and isinstance(node.args[0], ast.Constant):
            self._add(str(node.args[0].value))
        if called == "Room" and all(isinstance(argument, ast.Constant) for argument in node.args):
            self.rooms.append(tuple(ast.literal_eval(argument) for argument in node.args))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.literals.add(node.value)


@cache
def source(path: Path) -> Source:
    """Reads the imports and literals of a source file below ROOT."""
    found = Source(".".join(path.parent.relative_to(ROOT).parts))
    found.visit(ast.parse(path.read_bytes(), str(path)))
    return found


def modules(names: Iterable[str]) -> dict[str, Path]:
    """Returns the files, by module name, of the modules `names`, of all modules they import, and of their parent packages."""
    found: dict[str, Path] = {}
    queue = list(names)
    while queue:
        name = queue.pop()
        path = _path(name)
        if path is not None and name not in found:
            found[name] = path
            queue += [name.rpartition(".")[0], *source(path).imported]
    return found


def rooms(*names: str) -> list[Room[Any]]:
    """Returns the rooms (see ddpm.rooms) that these modules and their imported modules use."""
    return [Room(*arguments) for path in modules(names).values() for arguments in source(path).rooms]


def selected(params: object, *names: str) -> tuple[str, ...]:
    """Returns the variants that `params` select for the modules `names`, such as ddpm.sources.digits (see ddpm.rooms).

    No import statement names the modules of variants, so `files(*names, *selected(params, *names))` gives all files that run.
    """
    return tuple(f"{room.package}.{attrgetter(room.key)(params)}" for room in rooms(*names))


def files(*names: str) -> tuple[Path, ...]:
    """Returns the files that these modules run, relative to ROOT and sorted: sources, and files that string literals name."""
    paths = set(modules(names).values())
    paths |= {file for path in paths for file in path.parent.iterdir() if file.name in source(path).literals}
    return tuple(sorted(path.relative_to(ROOT) for path in paths if path.is_file()))


def hashes() -> dict[Path, str]:
    """Returns the SHA-256 of each file of the package, by its path relative to ROOT. Takes 3 ms."""
    found = {}
    for path in (ROOT / PACKAGE).rglob("*"):
        if path.is_file() and path.parent.name != "__pycache__":
            with suppress(FileNotFoundError):  # an editor removed a temporary file meanwhile
                found[path.relative_to(ROOT)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# The package ddpm.stages imports this module first. So these are the hashes of the files that Python then imports.
AT_IMPORT = hashes()


@cache
def digest(*names: str) -> str:
    """Returns a hash of the code that the named modules run: the paths and contents of files(*names).

    The hash is computed once per process. The modules are imported first, so that later edits cannot affect this process. Raises
    InputError if a file was edited since the process started: results of the old code would be recorded under the hash of the
    new code.
    """
    graph = files(*names)
    for name in modules(names):
        import_module(name)
    now = hashes()
    for path in graph:
        # protects: tests/provenance/test_code.py::test_code_that_was_edited_after_its_import_trains_nothing
        if now.get(path) != AT_IMPORT.get(path):
            raise InputError(f"{path} was edited after this process had imported it; run again")
    lines = (f"{path.as_posix()}\0{now[path]}\n" for path in graph)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _path(name: str) -> Path | None:
    """Returns the file of a module of this package, or None for any other name."""
    if name.partition(".")[0] != PACKAGE:
        return None
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)
