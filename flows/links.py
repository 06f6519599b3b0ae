"""Builds the addresses of pages that show the results of a run."""

from __future__ import annotations

from pathlib import Path

from ddpm.databases import mlflow_file, sqlite
from ddpm.databases.mlflow_page import chart
from ddpm.errors import InputError
from ddpm.files import paths
from ddpm.files.params import Params


def mlflow(root: Path, server: str, store: str = "") -> str:
    """Returns the address of MLflow's page of scores against steps.

    Returns `server` unchanged if nothing is published yet, or if `server` is not an HTTP address.

    Args:
        root: the checkout.
        server: the address of MLflow's server.
        store: the address of the server's database, if known. If the database is a SQLite file, the experiment's id is read
            from the file, since a file copied from another checkout has other ids than this checkout recorded.
    """
    if not server.startswith("http"):
        return server
    file, kept = sqlite.file_of(store), root / paths.CHART
    if file and (experiment := mlflow_file.newest_experiment(file, _experiment(root))):
        page = chart(experiment)
    else:
        page = kept.read_text(encoding="utf-8") if kept.exists() else ""
    return f"{server.rstrip('/')}/{page}" if page else server


def _experiment(root: Path) -> str:
    """Returns the name of the experiment of params.yaml, or "" if params.yaml cannot be read."""
    try:
        return f"ddpm-{Params.load(root / 'params.yaml').dataset_name}"
    except InputError:  # MLflow's page works without the name
        return ""
