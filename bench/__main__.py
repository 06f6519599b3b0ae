"""Measures the rows of docs/speed.md on this machine, each in its own process, and rewrites the page.

`python -m bench` measures every row, and `python -m bench NAME ...` the named rows.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys

from bench import page


def _measure(name: str, device: str, threads: int) -> None:
    row = page.ROWS[name]
    os.environ |= {"TQDM_DISABLE": "1", **row.environment}  # set before torch and tqdm read these variables
    import torch

    from bench import harness

    torch.set_num_threads(threads)
    module = importlib.import_module(f"bench.{row.module}")
    result = getattr(module, row.function or name)(device)
    path = harness.write(name, device, threads, result)
    for figure in result["figures"]:
        print(f"  {page.shown(figure)}")
    print(f"  {path.name}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows: {', '.join(page.ROWS)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cpu, and cuda if there is a GPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; default: all cores")
    parser.add_argument("--here", action="store_true", help="measure one row on one device in this process")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in page.ROWS]
    if unknown:
        parser.error(f"unknown row {', '.join(unknown)}; choose from {', '.join(page.ROWS)}")
    if options.here:
        _measure(options.names[0], options.device, options.threads)
        return 0
    import torch

    devices = [options.device] if options.device else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    failed = []
    for name in options.names or page.ROWS:
        for device in devices:
            if device in page.ROWS[name].devices:
                print(f"{name}, {device}", flush=True)
                command = ["--here", "--device", device, "--threads", str(options.threads), name]
                if subprocess.run([sys.executable, "-m", "bench", *command], check=False).returncode:
                    failed.append(f"{name} ({device})")
    page.write()
    if failed:
        print(f"failed (their earlier results are kept): {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
