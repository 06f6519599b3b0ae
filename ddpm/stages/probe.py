"""`probe`: chooses the values of `precision` and `compile` that suit this machine, and writes them to auto.json.

`train` and `sample` replace `auto` by the values in auto.json. So all points of a sweep use the same values. Other hosts that
get auto.json from DVC use these values too. DVC runs this stage once; `dvc repro --force --single-item probe` chooses again.
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
    """Writes the values of `precision` and `compile` for `compute.device` to auto.json. Returns them. Raises InputError."""
    found, reason = compiling.probe(find_device(params.compute.device))
    report(Progress(0, 0, "", message=f"{AUTO} means {found}: {reason}"))
    records.write_record(root / paths.auto_file(), as_json(found))
    return found
