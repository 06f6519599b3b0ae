"""Gives the addresses at which the results of a run can be seen."""

from __future__ import annotations

from pathlib import Path

from ddpm.files import paths


def mlflow(root: Path, server: str) -> str:
    """Returns the address of MLflow's page of scores against steps.

    Returns `server` unchanged if this checkout has published nothing yet, or if `server` is no HTTP server.
    """
    chart = root / paths.CHART
    return f"{server.rstrip('/')}/{chart.read_text()}" if server.startswith("http") and chart.exists() else server
