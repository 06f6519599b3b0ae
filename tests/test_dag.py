"""dvc.yaml's code dependencies are the real import graph, so editing a file runs again just what it can change."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
FREE = {"ddpm.cli", "ddpm.features"}  # of the library's rule: torch and numpy alone


@cache
def graph() -> Any:
    return grimp.build_graph(
        "ddpm", "flows", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def source(module: str) -> str | None:
    """A module's file below the root; None for a package's __init__.py, which holds names and no work."""
    path = ROOT / (module.replace(".", "/") + ".py")
    return path.relative_to(ROOT).as_posix() if path.is_file() else None


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_the_import_graph(stage: str) -> None:
    module = f"ddpm.stages.{stage}"
    imported = {name for name in graph().find_upstream_modules(module) if name.startswith("ddpm.")}
    expected = {path for name in {module, *imported} if (path := source(name))}
    declared = {path for path in STAGES[stage]["deps"] if path.endswith(".py")}
    assert declared == expected


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_reaches_what_only_watches(stage: str) -> None:
    upstream = graph().find_upstream_modules(f"ddpm.stages.{stage}")
    assert not {name for name in upstream if name.split(".")[0] in {"mlflow", "prefect", "dvc", "typer", "rich"}}
    assert not {
        name for name in upstream if name.startswith(("ddpm.stages.tracking", "ddpm.stages.watchdog", "ddpm.cli"))
    }


def test_the_library_imports_torch_and_numpy_alone() -> None:
    library = {name for name in graph().find_children("ddpm") if name not in {*FREE, "ddpm.stages"}}
    assert library >= {"ddpm.schedule", "ddpm.samplers", "ddpm.unet"}
    for module in library:
        roots = {name.split(".")[0] for name in graph().find_modules_directly_imported_by(module)}
        assert roots - sys.stdlib_module_names <= {"torch", "numpy", "ddpm"}, module


def test_torch_fidelity_is_named_in_features_alone() -> None:
    """features.py imports it by its name in a string, which no import graph shows."""
    named = [
        path
        for path in (ROOT / "ddpm").rglob("*.py")
        if "torch_fidelity" in path.read_text().replace("torch-fidelity", "")
    ]
    assert named == [ROOT / "ddpm" / "features.py"]


def test_importing_the_library_loads_nothing_heavy() -> None:
    code = "import sys, ddpm; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
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
