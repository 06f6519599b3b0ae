"""dvc.yaml's code dependencies are the real import graph, so editing a file runs again just what it can change."""

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
from ddpm.scores.extractors import EXTRACTORS

ROOT = Path(__file__).parent.parent
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
FREE = {"ddpm.scores.inception"}  # of the library's rule: torch and numpy alone


@cache
def graph() -> Any:
    return grimp.build_graph(
        "ddpm", "flows", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def with_packages(modules: set[str]) -> set[str]:
    """The modules, and the packages that hold them, which run before them."""
    return {".".join(name.split(".")[:depth]) for name in modules for depth in range(1, name.count(".") + 2)}


def reached(module: str) -> set[str]:
    """The module and all of this package that it imports, as grimp finds it. grimp leaves out the packages that hold a module."""
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
    chosen = {"evaluate": {"ddpm/scores/${evaluation.extractor}.py"}}.get(stage, set())
    assert declared == {path.as_posix() for path in code.files(f"ddpm.stages.{stage}")} | chosen


def test_an_extractor_runs_no_other_file_than_the_stage_and_its_own() -> None:
    """dvc.yaml names the file that params.yaml chooses, and cannot name what that file imports."""
    for extractor in EXTRACTORS.values():
        own = Path("ddpm", "scores", f"{extractor.name}.py")
        assert set(code.files(extractor.module)) <= {own, *code.files("ddpm.stages.evaluate")}


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
    there = {path for path in files if path.suffix != ".py"}
    assert data == {path.relative_to(ROOT).as_posix() for path in there} > set()


def test_an_init_file_holds_names_and_no_work() -> None:
    """They are dependencies of every stage."""
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
    """inception.py imports it by its name in a string, which no import graph shows."""
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
