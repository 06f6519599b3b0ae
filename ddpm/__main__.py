"""`python -B -m ddpm VERB`, by which DVC, torchrun and the flow run the code of the folder that they work in; and `ddpm VERB`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs a verb. Nothing is written beside the sources: a full disk would leave half of it."""
    sys.dont_write_bytecode = True
    from ddpm.provenance.checkout import missing

    try:
        from ddpm.cli import main as run
    except ModuleNotFoundError as error:
        print(f"ddpm: {missing(error)}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
