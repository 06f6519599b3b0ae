"""Checks that dvc.yaml's code dependencies are the real import graph, so that an edit reruns only the stages it can change."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest
from ruamel.yaml import YAML

import ddpm
from ddpm.provenance import code
from ddpm.provenance.project import FILES
from ddpm.scores.extractors import EXTRACTORS

ROOT = Path(__file__).parent.parent
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
# These modules may import more than torch and numpy, unlike the rest of the library.
FREE = {f"ddpm.scores.{name}" for name in ("conclusions", "features", "inception", "towers")}


@cache
def graph() -> Any:
    return grimp.build_graph(
        "ddpm", "flows", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def with_packages(modules: set[str]) -> set[str]:
    """Returns the modules with the packages that contain them, since Python runs these packages first."""
    return {".".join(name.split(".")[:depth]) for name in modules for depth in range(1, name.count(".") + 2)}


def dependencies(stage: str) -> set[str]:
    """Returns the code dependencies of a stage: its import graph, and for each room the module that params.yaml selects.

    Modules that any row of a room imports are listed for all rows, because DVC cannot list them for the selected row alone.
    The same holds for the extractors of evaluation.judges, which is a list.
    """
    name = f"ddpm.stages.{stage}"
    shared, rows, selected = [name], set(), set()
    for room in code.rooms(name):
        folder = room.package.replace(".", "/")
        judging = {name for name, row in EXTRACTORS.items() if row.judges and room.key == "evaluation.extractor"}
        rows |= {f"{folder}/{row}.py" for row in room if row not in judging}
        selected.add(f"{folder}/${{{room.key}}}.py")
        shared += [f"{room.package}.{row}" for row in room]
    return {path.as_posix() for path in code.files(*shared)} - rows | selected


def reached(module: str) -> set[str]:
    """Returns the module and all modules of ddpm that it imports, as grimp finds them.

    grimp leaves out the packages that contain a module, so they are added here.
    """
    found: set[str] = set()
    queue = {module}
    while queue:
        found |= queue
        upstream = {name for each in queue for name in graph().find_upstream_modules(each)}
        queue = with_packages(queue | {name for name in upstream if name.split(".")[0] == "ddpm"}) - found
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_files_of_the_stage(stage: str) -> None:
    declared = {path for path in STAGES[stage]["deps"] if path.startswith("ddpm/")}
    assert declared == dependencies(stage)


def test_the_code_that_a_row_runs_is_named_for_the_stage() -> None:
    """dvc.yaml lists the selected module itself, and all modules that it imports."""
    for stage in STAGES:
        name = f"ddpm.stages.{stage}"
        for room in code.rooms(name):
            for row in room:
                executed = {path.as_posix() for path in code.files(name, f"{room.package}.{row}")}
                assert executed <= {path.replace(f"${{{room.key}}}", row) for path in dependencies(stage)}


def test_the_modules_behind_a_module_are_the_import_graph() -> None:
    modules = {name for name in graph().modules if name.split(".")[0] == "ddpm"}
    assert len(modules) > 60
    for module in modules:
        assert set(code.modules([module])) == reached(module), module


def test_no_module_imports_a_public_name_whose_module_its_text_does_not_say() -> None:
    modules = {name for name in graph().modules if name.split(".")[0] == "ddpm"}
    for path in code.modules(modules).values():
        names = {
            name.split(".")[1]
            for name in code.source(path).imported
            if name.startswith("ddpm.") and name.count(".") == 1
        }
        assert not names & set(ddpm.__all__), path


def test_files_that_a_module_names_belong_to_it() -> None:
    data = {path.as_posix() for path in code.files(*graph().modules) if path.suffix != ".py"}
    files = (path for path in (ROOT / "ddpm").rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    data_files = {path for path in files if path.suffix != ".py" and path.name != "py.typed"}
    there = {path for path in data_files if not path.is_relative_to(ROOT / FILES)}
    assert data == {path.relative_to(ROOT).as_posix() for path in there} > set()


def test_an_init_file_holds_names_and_no_work() -> None:
    """Every __init__.py is a dependency of every stage."""
    for path in (ROOT / "ddpm").rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            assert isinstance(node, ast.Expr | ast.Import | ast.ImportFrom | ast.If | ast.Assign | ast.FunctionDef), (
                path
            )
            assert not isinstance(node, ast.Assign) or ast.literal_eval(node.value)


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_reaches_what_only_watches(stage: str) -> None:
    upstream = graph().find_upstream_modules(f"ddpm.stages.{stage}")
    assert not {name for name in upstream if name.split(".")[0] in {"mlflow", "prefect", "dvc", "typer", "rich"}}
    assert not {name for name in upstream if name.startswith(("ddpm.tracking", "ddpm.runtime.watchdog", "ddpm.cli"))}


def test_the_library_imports_torch_and_numpy_alone() -> None:
    rooms = ("ddpm.diffusion", "ddpm.networks", "ddpm.scores", "ddpm.training")
    library = {"ddpm", "ddpm.interop"} | {name for room in rooms for name in graph().find_descendants(room)}
    for module in library - FREE:
        roots = {name.split(".")[0] for name in graph().find_modules_directly_imported_by(module)}
        assert roots - sys.stdlib_module_names <= {"torch", "numpy", "ddpm"}, module


def test_torch_fidelity_is_named_in_inception_alone() -> None:
    """inception.py imports torch-fidelity by a name in a string, which no import graph shows."""
    named = [
        path
        for path in (ROOT / "ddpm").rglob("*.py")
        if "torch_fidelity" in path.read_text().replace("torch-fidelity", "")
    ]
    assert named == [ROOT / "ddpm" / "scores" / "inception.py"]


def test_importing_the_library_loads_nothing_heavy() -> None:
    program = "import sys, ddpm; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert not {"torch", "numpy", "mlflow", "prefect", "yaml", "ruamel", "PIL"} & set(loaded.split())


def test_import_linter() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
