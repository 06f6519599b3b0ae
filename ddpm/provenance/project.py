"""Notices that the installed package has changed since `ddpm init` made or updated a project.

In a checkout, DVC hashes the code itself. In a project, DVC hashes ddpm.json instead, because the paths of an installed package
differ between machines. ddpm.json holds a hash of the package, of the code of each stage, and of each module that params.yaml
selects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from ddpm.errors import InputError
from ddpm.files import records
from ddpm.provenance import code

NAME = "ddpm.json"
FILES = Path(code.PACKAGE) / "template"  # the files that `ddpm init` copies; no stage runs code in this folder


def mlflow_command(root: Path) -> str:
    """Returns the command that starts MLflow's server in a checkout or in a project, or "" for any other folder."""
    if (root / NAME).exists():
        return "python -m flows.servers.up mlflow"
    return "make ui" if (root / "Makefile").exists() and (root / "flows").is_dir() else ""


def package_digest(files: Mapping[Path, str]) -> str:
    """Hashes the package's code, without the files that `ddpm init` copies. files: the result of code.hashes()."""
    return digest(files, (path for path in files if not path.is_relative_to(FILES)))


def digest(files: Mapping[Path, str], paths: Iterable[Path]) -> str:
    """Hashes the names and bytes of some of the package's files."""
    lines = "".join(f"{path.as_posix()}\0{files[path]}\n" for path in sorted(paths))
    return hashlib.sha256(lines.encode()).hexdigest()


def require_current(root: Path, *versions: Mapping[Path, str]) -> None:
    """Raises InputError if `root` is a project made with other code than the installed code.

    Without this check, DVC would record code that did not run. versions: the package's files and their hashes, as code.hashes()
    returns them. The default is the imported version.
    """
    if not (root / NAME).exists():
        return
    found = records.read_json(root / NAME)
    for files in versions or (code.AT_IMPORT,):
        # protects: tests/tools/test_project.py::test_a_package_that_changes_while_a_stage_runs_is_noticed
        if found.get("package") != package_digest(files):
            raise InputError(
                f"{root / NAME}: made with ddpm {found.get('version')}, and the code of the installed ddpm {version('ddpm')}"
                " differs: run `ddpm init --update` here, and then this again"
            )
