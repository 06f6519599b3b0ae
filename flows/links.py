"""Where to look at what a run left."""

from __future__ import annotations

from pathlib import Path

from ddpm.files import paths


def mlflow(root: Path, server: str) -> str:
    """The page of a server that shows scores against steps; its first page, until something was published in this checkout."""
    chart = root / paths.CHART
    return f"{server.rstrip('/')}/{chart.read_text()}" if server.startswith("http") and chart.exists() else server
