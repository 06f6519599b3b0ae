"""Checks how the code of a module is found, and that no run continues from states that other code wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddpm.networks import winograd
from ddpm.provenance import code

ROOT = Path(__file__).parents[2]

# Runs a training, an interrupted sampling and an evaluation. Prints their messages about states that an earlier run left.
PROGRAM = """
import signal
from ddpm.files import paths, records
from ddpm.stages.evaluate import evaluate
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.stages.sample import sample_point
from ddpm.runtime.stopping import Stopped
from ddpm.stages.train import train

def say(progress):
    if progress.message:
        print(progress.message)
    if progress.unit == "images" and stopping and 20 <= progress.done < 64:
        signal.raise_signal(signal.SIGTERM)

params, stopping = Params.load(), False
train(params, "cosine", report=say)
print("weights", records.sha256(paths.model_dir("cosine") / "model.safetensors"))
sample_point(params, Point.parse("cosine-ddim-2"))
evaluate(params, Point.parse("cosine-ddim-2"), report=say)
stopping = True
try:
    sample_point(params, Point.parse("cosine-ddim-5"), report=say)
except Stopped:
    print("stopped")
"""
KEPT = ("resuming after step", "resuming after 16 images")
EDITS = {  # edits that change no weight, so that the samplings differ only in their code
    "stages/train.py": (
        "manual_seed(params.training_seed(schedule))",
        "manual_seed(params.training_seed(schedule) + 0)",
    ),
    "diffusion/noise.py": ("import torch\n", "import torch  # and so on\n"),
    "scores/fidelity.py": ("import torch\n", "import torch  # and so on\n"),
}


@pytest.fixture
def checkout(digits: Path, inception_cache: Path, tmp_path: Path) -> Path:
    """Creates a copy of the code with a recipe that trains for a moment."""
    shutil.copytree(ROOT / "ddpm", tmp_path / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dataset").symlink_to(digits / "dataset")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "inception").symlink_to(inception_cache)
    recipe = (ROOT / "recipes" / "smoke.yaml").read_text()
    changes = {"steps: 60": "steps: 4", "batch: 64": "batch: 16", "device: auto": "device: cpu"}
    for before, after in changes.items():
        assert before in recipe
        recipe = recipe.replace(before, after, 1)
    (tmp_path / "params.yaml").write_text(recipe)
    return tmp_path


def run(root: Path, program: str = PROGRAM) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.proof
def test_what_other_code_left_is_not_gone_on_from(checkout: Path) -> None:
    first, second = run(checkout), run(checkout)
    assert not any(line in first for line in KEPT) and "later points reuse them" in first
    assert all(line in second for line in KEPT) and "later points reuse them" not in second
    for name, (before, after) in EDITS.items():
        path = checkout / "ddpm" / name
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after, 1))
    third = run(checkout)
    assert not any(line in third for line in KEPT) and "later points reuse them" in third
    weights = [line for said in (first, second, third) for line in said.splitlines() if line.startswith("weights")]
    assert len(weights) == 3 and len(set(weights)) == 1


EDITED = """
from pathlib import Path
from ddpm.files import checkpoint
from ddpm.stages import train
from ddpm.files.params import Params
for name in ("networks/unet.py", "files/dataset.py"):
    path = Path("ddpm") / name
    path.write_text(path.read_text() + "# and so on")
    try:
        train.train(Params.load(), "cosine")
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_code_that_was_edited_after_its_import_trains_nothing(checkout: Path) -> None:
    said = run(checkout, EDITED).splitlines()
    edited = "InputError ddpm/{}.py was edited after this process had imported it; run again"
    # the message names the first edited file in alphabetical order
    assert said == [edited.format("networks/unet"), edited.format("files/dataset")]
    assert not list((checkout / ".cache").glob("training/*"))


def test_imports_are_found_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "ROOT", tmp_path)
    package = tmp_path / "ddpm"
    (package / "inner").mkdir(parents=True)
    for name in ("a", "b", "c", "d", "e", "h", "inner/__init__", "inner/f", "inner/g", "never", "__init__"):
        (package / f"{name}.py").write_text("")
    (package / "table.csv").write_text("1")
    (package / "inner" / "table.csv").write_text("2")
    (package / "start.py").write_text(
        "import os, ddpm.a\nfrom typing import TYPE_CHECKING\nfrom ddpm import b as other\n"
        "if TYPE_CHECKING:\n    from ddpm import never\nelse:\n    from ddpm import c\n"
        "class Late:\n    import torch\n    async def work(self):\n        import numpy\n        from .d import thing\n"
        "def table():\n    from .inner import f, nothing\n    return 'table.csv'\n"
        "def named():\n    importlib.import_module('ddpm.h')\n"
    )
    (package / "inner" / "f.py").write_text("from . import g\nfrom ..e import thing")
    found = [path.as_posix().removeprefix("ddpm/") for path in code.files("ddpm.start")]
    inner = [f"inner/{name}.py" for name in ("__init__", "f", "g")]
    assert found == sorted(["__init__.py", *(f"{name}.py" for name in "abcdeh"), *inner, "start.py", "table.csv"])
    roots = {name.partition(".")[0] for name in code.source(package / "start.py").at_once}
    assert roots == {"os", "ddpm", "typing", "torch"}


def test_a_module_that_params_select_is_code_of_those_that_use_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "ROOT", tmp_path)
    room = tmp_path / "ddpm" / "inner"
    room.mkdir(parents=True)
    (tmp_path / "ddpm" / "stage.py").write_text("from ddpm.inner.row import ROWS\n")
    (room / "row.py").write_text('ROWS: Room[int] = Room("ddpm.inner", "data.source", "ROW")\n')
    (room / "one.py").write_text("from ddpm.inner import helper\nROW = 1\n")
    for name in ("two", "helper"):
        (room / f"{name}.py").write_text("ROW: int = 2\n" if name == "two" else "ROWS = ()\n")
    params = SimpleNamespace(data=SimpleNamespace(source="one"))
    assert code.selected(params, "ddpm.stage") == ("ddpm.inner.one",)
    assert code.selected(params, "ddpm.inner.two") == ()
    found = code.files("ddpm.stage", *code.selected(params, "ddpm.stage"))
    assert [path.name for path in found] == ["helper.py", "one.py", "row.py", "stage.py"]


@pytest.mark.parametrize("changed", ["source", "code", "version"])
def test_a_kernel_is_compiled_anew_for_all_that_decides_it(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(winograd.torch.hub, "get_dir", lambda: str(tmp_path / "kept" / "hub"))
    script = tmp_path / "a-compiler"
    monkeypatch.setenv("CC", str(script))

    def kernels(version: str = "1") -> int:
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\nexec {compiler} "$@"\n')
        script.chmod(0o755)
        winograd._library.__wrapped__(torch.float32)
        return len(list((tmp_path / "kept").rglob("*.so")))

    for name, attribute in (("winograd.c", "SOURCE"), ("winograd.py", "__file__")):
        shutil.copy(Path(winograd.__file__).with_name(name), tmp_path)
        monkeypatch.setattr(winograd, attribute, type(getattr(winograd, attribute))(tmp_path / name))
    assert [kernels(), kernels()] == [1, 1]
    if changed != "version":
        with (tmp_path / {"source": "winograd.c", "code": "winograd.py"}[changed]).open("a") as file:
            file.write("\n")
    assert kernels("2" if changed == "version" else "1") == 2
