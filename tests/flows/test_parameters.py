from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from ddpm.errors import InputError
from ddpm.files.params import Params
from flows import parameters

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    text = (ROOT / "recipes" / "digits.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "seven.yaml").write_text(text.replace("seed: 0", "seed: 7 # lucky"))
    return tmp_path


def test_overrides_change_their_values_and_not_one_other_character(checkout: Path) -> None:
    before = (checkout / "params.yaml").read_text().splitlines()
    overrides = ["training.steps=7", "sweep.steps=[3, 5]", "training.learning_rate=1e-3", "samplers.ddim.eta=0.5"]
    params = parameters.write(checkout, overrides=overrides)
    after = (checkout / "params.yaml").read_text().splitlines()

    assert (params.training.steps, params.sweep.steps, params.samplers["ddim"].eta) == (7, (3, 5), 0.5)
    assert params.training.learning_rate == 1e-3
    assert params == Params.load(checkout / "params.yaml")
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 4
    assert all(old.partition(":")[0] == new.partition(":")[0] for old, new in changed)
    assert all(old.partition("#")[2] == new.partition("#")[2] for old, new in changed)


def test_null_stays_null(checkout: Path) -> None:
    parameters.write(checkout, overrides=["data.channels=3"])
    raw = YAML(typ="safe").load((checkout / "params.yaml").read_text())
    assert raw["data"]["channels"] == 3
    assert raw["data"]["size"] is None
    assert "size: null" in (checkout / "params.yaml").read_text()


def test_a_recipe_replaces_the_file_as_it_is(checkout: Path) -> None:
    assert parameters.write(checkout, "seven").seed == 7
    assert (checkout / "params.yaml").read_bytes() == (checkout / "recipes" / "seven.yaml").read_bytes()
    assert parameters.write(checkout, "recipes/seven.yaml", ["seed=8"]).seed == 8


def test_what_a_recipe_takes_the_place_of_is_not_lost(checkout: Path) -> None:
    path, said = checkout / "params.yaml", list[str]()
    for number, name in enumerate(("params.yaml.before", "params.yaml.before-2"), 1):
        path.write_text(f"# Mine, {number}\n{path.read_text()}")
        mine = path.read_bytes()
        parameters.write(checkout, "seven", say=said.append)
        assert said.pop() == f"params.yaml: now recipes/seven.yaml (the old file is {name})"
        assert (checkout / name).read_bytes() == mine
    kept = (checkout / "params.yaml.before").read_bytes()
    path.write_bytes(kept)
    parameters.write(checkout, "seven", say=said.append)  # replaces the same file once more
    assert said.pop() == "params.yaml: now recipes/seven.yaml (the old file is params.yaml.before)"

    for overrides in (["seed=8"], ["seed=9"], []):  # files that a recipe or overrides wrote are not kept
        parameters.write(checkout, "seven", overrides, said.append)
        assert said.pop() == f"params.yaml: now recipes/seven.yaml{', with overrides' * bool(overrides)}"
    parameters.write(checkout, "seven", say=said.append)
    assert not said
    assert len(list(checkout.glob("params.yaml.before*"))) == 2

    parameters.write(checkout, "seven", ["seed=8"])
    parameters.write(checkout, overrides=["training.steps=7"], say=said.append)
    assert said.pop() == "params.yaml: now with training.steps=7"
    parameters.write(checkout, "seven", say=said.append)
    assert said.pop() == "params.yaml: now recipes/seven.yaml"
    assert len(list(checkout.glob("params.yaml.before*"))) == 2


def test_what_overrides_change_is_not_lost(checkout: Path) -> None:
    path, said = checkout / "params.yaml", list[str]()
    path.write_text(f"# Mine\n{path.read_text()}")
    mine = path.read_bytes()
    for number in (7, 8, 9):
        parameters.write(checkout, overrides=[f"seed={number}", "training.steps=5"], say=said.append)
    assert said[0] == "params.yaml: now with seed=7, training.steps=5 (the old file is params.yaml.before)"
    assert said[1:] == [f"params.yaml: now with seed={number}, training.steps=5" for number in (8, 9)]
    assert (checkout / "params.yaml.before").read_bytes() == mine
    path.write_text(path.read_text().replace("# Mine\n", "# Still mine\n"))
    parameters.write(checkout, overrides=["seed=1"], say=said.append)
    assert said[-1].endswith("(the old file is params.yaml.before-2)")


def test_what_git_has_is_not_kept_beside_it(checkout: Path) -> None:
    said = list[str]()
    for command in ("init --quiet", "add params.yaml", "-c user.name=a -c user.email=a commit --quiet -m a"):
        subprocess.run(["git", *command.split()], cwd=checkout, check=True)
    parameters.write(checkout, "seven", say=said.append)
    assert said == ["params.yaml: now recipes/seven.yaml"]
    assert not list(checkout.glob("params.yaml.before*"))


def test_the_same_parameters_are_not_written_again(checkout: Path) -> None:
    before = (checkout / "params.yaml").stat()
    parameters.write(checkout)
    after = (checkout / "params.yaml").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_name_of_another_source_is_refused_before_anything_runs(checkout: Path) -> None:
    recipe = checkout / "recipes" / "seven.yaml"
    recipe.write_text(recipe.read_text() + "tracking: {name: cifar10}\n")
    with pytest.raises(InputError, match=r"cifar10 is the name of another source, but data\.source is digits"):
        parameters.write(checkout, "seven")


@pytest.mark.parametrize("overrides", [[], ["data.source=image-folder"]])
def test_an_old_name_of_a_source_is_rewritten(checkout: Path, overrides: list[str]) -> None:
    """dvc.yaml takes the module of the source from params.yaml. So the file itself must contain the module's name."""
    path, said = checkout / "params.yaml", list[str]()
    shutil.copy(ROOT / "dvc.yaml", checkout)
    text = path.read_text()
    if not overrides:
        path.write_text(text.replace("source: digits", "source: image-folder"))
    assert parameters.write(checkout, None, overrides, said.append).data.source == "image_folder"
    assert path.read_text() == text.replace("source: digits", "source: image_folder")
    words = "with data.source=image-folder" if overrides else "with the entries that dvc.yaml takes from it"
    assert said == [f"params.yaml: now {words} (the old file is params.yaml.before)"]
    parameters.write(checkout, say=said.append)
    assert len(said) == 1


def test_a_section_that_a_stage_reads_is_added_to_an_old_file(checkout: Path) -> None:
    path = checkout / "params.yaml"
    shutil.copy(ROOT / "dvc.yaml", checkout)
    text = path.read_text()
    path.write_text(re.sub("report:\n  margin: 0.05.*\n", "", text))
    assert path.read_text() != text
    (checkout / ".dvc").mkdir()
    refused = subprocess.run(["dvc", "repro"], cwd=checkout, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert (
        'params.yaml lacks the sections report, which dvc.yaml needs; add `report: {"margin": 0.05}`' in refused.stderr
    )
    parameters.write(checkout)
    assert YAML(typ="safe").load(path.read_text()) == YAML(typ="safe").load(text)


@pytest.mark.parametrize(
    ("recipe", "overrides", "named"),
    [
        (None, ["training.step=7"], "training.step"),
        (None, ["nowhere.at.all=7"], "nowhere.at.all"),
        (None, ["seed.deep=1"], "seed.deep"),
        (None, ["training.steps"], "KEY=VALUE"),
        (None, ["training.steps=-1"], "training.steps"),
        (None, ["training.steps=1.5"], "training.steps"),
        (None, ["training.steps=[1"], "training.steps=[1"),
        (None, ["training=3"], "training"),
        (None, ["seed=1", "sweep.samplers=[none_such]"], "none_such"),
        (None, ["data.source=imagenet"], "data.source: no 'imagenet' in ddpm/sources; there are cifar10, digits,"),
        ("eight", [], "seven"),
        ("a" * 5000, [], "seven"),
        ("eight\0", [], "seven"),
    ],
)
def test_wrong_input_is_one_line_and_changes_nothing(
    checkout: Path, recipe: str | None, overrides: list[str], named: str
) -> None:
    before = (checkout / "params.yaml").read_bytes()
    with pytest.raises(InputError) as caught:
        parameters.write(checkout, recipe, overrides)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (checkout / "params.yaml").read_bytes() == before
    assert sorted(path.name for path in checkout.iterdir()) == ["params.yaml", "recipes"]


def test_edits_are_named_once_they_mean_something(checkout: Path) -> None:
    path = checkout / "params.yaml"
    look = parameters.edits(checkout, Params.load(path))
    assert look() == ""
    text = path.read_text()
    path.write_text(text + "# a remark\n")
    assert look() == ""
    path.write_text(text.replace("seed: 0", "seed: 7").replace("eta: 0.0", "eta: 0.25", 1))
    assert look() == "seed, samplers.ddim.eta"
    path.write_text("seed: [")
    assert look() == "all of it"
