"""`python docs/draw_architecture.py`: draws docs/architecture.svg from the import graph and the layers of pyproject.toml.

A box is a room (a folder) or a module at the top. Rooms import only what lies below them. A test draws the picture again and
compares.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import grimp
import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
HEIGHT, WIDTH, GAP = 0.62, 10.0, 0.12  # of a layer, of the picture, between boxes


def layers(package: str) -> list[list[str]]:
    """The rooms of a package, layer by layer, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (found,) = (c["layers"] for c in contracts if c.get("containers") == [package])
    return [re.split(r" [|:] ", layer) for layer in found]


def modules_of(graph: Any, room: str) -> set[str]:
    return {room, *graph.find_descendants(room)} & graph.modules


def about(room: str, graph: Any) -> str:
    """The number of modules and lines of a room."""
    files = [ROOT.joinpath(*name.split(".")) for name in modules_of(graph, room)]
    paths = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in files]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    return f"{len(paths)} modules, {lines:,} lines" if len(paths) > 1 else f"{lines:,} lines"


def boxes(package: str, top: float) -> dict[str, tuple[float, float, float]]:
    """The left edge, the bottom and the width of each room."""
    found = {}
    for row, names in enumerate(layers(package)):
        width = (WIDTH - GAP * (len(names) - 1)) / len(names)
        for column, name in enumerate(names):
            found[f"{package}.{name}"] = (column * (width + GAP), top - (row + 1) * HEIGHT, width)
    return found


def draw() -> str:
    """The picture as SVG, the same for the same sources."""
    graph = grimp.build_graph("ddpm", "flows", exclude_type_checking_imports=True, cache_dir=None)
    rows = len(layers("flows")) + len(layers("ddpm"))
    at = boxes("flows", (rows + 0.6) * HEIGHT) | boxes("ddpm", len(layers("ddpm")) * HEIGHT)
    figure = Figure(figsize=(10, (rows + 0.8) * HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1, WIDTH + 0.1), ylim=(-0.1, (rows + 0.7) * HEIGHT))
    axes.axis("off")
    for name, (left, bottom, width) in at.items():
        colour = "#e8eef7" if name.startswith("ddpm") else "#fdf1e0"
        box = matplotlib.patches.Rectangle((left, bottom + 0.05), width, HEIGHT - 0.1)
        box.set(facecolor=colour, edgecolor="#8899aa")
        axes.add_patch(box)
        axes.text(left + 0.1, bottom + HEIGHT * 0.6, name.replace(".", "/"), fontsize=9, weight="bold", va="center")
        imported = {
            room
            for room in at
            if room != name
            and any(
                graph.direct_import_exists(importer=a, imported=b)
                for a in modules_of(graph, name)
                for b in modules_of(graph, room)
            )
        }
        shown = ", ".join(
            sorted(room.removeprefix("ddpm.") for room in imported if not room.endswith((".errors", ".rooms")))
        )
        text = f"{about(name, graph)}" + (f" → {shown}" if shown and width > WIDTH / 2 else "")
        axes.text(
            left + 0.1, bottom + HEIGHT * 0.28, text[: int(width * 15)], fontsize=6.5, va="center", color="#445566"
        )
    from io import StringIO

    written = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ddpm", "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT), file=sys.stderr)
