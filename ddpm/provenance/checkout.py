"""Refuses to run another checkout's code in a checkout, because DVC would record the local code, which did not run."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

from ddpm.errors import InputError


def is_own(root: Path, package: str = "ddpm") -> bool:
    """Returns whether the imported package is the one in `root`. Also True if `root` holds no package of this name."""
    there = root / package
    return not (there / "__init__.py").exists() or there.samefile(_imported(package).parent)


def require_own(root: Path, *packages: str) -> None:
    """Raises InputError if `root` holds a package of these names (by default ddpm) other than the imported one."""
    for package in packages or ("ddpm",):
        if not is_own(root, package):
            raise InputError(
                f"the code of {_imported(package).parent} would run here, not {root.resolve() / package};"
                f" call `python -m {package}` in {root.resolve()}, or activate the .venv of that folder (`make demo` makes it)"
            )


def missing(error: ModuleNotFoundError) -> str:
    """Returns a message with the package that this interpreter lacks, and the remedy in a checkout or after `pip install`."""
    lacking = f"{sys.executable} has no package {error.name}"
    if (_imported("ddpm").parents[1] / "pyproject.toml").exists():
        return (
            f"{lacking}: activate the project's environment (`. .venv/bin/activate`; `make demo` makes it) and run this"
            " again"
        )
    if _is_of_cli(str(error.name)):
        return (
            f'{lacking}: pip install "ddpm[cli]" for the verbs that work on the folder of a model, such as generate, or'
            ' pip install "ddpm[pipeline]" for all verbs'
        )
    return f'{lacking}: pip install "ddpm[pipeline]"'


def _is_of_cli(module: str) -> bool:
    """Returns whether the extra `cli` of the installed ddpm names the package of this module."""
    top = module.partition(".")[0]
    package = {"PIL": "pillow", "ruamel": "ruamel.yaml", "sklearn": "scikit-learn"}.get(top, top)
    named = re.compile(rf"{re.escape(package)}\W.*; extra == .cli.$")
    return any(named.match(requirement) for requirement in importlib.metadata.requires("ddpm") or [])


def _imported(package: str) -> Path:
    return Path(str(importlib.import_module(package).__file__))
