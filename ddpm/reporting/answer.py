"""Words the end of a run: the best point of the report, where its page is, and the commands that help next."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ddpm.files import paths
from ddpm.files.scores import read_best

MOST = 4  # next steps


def answer(root: Path = Path(), *, promoted: bool = False, mlflow: str = "") -> list[str]:
    """Returns the lines that end a run; [] if there is no report.

    Args:
        root: the checkout or project.
        promoted: whether `ddpm promote` has just decided about the best point.
        mlflow: the address of the MLflow server that runs beside the flow; "" if none does.

    Raises:
        InputError: report/best.json is damaged.
    """
    folder = (root / paths.report_dir()).resolve()
    if not (folder / "best.json").exists():
        return []
    page = folder / "index.html"
    shown = page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page
    steps = _next_steps(root, promoted, mlflow)
    width = max(len(command) for command, _ in steps)
    lines = [f"  {command.ljust(width)}   {purpose}" for command, purpose in steps]
    return [read_best(root).line, f"report: {shown}", "next:", *lines]


def _next_steps(root: Path, promoted: bool, mlflow: str) -> list[tuple[str, str]]:
    """Returns the commands that help here, with their purposes, the most useful first."""
    steps = []
    own = root / ".venv"
    if not mlflow and own.exists() and own.samefile(sys.prefix) and os.environ.get("VIRTUAL_ENV") != sys.prefix:
        steps.append((". .venv/bin/activate", "then, in this shell:"))
    images = (
        "images from the champion" if promoted else "images from the best point, or from the champion if there is one"
    )
    steps.append(("ddpm generate -n 64 --out grid.png", images))
    if not promoted:
        steps.append(("ddpm promote", "registers the best point, which becomes the champion if it wins"))
    look = "make ui" if (root / "Makefile").exists() else "python -m flows.servers.up mlflow"
    steps.append((mlflow or look, "the runs, charts and models in MLflow"))
    steps.append(("ddpm run training.steps=1600", "sets a value of params.yaml and runs only what depends on it"))
    return steps[:MOST]
