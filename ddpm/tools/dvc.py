"""Runs DVC, and prints the best point at the end of `dvc repro`, even if no stage had to run.

The command `dvc` of the environment calls this module.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ddpm.errors import InputError
from ddpm.provenance import atomic_lock
from ddpm.runtime.display import SAID_LATER


def main() -> int:
    """Runs the DVC command in sys.argv. The Makefile and the Dockerfile make DVC's console script call this function."""
    if not _makes_the_report(sys.argv[1:]):
        return atomic_lock.main()
    os.environ[SAID_LATER] = "1"
    code = atomic_lock.main()
    root = atomic_lock.pipeline()
    if code == 0 and root:
        from ddpm.reporting.answer import answer

        try:
            lines = answer(root)
        except InputError as error:  # DVC has succeeded, so its exit code stays 0
            lines = [str(error)]
        print("\n".join(lines), flush=True)
    return code


def _makes_the_report(arguments: Sequence[str]) -> bool:
    """Returns whether the command is `dvc repro` of all stages or of the report. Silent runs and dry runs do not count."""
    if "repro" not in arguments or {"-q", "--quiet", "--dry", "-h", "--help"} & set(arguments):
        return False
    targets = [name for name in arguments[arguments.index("repro") + 1 :] if not name.startswith("-")]
    return not targets or "report" in targets
