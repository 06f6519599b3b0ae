"""Checks that a source is added by adding its file: no other file changes, and existing datasets stay as they are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).with_name("toy_source.py")


def test_one_file_is_a_source_and_changes_no_existing_dataset(copied: Any) -> None:
    toy = copied.root / "ddpm" / "sources" / "toy.py"
    copied.dvc("repro", "prepare")
    lock = (copied.root / "dvc.lock").read_bytes()
    shutil.copyfile(TOY, toy)
    assert copied.changed("prepare") == []
    assert "didn't change, skipping" in copied.dvc("repro", "prepare")
    assert (copied.root / "dvc.lock").read_bytes() == lock

    copied.edit("source: digits\n", "source: toy\n")
    assert copied.changed("prepare") != []
    copied.dvc("repro", "prepare")
    about = copied.dataset()
    assert (about["name"], about["classes"], about["counts"]) == ("toy", ["full", "hollow"], {"train": 96, "test": 24})

    # An edit of the toy source reruns its prepare. The digits come back from DVC's cache, since nothing in their stage
    # changed.
    toy.write_text(toy.read_text(encoding="utf-8") + "# and so on\n", encoding="utf-8")
    assert copied.changed("prepare") != []
    copied.edit("source: toy\n", "source: digits\n")
    assert "is cached - skipping run" in copied.dvc("repro", "prepare")
    assert copied.dataset()["name"] == "digits"


@pytest.mark.proof
def test_its_images_are_learned_and_scored(copied: Any) -> None:
    shutil.copyfile(TOY, copied.root / "ddpm" / "sources" / "toy.py")
    copied.edit("source: digits\n", "source: toy\n")
    copied.dvc("repro", "sample@cosine-ddim-2", "evaluate@cosine-ddim-2")
    scores = json.loads((copied.root / "metrics" / "cosine-ddim-2.json").read_text(encoding="utf-8"))
    assert np.isfinite(scores["fid"]) and scores["reference"] == copied.dataset()["sha256"]


def test_an_unknown_source_is_one_line_that_names_those_there_are(copied: Any) -> None:
    shutil.copyfile(TOY, copied.root / "ddpm" / "sources" / "toy.py")
    for name in ("imagenet", "decoding", "source", "__init__"):
        copied.edit("source: digits\n", f"source: {name}\n")
        done = copied.run(sys.executable, "-B", "-m", "ddpm", "prepare")
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            f"ddpm: data.source: no '{name}' in ddpm/sources;"
            " there are cifar10, digits, fashion_mnist, huggingface, image_folder, mnist, toy"
        ]
        copied.edit(f"source: {name}\n", "source: digits\n")
    assert not (copied.root / "dataset").exists()


def test_dvc_names_the_missing_module_of_an_old_name(copied: Any) -> None:
    """DVC reads params.yaml by itself, so it does not know the old name. The verbs and the flow do."""
    copied.edit("source: digits\n", "source: image-folder\n")
    done = copied.run(sys.executable, "-m", "dvc", "repro", "prepare")
    assert done.returncode != 0 and "ddpm/sources/image-folder.py" in done.stderr
