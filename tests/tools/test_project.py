"""Checks that `ddpm init` makes a project that runs the installed package's stages, and notices a changed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from ddpm.cli import app
from ddpm.errors import InputError
from ddpm.provenance import code
from ddpm.provenance.project import NAME
from ddpm.tools import project

ROOT = Path(__file__).parents[2]
GIT = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PYTHONPATH"))}


def read(text: str) -> Any:
    return YAML(typ="safe").load(text)


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**GIT, "PATH": path, "DVC_NO_ANALYTICS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def dvc(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the DVC that pip installs, not the one of a checkout's environment."""
    return run(folder, sys.executable, "-m", "dvc", *arguments, **environment)


def test_the_stages_of_a_project_are_those_of_the_package_but_for_the_code() -> None:
    text = (ROOT / "dvc.yaml").read_text()
    own, made, hashes = read(text), read(project.wiring(text)), project.hashes(text)
    for name, stage in made["stages"].items():
        *params, by_file = stage["params"]
        assert not any(path.startswith("ddpm/") for path in stage["deps"])
        named = [path for path in own["stages"][name]["deps"] if path.startswith("ddpm/")]
        rows = [f"rows.{path.removesuffix('.py')}" for path in named if "${" in path]
        assert by_file == {NAME: [f"stages.{name}", *rows]} and name in hashes["stages"]
        stage["deps"] = [*stage["deps"], *named]
        stage["params"] = params
        own["stages"][name].setdefault("params", [])
        for room in code.rooms(f"ddpm.stages.{name}"):
            assert f"rows.{room.package.replace('.', '/')}/${{{room.key}}}" in rows
            assert {f"{room.package.replace('.', '/')}/{row}" for row in room} <= set(hashes["rows"])
    for stage in (*own["stages"].values(), *made["stages"].values()):
        stage["deps"].sort()
    assert made == own


def test_a_project_has_all_that_a_run_needs(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    said = CliRunner().invoke(app, ["init", str(folder), "--recipe", "smoke"]).output.splitlines()
    assert said[:3] == [f"{folder}: created a project with the recipe smoke", "next:", f"  cd {folder}"]
    assert (folder / "params.yaml").read_bytes() == (ROOT / "recipes" / "smoke.yaml").read_bytes()
    recipes = {path.name for path in (ROOT / "recipes").glob("*.*")}  # includes scripts that make the data of a recipe
    assert "emoji.py" in recipes
    assert {path.name for path in (folder / "recipes").iterdir()} == recipes
    assert read((folder / "prefect.yaml").read_text())["deployments"][0]["entrypoint"] == "flows.train_eval.train_eval"
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    waiting = dvc(folder, "status")
    assert waiting.returncode == 0 and "report:" in waiting.stdout, waiting.stderr
    assert run(folder, "git", "check-ignore", "dataset", "models", "report", ".cache").returncode == 0
    assert run(folder, "git", "check-ignore", NAME).returncode == 1  # the file belongs into the commit
    # A second `ddpm init`, here or in a folder with files, overwrites nothing.
    again = CliRunner().invoke(app, ["init", str(folder)]).exception
    assert isinstance(again, InputError) and "run `ddpm init --update`" in str(again)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "params.yaml").write_text("of somebody")
    for arguments in (["other"], ["new", "--recipe", "none"], ["other/params.yaml"], ["other", "--update"]):
        error = CliRunner().invoke(app, ["init", str(tmp_path / arguments[0]), *arguments[1:]]).exception
        assert isinstance(error, InputError) and "\n" not in str(error), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other"]
    assert [path.read_text() for path in (tmp_path / "other").iterdir()] == ["of somebody"]


def test_a_project_may_be_a_folder_of_a_repository(tmp_path: Path) -> None:
    assert run(tmp_path, "git", "init", "--quiet").returncode == 0
    (tmp_path / ".gitignore").write_text("ignored/\n")
    with pytest.raises(InputError, match=r"`dvc init` failed: .*ignored by your SCM tool"):
        project.init(tmp_path / "ignored", "smoke")
    said = project.init(tmp_path / "with space", "smoke")
    assert f"  cd '{tmp_path}/with space'" in said
    project.init(tmp_path / "part", "smoke")
    assert not (tmp_path / "part" / ".git").exists() and (tmp_path / "part" / ".dvc").is_dir()
    assert dvc(tmp_path / "part", "status").returncode == 0


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Creates a folder with a copy of the packages, as pip installs them."""
    for name in ("ddpm", "flows"):
        shutil.copytree(ROOT / name, tmp_path / "site" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


def test_a_changed_package_is_refused_until_the_project_is_updated(site: Path, tmp_path: Path) -> None:
    folder, installed = tmp_path / "project", {"PYTHONPATH": str(site)}
    ddpm = (sys.executable, "-B", "-m", "ddpm")
    assert run(tmp_path, *ddpm, "init", "project", "--recipe", "smoke", **installed).returncode == 0

    def edit(name: str) -> None:
        with (site / name).open("a") as file:
            file.write("# edited\n")

    def changed() -> set[str]:
        """Returns the stages whose code differs from dvc.lock.

        Only one stage ran here, because a stage that never ran differs in everything.
        """
        status = json.loads(dvc(folder, "status", "--json", "prepare", **installed).stdout)
        return set(status)

    done = dvc(folder, "repro", "prepare", **installed)
    assert done.returncode == 0, done.stderr
    assert (folder / "dataset" / "dataset.json").exists() and changed() == set()
    edit("ddpm/stages/prepare.py")
    refusal = f"ddpm: {NAME}: made with ddpm "
    done = dvc(folder, "repro", "--force", "prepare", **installed)
    assert done.returncode != 0 and done.stderr.count(refusal) == 1 and "run `ddpm init --update` here" in done.stderr
    flow = run(folder, *ddpm, "run", **installed)
    assert flow.returncode == 2 and flow.stderr.startswith(f"train-eval: {NAME}: made with ddpm "), flow.stderr
    assert flow.stderr.count("\n") == 1 and not (folder / ".prefect").exists()
    before = (folder / NAME).read_text()
    update = run(folder, *ddpm, "init", "--update", **installed)
    assert "stages whose code changed: prepare" in update.stdout, update.stderr
    assert changed() == {"prepare"}
    assert dvc(folder, "repro", "prepare", **installed).returncode == 0
    # An edit of code that no stage runs, or of a row that params.yaml does not select, changes no stage.
    for name in ("ddpm/tracking/runs.py", "ddpm/sources/cifar10.py"):
        edit(name)
    assert (
        "stages whose code changed: ddpm/sources/cifar10" in run(folder, *ddpm, "init", "--update", **installed).stdout
    )
    assert (folder / NAME).read_text() != before and changed() == set()
    edit("ddpm/sources/digits.py")
    assert run(folder, *ddpm, "init", "--update", **installed).returncode == 0
    assert changed() == {"prepare"}
    # An edited dvc.yaml belongs to the user, and is not overwritten.
    with (folder / "dvc.yaml").open("a") as file:
        file.write("# mine\n")
    update = run(folder, *ddpm, "init", "--update", **installed)
    assert update.returncode == 2 and update.stderr.startswith(
        "ddpm: dvc.yaml: was edited, so it is not replaced; move it away"
    )


def test_a_package_that_changes_while_a_stage_runs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm.provenance import inputs

    project.init(tmp_path, "smoke")
    monkeypatch.setenv("DVC_STAGE", "prepare")
    installed = code.hashes()
    with inputs.unchanged("prepare", tmp_path):
        pass
    some = next(iter(installed))
    with pytest.raises(InputError, match=r"ddpm\.json: made with"), inputs.unchanged("prepare", tmp_path):
        monkeypatch.setattr(code, "hashes", lambda: {**installed, some: "0" * 64})
    # The project was updated in the meantime, but the process still runs the old code.
    monkeypatch.setattr(code, "hashes", lambda: installed)
    with pytest.raises(InputError, match=r"ddpm\.json: made with"), inputs.unchanged("prepare", tmp_path):
        monkeypatch.setattr(code, "hashes", lambda: {**installed, some: "0" * 64})
        project.update(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["training.stops=1"], "train-eval: override 'training.stops=1': params.yaml has no 'training.stops'"),
        (["training.steps"], "train-eval: override 'training.steps': expected KEY=VALUE, such as training.steps=200"),
        (["seed=1", "--recipe", "none"], "train-eval: recipe 'none': neither a file nor one of smoke"),
    ],
)
def test_what_ddpm_run_cannot_set_is_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    for name in ("params.yaml", "recipes/smoke.yaml"):
        shutil.copy(ROOT / "recipes" / "smoke.yaml", tmp_path / name)
    done = run(tmp_path, sys.executable, "-m", "ddpm", "run", *arguments)
    assert (done.returncode, done.stderr) == (2, f"{says}\n")
