"""Writes the last lines of a run: the report's best point, the path of the report page, and useful next commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ddpm.files import paths
from ddpm.files.params import Params
from ddpm.files.scores import read_best
from ddpm.provenance.project import mlflow_command

MOST_STEPS = 4  # the largest number of next commands


def answer(root: Path = Path(), *, promoted: bool = False, mlflow: str = "") -> list[str]:
    """Returns the last lines of a run's output; [] without a report.

    Args:
        root: the top of the checkout or project.
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
    """Returns useful next commands with their purposes, the most useful command first."""
    steps = []
    environment = root / ".venv"
    if (
        not mlflow
        and environment.exists()
        and environment.samefile(sys.prefix)
        and os.environ.get("VIRTUAL_ENV") != sys.prefix
    ):
        steps.append((". .venv/bin/activate", "makes the commands below available in this shell"))
    images = (
        "draws images with the champion"
        if promoted
        else "draws images with the champion, or with the best point if there is no champion"
    )
    steps.append(("ddpm generate -n 64 --out grid.png", images))
    if not promoted:
        steps.append(("ddpm promote", "compares the best point with the champion, and makes the winner the champion"))
    if look := mlflow or mlflow_command(root):
        steps.append((look, "shows the runs, charts and models in MLflow"))
    if params := Params.find(root / "params.yaml"):
        twice = 2 * params.training.steps  # fewer steps would resume from an older saved state, or start again
        steps.append(
            (f"ddpm run training.steps={twice}", "continues the training, and reruns only the stages that depend on it")
        )
    return steps[:MOST_STEPS]
