"""`init`: creates a project: a folder outside of any checkout. There, `dvc repro` runs the stages of the installed package.

In a project, dvc.yaml differs from the checkout's dvc.yaml in one respect. In a checkout, a stage depends on code files. In a
project, a stage depends on entries of ddpm.json, which hold the hashes of these files. So after an upgrade of the package, only
the stages whose code changed run again.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files import atomic, records
from ddpm.files.params import Params
from ddpm.files.yaml_file import parse_yaml, rewritten
from ddpm.provenance import code, git
from ddpm.provenance.project import FILES, NAME, digest, package_digest

PREFIX = f"{code.PACKAGE}/"  # the prefix of dependencies that are code
# Files of the package that are copied unchanged, and their names in the project.
COPIED = {
    ".dvcignore": ".dvcignore",
    "gitignore": ".gitignore",
    "images/README.md": "images/README.md",
    "prefect.toml": "prefect.toml",
    "Procfile": "Procfile",
}
# Texts of the package's prefect.yaml that hold only in a checkout, and their replacements in a project.
REPLACED = {"flows/train_eval.py:train_eval": "flows.train_eval.train_eval", "make up": "python -m flows.servers.up"}
HEAD = """\
# The stages, as ddpm {version} runs them. After an upgrade, `ddpm init --update` writes this file and {name} again.
# {name} holds hashes of the package's code. A stage depends on the hashes of its own code and of the modules that
# params.yaml selects.
"""


def init(folder: Path, recipe: str) -> list[str]:
    """Creates a project in `folder`, with a recipe as its params.yaml. Returns lines for the user, with the next commands.

    Raises InputError if the folder already has one of the project's files, if there is no such recipe, or if `git init` or
    `dvc init` fails. Then no project file is written.
    """
    importlib.import_module("dvc")  # without the extra `pipeline`, this fails here with a one-line message
    files = _files(recipe)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a folder; name a new or an existing folder")
    if present := [name for name in files if (folder / name).exists()]:
        advice = "to update the project, run `ddpm init --update`" if NAME in present else "choose an empty folder"
        raise InputError(f"{folder}: already has {', '.join(present)}; {advice}")
    folder.mkdir(parents=True, exist_ok=True)
    _repositories(folder)
    for name, text in files.items():
        atomic.write_text(folder / name, text)
    return [
        f"{folder}: created a project with the recipe {recipe}",
        "next:",
        *([] if folder.resolve() == Path.cwd() else [f"  cd {shlex.quote(str(folder))}"]),
        "  dvc repro   runs the pipeline and writes report/index.html",
        "  ddpm run    does the same, publishes the results to MLflow and promotes the best point",
    ]


def update(folder: Path) -> list[str]:
    """Writes dvc.yaml and ddpm.json again for the installed package. Returns a line that names the changed stages.

    Writes nothing and raises InputError if `folder` is not a project, or if dvc.yaml was edited.
    """
    if not (folder / NAME).exists():
        raise InputError(f"{folder}: not a project, since it has no {NAME}; `ddpm init FOLDER` creates a project")
    before, wiring = records.read_json(folder / NAME), folder / "dvc.yaml"
    if wiring.exists() and _sha256(wiring.read_text(encoding="utf-8")) != before.get("dvc.yaml"):
        raise InputError(
            f"{wiring}: was edited, so it is not replaced; move it away, run `ddpm init --update` again, and repeat the edits"
        )
    made = _generated()
    for name, text in made.items():
        atomic.write_text(folder / name, text)
    after = parse_yaml(made[NAME], NAME)
    old, new = ({**found.get("stages", {}), **found.get("rows", {})} for found in (before, after))
    changed = [name for name in new if new[name] != old.get(name)]
    return [f"{NAME}: updated to ddpm {after['version']}; stages whose code changed: {', '.join(changed) or 'none'}"]


def wiring(text: str) -> str:
    """Returns dvc.yaml for a project: replaces dependencies on code files by dependencies on entries of ddpm.json."""

    def change(document: Any) -> None:
        for name, stage in document["stages"].items():
            files = [path for path in stage["deps"] if path.startswith(PREFIX)]
            for path in files:
                stage["deps"].remove(path)
            rows = [f"rows.{path.removesuffix('.py')}" for path in files if "${" in path]
            stage.setdefault("params", []).append({NAME: [f"stages.{name}", *rows]})

    body = re.sub(r"\A(#.*\n)+", "", text)
    return HEAD.format(version=version("ddpm"), name=NAME) + rewritten(body, change)


def hashes(text: str) -> dict[str, Any]:
    """Returns the content of ddpm.json. text: the content of the package's dvc.yaml.

    The entries are hashes: of the package, of the code of each stage, and of each module that params.yaml may select.
    """
    files, stages, rows = code.hashes(), dict[str, str](), dict[str, str]()
    for name, stage in parse_yaml(text, "dvc.yaml")["stages"].items():
        paths = [Path(path) for path in stage["deps"] if path.startswith(PREFIX)]
        stages[name] = digest(files, (path for path in paths if "${" not in path.name))
        for folder in {path.parent for path in paths if "${" in path.name}:
            modules = [path for path in files if path.parent == folder and path.suffix == ".py"]
            rows |= {path.with_suffix("").as_posix(): digest(files, [path]) for path in modules}
    about = {"version": version("ddpm"), "package": package_digest(files)}
    return {**about, "stages": stages, "rows": dict(sorted(rows.items()))}


def _files(recipe: str) -> dict[str, str]:
    """Returns the text of each file of a new project, by its path."""
    recipes = {path.stem: path for path in sorted((code.ROOT / FILES / "recipes").glob("*.yaml"))}
    if recipe not in recipes:
        raise InputError(f"--recipe {recipe}: no such recipe; choose one of {', '.join(recipes)}")
    Params.load(recipes[recipe])
    scripts = sorted((code.ROOT / FILES / "recipes").glob("*.py"))  # scripts that make the data of a recipe
    deployment = _template("prefect.yaml")
    for before, after in REPLACED.items():
        deployment = deployment.replace(before, after)
    return {
        "params.yaml": recipes[recipe].read_text(encoding="utf-8"),
        **_generated(),
        "prefect.yaml": deployment,
        **{name: _template(source) for source, name in COPIED.items()},
        **{f"recipes/{path.name}": path.read_text(encoding="utf-8") for path in scripts},
        **{f"recipes/{path.name}": path.read_text(encoding="utf-8") for path in recipes.values()},
    }


def _generated() -> dict[str, str]:
    """Returns the texts of dvc.yaml and ddpm.json, which depend on the installed package, by file name."""
    text = _template("stages.yaml")  # dvc.yaml, under a name that DVC does not read in a checkout
    made = wiring(text)
    content = {**hashes(text), "dvc.yaml": _sha256(made)}
    return {"dvc.yaml": made, NAME: f"{json.dumps(content, indent=2)}\n"}


def _template(name: str) -> str:
    return (code.ROOT / FILES / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _repositories(folder: Path) -> None:
    """Runs `git init` unless the folder is in a git repository, and `dvc init` unless the folder contains .dvc."""
    if git.line(folder, "rev-parse", "--show-toplevel") is None and git.ask(folder, "init", "--quiet") is None:
        raise InputError(
            f"{folder}: `git init` failed, and DVC needs git; install git, or run `git init` there to see the error"
        )
    if (folder / ".dvc").is_dir():
        return
    inside = Path(git.line(folder, "rev-parse", "--show-toplevel") or folder) != folder.resolve()
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "init", *(["--subdir"] if inside else [])],
        cwd=folder,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"{folder}: `dvc init` failed: {' '.join(done.stderr.split())}")
    atomic.write_text(folder / ".dvc" / "config", "[core]\n    analytics = false\n")
