"""Records when, where, how fast and from which commit a stage ran. No result depends on these records."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from ddpm.provenance import git
from ddpm.provenance.runs import RunRecord, write_run


def record(output: Path, stage: str, started: float, ended: float, count: int, unit: str) -> RunRecord:
    """Writes the run file of an output and returns its content.

    Args:
        output: the file or folder that the run made.
        stage: the DVC stage.
        started, ended: seconds since the epoch.
        count: the number of `unit`s of work done.
        unit: the unit of work, such as "steps".
    """
    seconds = ended - started
    made = RunRecord(
        stage=stage,
        started=int(started * 1000),
        ended=int(ended * 1000),
        seconds=round(seconds, 3),
        count=count,
        unit=unit,
        per_second=round(count / seconds, 3) if seconds else None,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        versions={"python": platform.python_version(), "ddpm": version("ddpm"), "torch": version("torch")},
        git_commit=git.line(Path(), "rev-parse", "HEAD", patience=git.PATIENCE),
        git_dirty=bool(git.line(Path(), "status", "--porcelain", "--untracked-files=no", patience=git.PATIENCE)),
        **_hardware(),
    )
    write_run(output, made)
    return made


def versions() -> str:
    """Returns one line with the versions, torch's device and, if the code is in a git checkout, the commit."""
    import torch

    device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"
    line = f"ddpm {version('ddpm')}, Python {platform.python_version()}, torch {torch.__version__}, device {device}"
    folder = Path(__file__).parent
    # If git does not track this file, the surrounding checkout belongs to another project.
    if git.line(folder, "ls-files", Path(__file__).name):
        line += f", commit {git.line(folder, 'describe', '--always', '--dirty', '--exclude', '*')}"
    return line


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "cpu": _processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    torch = sys.modules.get("torch")  # a stage that did not initialise CUDA ran on the CPU
    if torch is None or not torch.cuda.is_initialized():
        return {"device": "cpu", "hardware": hardware}
    hardware["gpu"] = torch.cuda.get_device_name()
    return {"device": "cuda", "gpu_peak_memory_bytes": torch.cuda.max_memory_allocated(), "hardware": hardware}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
