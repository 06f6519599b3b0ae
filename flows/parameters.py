"""Switches params.yaml to a recipe, and sets values as `dvc exp run -S` does."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ddpm.errors import InputError
from ddpm.files import atomic, paths, records
from ddpm.files.params import Params
from ddpm.files.yaml_file import parse_yaml, rewritten
from ddpm.networks.network import NETWORKS
from ddpm.provenance import git
from ddpm.provenance.atomic_lock import TEMPLATE, absent_sections
from ddpm.provenance.inputs import changes
from ddpm.sources.source import SOURCES, check_name

WRITTEN = paths.CACHE / "params.yaml.sha256"  # the hash of the last params.yaml that a recipe or overrides wrote


def read(root: Path, recipe: str | None = None, overrides: Sequence[str] = ()) -> tuple[str, Params]:
    """Returns the new text of params.yaml, comments included, and the parameters in this text.

    Adds the entries and sections of params.yaml that dvc.yaml uses, such as data.source, if an old file lacks them.

    Args:
        root: the checkout.
        recipe: a name in recipes/, or a path; None for params.yaml itself.
        overrides: KEY=VALUE each. KEY is dotted and must exist, such as training.steps. VALUE is YAML.

    Raises:
        InputError: the recipe does not exist, or an override or the result is invalid.
    """
    source = _recipe(root, recipe) if recipe else root / "params.yaml"
    params = Params.load(source)
    text = source.read_text(encoding="utf-8")
    if overrides:
        text = _overridden(text, overrides)
        params = Params.check(parse_yaml(text, "overrides"), "overrides")
    SOURCES.require(params.data.source)
    NETWORKS.require(params.network.kind)
    check_name(params)
    return _with_names(text, params, root), params


def write(
    root: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Params:
    """Writes the result of read() to params.yaml, if that changes the file.

    First copies the old params.yaml to params.yaml.before, unless the last commit, a recipe or an earlier copy has the same
    text, or an earlier call of this function wrote the text.

    Args:
        root: the checkout.
        recipe: see read().
        overrides: see read().
        say: prints a line about the change.

    Raises:
        InputError: see read(). Nothing is written.
    """
    text, params = read(root, recipe, overrides)
    target = root / "params.yaml"
    old = target.read_bytes() if target.exists() else b""
    if text == old.decode("utf-8", "replace").replace("\r\n", "\n"):
        return params
    kept = _keep(root, old) if old else None
    with atomic.replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    atomic.write_text(root / WRITTEN, records.sha256(target))
    say(f"params.yaml: now {_described(root, recipe, overrides)}" + (f" (the old file is {kept.name})" if kept else ""))
    return params


def _with_names(text: str, params: Params, root: Path) -> str:
    """Adds entries and sections that dvc.yaml uses, such as data.source. An old file may lack them or spell them otherwise."""
    wiring = root / "dvc.yaml"
    if not wiring.exists():
        return text
    written = wiring.read_text(encoding="utf-8")
    names = {key: getattr(getattr(params, key[0]), key[1]) for key in re.findall(TEMPLATE, written)}
    given = parse_yaml(text, "params.yaml")
    absent = absent_sections(written, given)
    if not absent and all(given[section].get(key) == name for (section, key), name in names.items()):
        return text

    def change(document: Any) -> None:
        for (section, key), name in names.items():
            document[section][key] = name
        document.update(params.to_json(*absent) if absent else {})

    return rewritten(text, change)


def _described(root: Path, recipe: str | None, overrides: Sequence[str]) -> str:
    if recipe is None:
        return f"with {', '.join(overrides)}" if overrides else "with the entries that dvc.yaml takes from it"
    source = _recipe(root, recipe)
    source = source.relative_to(root) if source.is_relative_to(root) else source
    return f"{source}{', with overrides' * bool(overrides)}"


def _keep(root: Path, old: bytes) -> Path | None:
    """Copies the old params.yaml to params.yaml.before, or to the next free name.

    Returns the path of the copy. Makes no copy and returns None if the last commit or a recipe has the same text, or if write()
    wrote the text and nobody has edited it since.
    """
    recipes = (root / "recipes").glob("*.yaml")
    if any(path.read_bytes() == old for path in recipes) or old == git.ask(root, "show", "HEAD:./params.yaml"):
        return None
    written = root / WRITTEN
    if written.exists() and written.read_text(encoding="utf-8") == hashlib.sha256(old).hexdigest():
        return None  # a recipe or overrides wrote this text, and the user has not edited it since
    for number in itertools.count(1):
        path = root / ("params.yaml.before" + (f"-{number}" if number > 1 else ""))
        if not path.exists():
            with atomic.replacing(path) as temporary:
                temporary.write_bytes(old)
        if path.read_bytes() == old:
            break
    return path


def edits(root: Path, params: Params) -> Callable[[], str]:
    """Returns a function that lists the keys in which params.yaml differs from `params`.

    The function returns "" if no key differs, or if the file has not changed since the last call. It returns "all of it" if
    the file cannot be read.
    """
    path, seen = root / "params.yaml", [0]

    def look() -> str:
        try:
            now = path.stat().st_mtime_ns
            if now == seen[0]:
                return ""
            seen[0] = now
            return changes(params.to_json(), Params.load(path).to_json())
        except (InputError, OSError):
            return "all of it"

    return look


def _recipe(root: Path, recipe: str) -> Path:
    named = root / "recipes" / f"{recipe}.yaml"
    if os.path.isfile(named):  # noqa: PTH113 - Path.is_file raises an error if the name is too long
        return named
    if os.path.isfile(root / recipe):  # noqa: PTH113
        return root / recipe
    names = ", ".join(sorted(path.stem for path in (root / "recipes").glob("*.yaml")))
    raise InputError(f"recipe '{recipe}': neither a file nor one of {names or 'recipes/ (which is empty)'}")


def _overridden(text: str, overrides: Sequence[str]) -> str:
    def change(document: Any) -> None:
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise InputError(f"override '{override}': expected KEY=VALUE, such as training.steps=200")
            section: Any = document
            *path, last = key.strip().split(".")
            for part in path:
                section = section.get(part) if isinstance(section, dict) else None
            if not isinstance(section, dict) or last not in section:
                raise InputError(f"override '{override}': params.yaml has no '{key.strip()}'")
            try:
                section[last] = YAML().load(value)
            except Exception:  # noqa: BLE001 - a tag such as !!int passes on the errors of int()
                raise InputError(f"override '{override}': the value is not valid YAML") from None

    return rewritten(text, change)
