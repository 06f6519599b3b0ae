"""Runs each command in a checkout with files of version 0.1.0. The command works, or refuses in one line that says what to do.

data/old-0.1.0.tar.xz holds params.yaml, dvc.lock, the outputs of a small sweep, a saved training state, and mlflow.db with
its champion in mlartifacts. The archive was made in /tmp/old, so mlflow.db names the artifacts there.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddpm import cli
from ddpm.files import checkpoint, dataset, paths, records, samples
from ddpm.files.params import Params

OLD = Path(__file__).parents[1] / "data" / "old-0.1.0.tar.xz"
POINT = "cosine-ddim-2"
MODEL = Path("models/cosine")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes the old checkout the working folder."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    for variable in ("MLFLOW_TRACKING_URI", "DVC_STAGE", "DDPM_WATCH_PID"):
        monkeypatch.delenv(variable, raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def test_params_are_read(old: Path) -> None:
    params = Params.load()
    assert [point.name for point in params.points()] == [POINT]
    assert (params.training.steps, params.network.channels, params.network.multipliers) == (20, 8, (1,))


def test_a_saved_state_is_read_or_passed_over(old: Path) -> None:
    (folder,) = Path(".cache/training").iterdir()
    state, complaints = checkpoint.read_resume(folder, 20)
    assert (state.step == 15) if state else len(complaints) == 1


def is_picture() -> None:
    with Image.open("grid.png") as picture:
        assert picture.size[0] >= 16


def is_trained() -> None:
    _, about = checkpoint.load(MODEL)
    assert about.weights_sha256 == records.sha256(MODEL / "model.safetensors")
    assert records.read_json(paths.training_metrics_file("cosine"))["steps"] == 20


def is_best() -> None:
    best = json.loads((paths.report_dir() / "best.json").read_text())
    assert (best["point"], best["points"]) == (POINT, 1)


def is_published_once() -> None:
    with closing(sqlite3.connect("mlflow.db")) as database:
        twice = "select key, step from metrics group by run_uuid, key, step having count(*) > 1"
        assert not database.execute(twice).fetchall()
        assert database.execute("select count(*) from metrics where key = 'fid'").fetchone() == (1,)
        assert database.execute("select count(*) from model_versions").fetchone() == (1,)


COMMANDS: dict[str, Callable[[], Any]] = {
    "prepare": dataset.read_dataset,
    "train cosine": is_trained,
    "likelihood cosine": lambda: records.read_json(paths.likelihood_file("cosine")),
    f"sample {POINT}": lambda: samples.read_samples(Path(f"samples/{POINT}.npz")),
    "report": is_best,
    "publish": is_published_once,
    "promote": is_published_once,
    "promote --rollback": is_published_once,
    "generate -n 4 --model models/cosine --out grid.png --sampler ddim --steps 2": is_picture,
    "generate -n 4 --out grid.png": is_picture,
    "card": lambda: Path("MODEL_CARD.md").read_text(encoding="utf-8").index(POINT),
    "export-diffusers models/cosine out": lambda: records.read_json(Path("out/model_index.json")),
    "gc": is_published_once,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works_or_refuses_in_one_line(
    command: str, old: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpm", *command.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code in (0, 2, None), said
    assert "Traceback" not in said.err
    if ended.value.code == 2:
        (line,) = [line for line in said.err.splitlines() if "mlflow.db was moved or copied" not in line]
        assert line.startswith("ddpm: ")
        return
    COMMANDS[command]()
