"""Asks git. No other module of the packages calls it."""

from __future__ import annotations

import subprocess
from pathlib import Path

PATIENCE = 10.0  # seconds that git may take


def ask(folder: Path, *arguments: str) -> bytes | None:
    """Returns what git prints in that folder; None where git is not installed, is too slow, or refuses."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, timeout=PATIENCE, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def line(folder: Path, *arguments: str) -> str | None:
    """Returns what git prints in that folder as text, without the spaces around it; None as ask() does."""
    answer = ask(folder, *arguments)
    return None if answer is None else answer.decode("utf-8", "replace").strip()


def head(folder: Path) -> str | None:
    """The commit that is checked out; None where there is none."""
    return line(folder, "rev-parse", "HEAD")
