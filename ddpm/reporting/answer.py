"""Words the end of a run: the report's best point, the place of its page, and the commands that help next."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ddpm.files import paths
from ddpm.files.params import Params
from ddpm.files.scores import read_best
from ddpm.provenance.project import mlflow_command

MOST = 4  # next steps


def answer(root: Path = Path(), *, promoted: bool = False, mlflow: str = "") -> list[str]:
    """Returns the last lines of a run's output; [] if there is no report.

    Args:
        root: the checkout or project.
        promoted: whether `ddpm promote` has just decided about the best point.
        mlflow: the address of the MLflow server that runs beside the flow; "" without a server.

    Raises:
        InputError: report/best.json or params.yaml is damaged.
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
    """Returns the commands that help next, with their purposes, the most useful first."""
    steps = []
    own = root / ".venv"
    if not mlflow and own.exists() and own.samefile(sys.prefix) and os.environ.get("VIRTUAL_ENV") != sys.prefix:
        steps.append((". .venv/bin/activate", "then, in this shell:"))
    images = (
        "images from the champion"
        if promoted
        else "images from the champion, or without a champion from the best point"
    )
    steps.append(("ddpm generate -n 64 --out grid.png", images))
    if not promoted:
        steps.append(("ddpm promote", "registers the best point, which becomes the champion if it wins"))
    if look := mlflow or mlflow_command(root):
        steps.append((look, "the runs, charts and models in MLflow"))
    if params := Params.find(root / "params.yaml"):
        twice = 2 * params.training.steps  # a smaller number would start a new training
        steps.append(
            (f"ddpm run training.steps={twice}", "continues the training, and runs only the stages that depend on it")
        )
    return steps[:MOST]
