"""Who holds the files of a checkout, as DVC writes it down: by process ids, of which it asks only whether they are in use.

So a DVC that was killed in a container, where its id was 1, would hold its files for ever. Here what is left of such ones goes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import psutil

from ddpm.files import records

FOLDER = Path(".dvc") / "tmp"
# `dvc`, `python -m dvc` and its file; a fork of the flow's shows the same.
_DVC = re.compile(r"(^|[/ ])dvc( |/__main__\.py|$)")
SLACK = 5.0  # seconds; a process's start is known to one


def clear(root: Path) -> None:
    """Removes the entries of processes that are no more, or are others by now, and a file that is cut off.

    Raises dvc.lock.LockError where DVC keeps the file for itself for longer than a moment.
    """
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK, SCHEMA
    from voluptuous import Invalid

    folder = root / FOLDER
    path = folder / RWLOCK_FILE
    if not path.exists():
        return
    with make_lock(str(folder / RWLOCK_LOCK), tmp_dir=str(folder)):
        try:
            entries = SCHEMA(json.loads(path.read_text(encoding="utf-8")))
            written = path.stat().st_mtime
        except (ValueError, Invalid):  # whoever was killed while it wrote it
            path.unlink()
            return
        except FileNotFoundError:
            return
        write = {name: one for name, one in entries["write"].items() if _holds(one, written)}
        read = {name: [one for one in several if _holds(one, written)] for name, several in entries["read"].items()}
        left = {"write": write, "read": {name: several for name, several in read.items() if several}}
        if left != entries:
            records.write_json(path, left)


def _holds(entry: dict[str, Any], written: float) -> bool:
    """Whether its process is still the one that made the entry, in a file that was written at that time."""
    try:
        process = psutil.Process(entry["pid"])
        shown = " ".join(" ".join(process.cmdline()).split())
        if process.status() == psutil.STATUS_ZOMBIE or process.create_time() > written + SLACK:
            return False
    except psutil.Error:
        return False
    return bool(_DVC.search(shown)) or shown.endswith(" ".join(entry["cmd"].split()))  # or a program that uses DVC
