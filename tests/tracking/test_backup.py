"""Checks that the commands of docs/storage.md restore records and files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm import tracking
from ddpm.files.params import Params

PAGE = Path(__file__).parents[2] / "docs" / "storage.md"


@pytest.mark.proof
def test_a_backup_brings_the_champion_back(checkout: Path, smoke: Callable[..., Params]) -> None:
    text = PAGE.read_text(encoding="utf-8").partition("\n## Backups\n")[2]
    save, restore, *_ = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def shell(script: str) -> None:
        subprocess.run(["sh", "-e", "-c", script], cwd=checkout, env={**os.environ, "PATH": path}, check=True)

    params = smoke(training={"steps": 24})
    assert tracking.promote(params, checkout).promoted
    weights = (checkout / "models" / "cosine" / "model.safetensors").read_bytes()
    shell(save)
    for name in ("mlflow.db", "mlartifacts"):
        (shutil.rmtree if name == "mlartifacts" else os.unlink)(checkout / name)
    shell(restore)
    # Runs in a new process, because this process still holds the old file open.
    fetch = (
        "from pathlib import Path; from ddpm import tracking; from ddpm.files import checkpoint; "
        "checkpoint.load(tracking.fetch_model('models:/ddpm-digits@champion', Path('fetched'))[0])"
    )
    subprocess.run([sys.executable, "-c", fetch], cwd=checkout, check=True)
    assert (checkout / "fetched" / "checkpoint" / "model.safetensors").read_bytes() == weights
