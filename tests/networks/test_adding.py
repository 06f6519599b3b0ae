"""Checks that a network is added by adding its file: no other file changes, and existing models stay as they are."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)

TOY = Path(__file__).with_name("toy_network.py")
POINT = "cosine-ddim-2"


@pytest.mark.proof
def test_one_file_is_a_network_up_to_its_promotion(copied: Any) -> None:
    toy = copied.root / "ddpm" / "networks" / "toy.py"
    copied.dvc("repro", "train@cosine")
    shutil.copyfile(TOY, toy)
    assert copied.changed("train@cosine") == []
    assert "'train@cosine' didn't change, skipping" in copied.dvc("repro", "train@cosine")

    params = copied.root / "params.yaml"
    text = params.read_text(encoding="utf-8")
    before = re.search(r"network:\n(  .*\n)+", text)[0]  # type: ignore[index]
    params.write_text(text.replace(before, "network:\n  kind: toy\n  width: 4\n"), encoding="utf-8")
    assert copied.changed("train@cosine") != []
    copied.dvc("repro", f"evaluate@{POINT}", "likelihood@cosine")
    record = json.loads((copied.root / "models" / "cosine" / "model.json").read_text(encoding="utf-8"))
    assert record["network"] == {"kind": "toy", "image_channels": 1, "image_size": 8, "width": 4}
    copied.edit("  samplers: [ddpm, ddim]", "  samplers: [ddim]")
    copied.edit("  steps: [2, 5]", "  steps: [2]")
    for verb in (["report"], ["publish"], ["promote"], ["generate", "-n", "4", "--out", "grid.png"], ["card"]):
        done = copied.run(sys.executable, "-B", "-m", "ddpm", *verb)
        assert done.returncode == 0, done.stderr
    assert "kind toy" in (copied.root / "MODEL_CARD.md").read_text(encoding="utf-8")
    (carried,) = copied.root.glob("mlartifacts/**/code/ddpm/networks/toy.py")
    assert carried.read_bytes() == toy.read_bytes()
    assert not carried.with_name("unet.py").exists()

    # An edit of the toy network requires a new training. DVC's cache still has the earlier models.
    toy.write_text(toy.read_text(encoding="utf-8") + "# and so on\n", encoding="utf-8")
    assert copied.changed("train@cosine") != []
    params.write_text(text, encoding="utf-8")
    assert "is cached - skipping run" in copied.dvc("repro", "train@cosine")


@pytest.mark.proof
def test_what_a_network_does_not_take_is_one_line(copied: Any) -> None:
    shutil.copyfile(TOY, copied.root / "ddpm" / "networks" / "toy.py")
    assert copied.run(sys.executable, "-B", "-m", "ddpm", "prepare").returncode == 0
    params = copied.root / "params.yaml"
    text = params.read_text(encoding="utf-8")
    for entries, line in (
        ("kind: toy, width: 0", "network: width = 0 must be 1 or more"),
        ("kind: toy, width: 4, depth: 3", "network: toy takes no depth, only width"),
        ("kind: toy, width: 4, image_size: 16", "network.image_size: is determined by the data and by diffusion"),
        ("kind: none_such", "network.kind: no 'none_such' in ddpm/networks; there are dit, toy, unet"),
    ):
        params.write_text(re.sub(r"network:\n(  .*\n)+", f"network: {{{entries}}}\n", text), encoding="utf-8")
        done = copied.run(sys.executable, "-B", "-m", "ddpm", "train", "cosine")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and line in done.stderr, done.stderr
