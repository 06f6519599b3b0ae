"""The commands of docs/storage.md bring records and files back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ddpm.stages import checkpoint, tracking
from ddpm.stages.params import Params

PAGE = Path(__file__).parents[2] / "docs" / "storage.md"


def test_a_backup_brings_the_champion_back(checkout: Path, smoke: Callable[..., Params]) -> None:
    text = PAGE.read_text(encoding="utf-8").partition("\n## Backups\n")[2]
    save, restore, *_ = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def shell(script: str) -> None:
        subprocess.run(["sh", "-e", "-c", script], cwd=checkout, env={**os.environ, "PATH": path}, check=True)

    params = smoke(training={"steps": 24})
    champion = tracking.promote(params, checkout).version
    shell(save)
    for name in ("mlflow.db", "mlartifacts"):
        (shutil.rmtree if name == "mlartifacts" else os.unlink)(checkout / name)
    shell(restore)
    folder, _ = tracking.fetch_model("models:/ddpm-digits@champion", checkout / "fetched", checkout)
    checkpoint.load(folder)
    assert tracking.promote(params, checkout).version == champion
    tracking.publish(params, checkout)
    assert tracking.publish(params, checkout) == {}
