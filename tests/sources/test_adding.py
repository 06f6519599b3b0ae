"""A source is added by adding its file: no other file changes, and existing datasets stay as they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).with_name("toy_source.py")
SHORT = {"steps: 60": "steps: 4", "validate_every: 30": "validate_every: 4", "device: auto": "device: cpu"}


class Checkout:
    """A copy of the code with DVC, and the smoke recipe with four training steps."""

    def __init__(self, root: Path, inception: Path) -> None:
        self.root = root
        shutil.copytree(ROOT / "ddpm", root / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "dvc.yaml", root / "dvc.yaml")
        (root / "images").mkdir()
        (root / ".cache").mkdir()
        (root / ".cache" / "inception").symlink_to(inception)
        recipe = (ROOT / "recipes" / "smoke.yaml").read_text(encoding="utf-8")
        for before, after in SHORT.items():
            assert before in recipe
            recipe = recipe.replace(before, after, 1)
        (root / "params.yaml").write_text(recipe, encoding="utf-8")
        self.dvc("init", "--no-scm", "--quiet")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment |= {"DVC_NO_ANALYTICS": "1"}
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)

    def dvc(self, *arguments: str) -> str:
        done = self.run(sys.executable, "-m", "dvc", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def changed(self, stage: str) -> list[object]:
        """What `dvc status` says of one stage: [] where nothing of it changed."""
        found: list[object] = json.loads(self.dvc("status", "--json", stage)).get(stage, [])
        return found

    def set_source(self, before: str, after: str) -> None:
        path = self.root / "params.yaml"
        text = path.read_text(encoding="utf-8")
        assert f"source: {before}\n" in text
        path.write_text(text.replace(f"source: {before}\n", f"source: {after}\n"), encoding="utf-8")

    def dataset(self) -> dict[str, object]:
        record: dict[str, object] = json.loads((self.root / "dataset" / "dataset.json").read_text(encoding="utf-8"))
        return record


@pytest.fixture
def checkout(tmp_path: Path, inception_cache: Path) -> Checkout:
    return Checkout(tmp_path, inception_cache)


def test_one_file_is_a_source_and_changes_no_existing_dataset(checkout: Checkout) -> None:
    toy = checkout.root / "ddpm" / "sources" / "toy.py"
    checkout.dvc("repro", "prepare")
    lock = (checkout.root / "dvc.lock").read_bytes()
    shutil.copyfile(TOY, toy)
    assert checkout.changed("prepare") == []
    assert "didn't change, skipping" in checkout.dvc("repro", "prepare")
    assert (checkout.root / "dvc.lock").read_bytes() == lock

    checkout.set_source("digits", "toy")
    assert checkout.changed("prepare") != []
    checkout.dvc("repro", "sample@cosine-ddim-2", "evaluate@cosine-ddim-2")
    about = checkout.dataset()
    assert (about["name"], about["classes"], about["counts"]) == ("toy", ["full", "hollow"], {"train": 96, "test": 24})
    scores = json.loads((checkout.root / "metrics" / "cosine-ddim-2.json").read_text(encoding="utf-8"))
    assert np.isfinite(scores["fid"]) and scores["reference"] == about["sha256"]

    # An edit of the toy runs the toy's prepare again. The digits come back from DVC's cache: nothing of their stage changed.
    toy.write_text(toy.read_text(encoding="utf-8") + "# and so on\n", encoding="utf-8")
    assert checkout.changed("prepare") != []
    checkout.set_source("toy", "digits")
    assert "is cached - skipping run" in checkout.dvc("repro", "prepare")
    assert checkout.dataset()["name"] == "digits"


def test_an_unknown_source_is_one_line_that_names_those_there_are(checkout: Checkout) -> None:
    shutil.copyfile(TOY, checkout.root / "ddpm" / "sources" / "toy.py")
    for name in ("imagenet", "decoding", "source", "__init__"):
        checkout.set_source("digits", name)
        done = checkout.run(sys.executable, "-B", "-m", "ddpm", "prepare")
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            f"ddpm: data.source: no '{name}' in ddpm/sources; there are cifar10, digits, fashion_mnist, image_folder, toy"
        ]
        checkout.set_source(name, "digits")
    assert not (checkout.root / "dataset").exists()


def test_dvc_names_the_missing_module_of_an_old_name(checkout: Checkout) -> None:
    """DVC reads params.yaml itself. The verbs and the flow read the old name."""
    checkout.set_source("digits", "image-folder")
    done = checkout.run(sys.executable, "-m", "dvc", "repro", "prepare")
    assert done.returncode != 0 and "ddpm/sources/image-folder.py" in done.stderr
