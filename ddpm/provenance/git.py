"""Asks git. No other module of the packages calls it."""

from __future__ import annotations

import subprocess
from pathlib import Path

PATIENCE = 10.0  # seconds that git may take for what only describes a run


def ask(folder: Path, *arguments: str, patience: float | None = None) -> bytes | None:
    """Returns what git prints in that folder; None where git is not installed, refuses, or takes more than `patience` seconds."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, timeout=patience, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def line(folder: Path, *arguments: str, patience: float | None = None) -> str | None:
    """Returns what git prints in that folder as text, without the spaces around it; None as ask() does."""
    answer = ask(folder, *arguments, patience=patience)
    return None if answer is None else answer.decode("utf-8", "replace").strip()


def head(folder: Path) -> str | None:
    """The commit that is checked out; None where there is none."""
    return line(folder, "rev-parse", "HEAD")
