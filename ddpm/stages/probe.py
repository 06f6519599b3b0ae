"""`probe`: finds out what `auto` means on this machine, and writes it to auto.json for all trainings and samplings of the sweep.

`train` and `sample` depend on the values in auto.json, not on the machine. So the points of a sweep never mix values, and
another host that gets auto.json from DVC uses the same values. DVC runs this stage once, and again with `--force`.
"""

from __future__ import annotations

from pathlib import Path

from ddpm.files import paths, records
from ddpm.files.params import Params
from ddpm.parameters import AUTO, Auto, as_json
from ddpm.runtime import compiling
from ddpm.runtime.device import find_device
from ddpm.runtime.progress import Progress, Report, silent


def probe(params: Params, root: Path = Path(), report: Report = silent) -> Auto:
    """Writes auto.json and returns its content: the fastest values for `compute.device`. Raises InputError."""
    found, reason = compiling.probe(find_device(params.compute.device))
    report(Progress(0, 0, "", message=f"{AUTO} means {found}: {reason}"))
    records.write_record(root / paths.auto_file(), as_json(found))
    return found
