"""The whole road on real digits: the smoke recipe in a clone, through the flow, then DVC and the flow again."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, scratch_maker: Callable[[Path, Path], Any]) -> Iterator[Any]:
    """What git would clone, with the changes that are not committed yet."""
    source, root = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("clone")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    subprocess.run(["git", "init", "--quiet"], cwd=source, check=True)
    made = scratch_maker(root, source)
    made.environment["PYTHONPATH"] = os.fspath(root)  # the code of the clone, not the one that is installed
    yield made
    made.end()


def test_data_to_champion(clone: Any) -> None:
    done = clone.run(sys.executable, "-m", "flows", "--recipe", "smoke")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    with (clone.root / "report" / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    best = min(rows, key=lambda row: (float(row["fid"]), int(row["evaluations"])))["point"]
    assert f"{best} is the first champion" in done.stdout
    assert (clone.root / "report" / "samples.png").stat().st_size > 1000
    assert not clone.running()


def test_then_neither_dvc_nor_the_flow_has_anything_to_do(clone: Any) -> None:
    assert "Running stage" not in clone.repro()
    lock = (clone.root / "dvc.lock").read_bytes()
    done = clone.run(sys.executable, "-m", "flows")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    stages = len(YAML(typ="safe").load(lock)["stages"])
    assert f"{stages} stages unchanged" in done.stdout
    assert "is champion already" in done.stdout
    assert (clone.root / "dvc.lock").read_bytes() == lock


def test_the_champion_makes_images(clone: Any) -> None:
    from PIL import Image

    done = clone.run("ddpm", "generate", "--model", "models:/ddpm-digits@champion", "-n", "9", "--out", "grid.png")
    assert done.returncode == 0, done.stderr
    with Image.open(clone.root / "grid.png") as picture:
        assert picture.width == picture.height > 9
        assert len(picture.getcolors(maxcolors=256) or ()) > 10
