"""Checks that docs/tour.ipynb runs from top to bottom, and that its committed outputs are complete."""

from __future__ import annotations

import json
import re
import runpy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS / "tour.ipynb"
FIGURES = [0, 1, 1, 1, 1, 1, 1]  # number of figures of each code cell
ROW = re.compile(r"(\w+) +(.*)")


def outputs(notebook: Any) -> list[list[Any]]:
    return [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]


def figures(notebook: Any) -> list[int]:
    return [sum("image/png" in output.get("data", {}) for output in cell) for cell in outputs(notebook)]


def distances(notebook: Any) -> dict[str, dict[int, float]]:
    """Returns the printed distance to the exact images, by sampler and number of network evaluations."""
    text = "".join(chain.from_iterable(output.get("text", []) for output in outputs(notebook)[-1]))
    rows = (ROW.fullmatch(line) for line in text.splitlines())
    pattern = re.compile(r"(\d+) evaluations: (\d+\.\d+)")
    return {row[1]: {int(n): float(far) for n, far in pattern.findall(row[2])} for row in rows if row}


def assert_sound(notebook: Any) -> None:
    assert figures(notebook) == FIGURES
    assert not [output for cell in outputs(notebook) for output in cell if output.get("name") == "stderr"]
    found = distances(notebook)
    assert list(found) == ["ddim", "heun", "dpmpp_2m", "unipc"]
    for name, by_count in found.items():
        values = list(by_count.values())
        assert values == sorted(values, reverse=True), name  # more steps come nearer to the exact images
    for name in ("dpmpp_2m", "unipc"):
        assert found[name][20] < 0.7 * found["ddim"][20] and found[name][40] < 0.5 * found["ddim"][40]


def test_the_committed_outputs_are_whole_and_say_nothing_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    notebook = json.loads(text)
    assert_sound(notebook)
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert all(not cell["metadata"] for cell in notebook["cells"])  # nbclient would write times into the metadata


@pytest.mark.proof
def test_the_tour_runs() -> None:
    pytest.importorskip("nbclient", reason="the extra `notebook` is not installed")
    assert_sound(runpy.run_path(str(DOCS / "run_tour.py"))["executed"]())
