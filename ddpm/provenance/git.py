"""Calls git. No other module of ddpm or flows calls git."""

from __future__ import annotations

import subprocess
from pathlib import Path

PATIENCE = 10.0  # the seconds that git may take to describe a run


def ask(folder: Path, *arguments: str, patience: float | None = None) -> bytes | None:
    """Returns the output of git in `folder`, or None if git is missing, fails, or takes more than `patience` seconds."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, timeout=patience, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def line(folder: Path, *arguments: str, patience: float | None = None) -> str | None:
    """Returns the output of git as stripped text, or None if `ask` returns None."""
    answer = ask(folder, *arguments, patience=patience)
    return None if answer is None else answer.decode("utf-8", "replace").strip()


def head(folder: Path) -> str | None:
    """Returns the commit that is checked out, or None."""
    return line(folder, "rev-parse", "HEAD")
