"""Starts `ddpm VERB`.

DVC, torchrun and the Prefect flow call `python -B -m ddpm VERB`, because this form runs the code of the working folder.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs a command. Bytecode is not written: on a full disk Python would leave a damaged .pyc file."""
    sys.dont_write_bytecode = True
    from ddpm.provenance.checkout import missing

    try:
        from ddpm.cli import main as run
    except ModuleNotFoundError as error:
        help_only = sys.argv[1:] in (["-h"], ["--help"])  # `ddpm --help` succeeds even without the extras
        print(f"ddpm: {missing(error)}", file=sys.stdout if help_only else sys.stderr)
        sys.exit(0 if help_only else 2)
    run()


if __name__ == "__main__":
    main()
