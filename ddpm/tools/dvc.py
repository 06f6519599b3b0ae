"""Runs DVC, and says the best point at the end of `dvc repro`, even when nothing had to run: the `dvc` of the environment."""

from __future__ import annotations

import os
import sys

from ddpm.errors import InputError
from ddpm.provenance import atomic_lock
from ddpm.reporting.answer import answer
from ddpm.runtime.display import SAID_LATER


def main() -> int:
    """Runs the DVC command in sys.argv. The Makefile and the Dockerfile point DVC's console script at this function."""
    if "repro" not in sys.argv[1:]:
        return atomic_lock.main()
    os.environ[SAID_LATER] = "1"
    code = atomic_lock.main()
    root = atomic_lock.pipeline()
    if code == 0 and root and _makes_the_report():
        try:
            lines = answer(root)
        except InputError as error:  # DVC has succeeded, so its exit code stays
            lines = [str(error)]
        print("\n".join(lines), flush=True)
    return code


def _makes_the_report() -> bool:
    """Returns whether the command line asks for all stages or for the report, and not for silence or a dry run."""
    from dvc.cli import parse_args

    asked = parse_args(sys.argv[1:])
    return (not asked.targets or "report" in asked.targets) and not asked.dry and not asked.quiet
