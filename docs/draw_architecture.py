"""`python docs/draw_architecture.py`: draws docs/architecture.svg from the import graph and the layers of pyproject.toml.

A box is a room (a folder) or a top-level module. Its text says what belongs there, and which rooms it imports. All imported
rooms lie below the box. A test draws the picture again and compares.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import textwrap
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
HEIGHT, WIDTH, GAP = 0.78, 11.0, 0.12  # in inches: of a layer, of the picture, between boxes
LETTERS = 16.5  # letters of the small font per inch
COLOURS = {"flows": "#fdf1e0", "ddpm": "#e8eef7"}
SHARED = ("ddpm.errors", "ddpm.rooms")  # which nearly every room imports


@cache
def graph() -> Any:
    return grimp.build_graph("ddpm", "flows", exclude_type_checking_imports=True, cache_dir=None)


def layers(package: str) -> list[list[str]]:
    """The rooms of a package, layer by layer, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (found,) = (contract["layers"] for contract in contracts if contract.get("containers") == [package])
    return [[f"{package}.{name}" for name in re.split(r" [|:] ", layer)] for layer in found]


def purpose(room: str) -> str:
    """The first sentence of a room's docstring."""
    path = ROOT.joinpath(*room.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    said = " ".join((ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"(?<=\.) |: \w", said, maxsplit=1)[0].rstrip(".").replace("`", "")


def imported(room: str, rooms: list[str]) -> list[str]:
    """The rooms that the modules of `room` import."""
    own = {room, *graph().find_descendants(room)}
    found = {name for module in own for name in graph().find_modules_directly_imported_by(module)} - own
    return [other for other in rooms if any(name == other or name.startswith(f"{other}.") for name in found)]


def draw() -> str:
    """Returns the picture as SVG, the same for the same sources."""
    rows = [*layers("flows"), *layers("ddpm")]
    rooms = [room for row in rows for room in row]
    figure = Figure(figsize=(WIDTH + 0.2, len(rows) * HEIGHT + 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1, WIDTH + 0.1), ylim=(-0.1, len(rows) * HEIGHT + 0.1))
    axes.axis("off")
    for number, row in enumerate(rows):
        width, bottom = (WIDTH - GAP * (len(row) - 1)) / len(row), (len(rows) - 1 - number) * HEIGHT
        for column, room in enumerate(row):
            left = column * (width + GAP)
            colour = COLOURS[room.partition(".")[0]]
            axes.add_patch(
                Rectangle((left, bottom + 0.04), width, HEIGHT - 0.08, facecolor=colour, edgecolor="#8899aa")
            )
            axes.text(left + 0.1, bottom + HEIGHT - 0.2, room.replace(".", "/"), fontsize=9, weight="bold", va="center")
            others = [other.removeprefix("ddpm.") for other in imported(room, rooms) if other not in SHARED]
            lines = [purpose(room), f"imports {', '.join(others)}" if others else "imports no other room"]
            for place, line in enumerate(lines):
                short = textwrap.shorten(line, int(width * LETTERS), placeholder=" …")
                axes.text(left + 0.1, bottom + 0.32 - 0.16 * place, short, fontsize=7, va="center", color="#334455")
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ddpm", "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT), file=sys.stderr)
