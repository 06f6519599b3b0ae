"""Checks a project made by `ddpm init` from the wheel: DVC, `ddpm run` and the deployment run the installed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.proof, pytest.mark.timeout(1200)]
# Cuts the smoke recipe to one point and a hardly trained network.
TINY = {
    "steps: 60": "steps: 4",
    "validate_every: 30": "validate_every: 4",
    "device: auto": "device: cpu",
    "samplers: [ddpm, ddim]": "samplers: [ddim]",
    "steps: [2, 5]": "steps: [2]",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates an environment with the wheel of this checkout, and with the other packages of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a build leaves files in its folder
    for name in ("ddpm", "flows", "recipes", "images/README.md", ".dvcignore", ".gitignore", "Procfile", "dvc.yaml"):
        path, copy = ROOT / name, source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    for name in ("prefect.toml", "prefect.yaml", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    uv = Path(sys.executable).with_name("uv")
    build = (uv, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, source)
    subprocess.run(build, check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=False)
    python, (wheel,) = folder / "venv" / "bin" / "python", folder.glob("*.whl")
    install = (uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, wheel)
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    own = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    # this folder comes after the folder of the wheel, so Python finds the wheel's packages first
    (site / "others.pth").write_text(f"{own}\n")
    return folder / "venv"


@pytest.fixture(scope="module")
def project(
    installed: Path, inception_cache: Path, tmp_path_factory: pytest.TempPathFactory, scratch_maker: Callable[..., Any]
) -> Iterator[Any]:
    """Creates a project in a new folder. Its commands use the environment `installed`, and not the code of this checkout."""
    home = tmp_path_factory.mktemp("home")
    (home / "empty").mkdir()
    made = scratch_maker(home / "project", home / "empty")
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        made.environment.pop(name, None)
    made.environment["PATH"] = os.pathsep.join((str(installed / "bin"), os.environ["PATH"]))
    done = made.run("ddpm", "init", "--recipe", "smoke")
    assert done.returncode == 0, done.stderr
    text = (made.root / "params.yaml").read_text()
    for before, after in TINY.items():
        assert before in text, before
        text = text.replace(before, after, 1)
    (made.root / "params.yaml").write_text(text)
    (made.root / ".cache").mkdir(exist_ok=True)
    (made.root / ".cache" / "inception").symlink_to(inception_cache)
    yield made
    made.end()


def answered(said: str) -> bool:
    return "best: cosine-ddim-2, FID " in said and "report: report/index.html" in said


def test_dvc_repro_runs_to_a_report_and_then_has_nothing_to_do(project: Any) -> None:
    where = project.run("python", "-c", "import ddpm, flows; print(ddpm.__file__, flows.__file__)")
    assert where.stdout.count("/venv/lib/") == 2 and str(ROOT) not in where.stdout, where.stderr
    done = project.run("python", "-m", "dvc", "repro")
    assert done.returncode == 0 and answered(done.stdout), done.stdout + done.stderr
    assert (project.root / "report" / "index.html").stat().st_size > 1000
    again = project.run("python", "-m", "dvc", "repro")
    assert again.returncode == 0 and "Running stage" not in again.stdout, again.stdout
    assert str(ROOT) not in (project.root / "dvc.lock").read_text() + (project.root / "ddpm.json").read_text()


def test_images_of_the_best_point(project: Any) -> None:
    done = project.run("ddpm", "generate", "-n", "4", "--out", "grid.png")
    assert done.returncode == 0 and "4 images of cosine-ddim-2, the report's best point" in done.stdout, done.stderr


def test_ddpm_run_sets_runs_and_answers(project: Any) -> None:
    done = project.run("ddpm", "run", "likelihood.times=3")
    assert done.returncode == 0 and answered(done.stdout), done.stdout + done.stderr
    assert "times: 3" in (project.root / "params.yaml").read_text()
    assert "5 stages unchanged" in done.stdout  # all stages except the likelihood and the report
    assert "is the first champion" in done.stdout
    assert "Running stage" not in project.run("python", "-m", "dvc", "repro").stdout


def test_the_deployment_runs(project: Any, check_log: Callable[..., list[str]]) -> None:
    ports = {"PREFECT_PORT": str(project.free_port()), "MLFLOW_PORT": str(project.free_port())}
    toml = project.root / "prefect.toml"
    toml.write_text(toml.read_text().replace(":4200/", f":{ports['PREFECT_PORT']}/"))
    up = project.start("python", "-m", "flows.servers.up", log="up.log", **ports)
    log = project.root / "up.log"
    project.wait(lambda: "\nready; " in log.read_text() or up.poll() is not None, 300, "the servers are ready")
    assert up.poll() is None, log.read_text()
    run = ("python", "-m", "prefect", "deployment", "run", "train-eval/default", "--watch")
    done = project.run(*run, "--param", f"overrides={json.dumps(['likelihood.times=4'])}")
    assert done.returncode == 0 and answered(done.stdout), done.stdout + done.stderr + log.read_text()[-3000:]
    assert "times: 4" in (project.root / "dvc.lock").read_text()
    assert not check_log(log)
