"""Checks the built wheel in environments that contain only its requirements: the library alone, and the extra `cli`."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterable
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from ddpm import load, sample

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy of the sources, because setuptools writes into the folder that it builds."""
    home = tmp_path_factory.mktemp("wheel")
    for name in ("ddpm", "flows", "recipes"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, home / name)
    alone = ("--no-deps", "--no-index", "--no-build-isolation")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", *alone, "--wheel-dir", "dist", "."], cwd=home, check=True
    )
    (made,) = home.glob("dist/*.whl")
    return made


def required(wheel: Path, extra: str) -> list[Requirement]:
    """Returns the requirements in the wheel's metadata, including those of one extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    found = (Requirement(text) for text in metadata.get_all("Requires-Dist", []))
    return [item for item in found if item.marker is None or item.marker.evaluate({"extra": extra})]


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """Returns the names of the packages that an installation of these requirements brings."""
    names: set[str] = set()
    queue = [(item.name, extra) for item in requirements for extra in ("", *item.extras)]
    while queue:
        name, extra = queue.pop()
        names.add(canonicalize_name(name))
        for text in distribution(name).requires or []:
            item = Requirement(text)
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                queue += [(item.name, each) for each in ("", *item.extras) if canonicalize_name(item.name) not in names]
    return names


def environment(home: Path, wheel: Path, extra: str) -> Run:
    """Creates a virtual environment with links to the installed packages that the wheel requires.

    Returns run("ddpm", ..., cwd=...), which runs a script of the environment.
    """
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python*/site-packages")
    for name in closure(required(wheel, extra)):
        files = distribution(name)
        for top in {path.parts[0] for path in files.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(files.locate_file(top))))
    install = ("--python", home, "install", "--quiet", "--no-deps", "--no-index", wheel)
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW", "VIRTUAL"))}

    def run(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [home / "bin" / program, *arguments],
            cwd=cwd,
            env={**clean, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return environment(tmp_path_factory.mktemp("library"), wheel, "")


@pytest.fixture(scope="module")
def verbs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return environment(tmp_path_factory.mktemp("verbs"), wheel, "cli")


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """Creates a user's folder that contains only a model."""
    shutil.copytree(made / "models" / "cosine", tmp_path / "model")
    return tmp_path


def test_the_library_takes_three_packages(wheel: Path) -> None:
    assert {item.name for item in required(wheel, "")} == {"numpy", "safetensors", "torch"}


def test_the_wheel_holds_what_is_no_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        there = set(archive.namelist())
    data = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.c", "*.jinja", "py.typed")
        for path in (ROOT / "ddpm").rglob(pattern)
    }
    data |= {f"ddpm/template/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert len(data) > 8 and data <= there
    assert [name for name in there if re.fullmatch(r".*\.dist-info/licenses/LICENSE", name)]
    modules = {path.relative_to(ROOT).as_posix() for name in ("ddpm", "flows") for path in (ROOT / name).rglob("*.py")}
    code = {name for name in there if name.endswith(".py") and not name.startswith("ddpm/template/")}
    assert modules == code


def test_the_library_alone_loads_a_model_and_samples_from_it(library: Run, project: Path) -> None:
    script = """\
import importlib.util
import numpy, torch
import ddpm
assert [name for name in ("pydantic", "typer", "mlflow", "PIL", "scipy") if importlib.util.find_spec(name)] == []
noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
numpy.save("images.npy", ddpm.sample(ddpm.load("model"), noise, sampler="ddim", steps=5).numpy())
try:
    ddpm.load("models:/ddpm-digits@champion")
except ddpm.errors.InputError as error:
    print(error)
"""
    done = library("python", "-c", script, cwd=project)
    assert done.returncode == 0, done.stderr
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sample(load(project / "model"), noise, sampler="ddim", steps=5)
    np.testing.assert_allclose(np.load(project / "images.npy"), expected.numpy(), atol=1e-4)
    assert done.stdout.startswith("models:/ddpm-digits@champion: ") and "pip install" in done.stdout


def test_the_library_alone_says_which_extra_the_verbs_take(library: Run, project: Path) -> None:
    done = library("ddpm", "generate", "--model", "model", cwd=project)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert 'pip install "ddpm[cli]"' in done.stderr and 'pip install "ddpm[pipeline]"' in done.stderr
    shown = library("ddpm", "--help", cwd=project)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, done.stderr, "")


def test_the_verbs_that_work_on_the_folder_of_a_model(verbs: Run, project: Path) -> None:
    commands = (
        ("generate", "--model", "model", "-n", "16", "--steps", "5", "--out", "grid.png"),
        ("generate", "--model", "model", "--sampler", "heun", "--strip", "-n", "2", "--steps", "5", "--out", "s.png"),
        ("schedules", "--model", "model"),
        ("export-diffusers", "model", "exported"),
        ("import-diffusers", "exported", "again"),
        ("generate", "--model", "imported/again", "-n", "16", "--steps", "5", "--out", "again.png"),
    )
    for command in commands:
        done = verbs("ddpm", *command, cwd=project)
        assert done.returncode == 0, done.stderr
    assert np.array_equal(*(np.asarray(Image.open(project / name)) for name in ("grid.png", "again.png")))
    made = {"model", "grid.png", "s.png", "schedules", "exported", "imported", "again.png"}
    assert {path.name for path in project.iterdir()} == made


@pytest.mark.proof
def test_the_swiss_roll_takes_no_checkout(verbs: Run, project: Path) -> None:
    done = verbs("ddpm", "swiss-roll", "--out", "roll.png", cwd=project)
    assert done.returncode == 0, done.stderr
    assert len(np.unique(np.asarray(Image.open(project / "roll.png")))) > 10


def test_a_verb_of_the_pipeline_says_what_installs_it(verbs: Run, project: Path) -> None:
    """generate needs MLflow for a registered model."""
    done = verbs("ddpm", "generate", "--model", "models:/ddpm-digits@champion", cwd=project)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.endswith('pip install "ddpm[pipeline]"\n') and "[cli]" not in done.stderr
    assert {path.name for path in project.iterdir()} == {"model"}
