"""Checks the end of a run: the best point, the report's path, and a few commands that help next, but no more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm.files import records, scores
from ddpm.files.params import Params
from ddpm.provenance import project
from ddpm.reporting.answer import MOST_STEPS, answer

ROOT = Path(__file__).parents[2]
DVC = str(Path(sys.executable).with_name("dvc"))


def steps(lines: list[str]) -> list[str]:
    """Returns the commands of the next steps. At least three spaces separate a command from its purpose."""
    assert lines[2] == "next:" and len(lines) <= 3 + MOST_STEPS
    return [line.strip().split("   ")[0] for line in lines[3:]]


def test_the_answer_is_the_best_point_the_page_and_what_helps_then(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    shutil.copy(ROOT / "recipes" / "smoke.yaml", "params.yaml")
    Path("Makefile").touch()
    Path("flows").mkdir()
    row = scores.read_best(checkout).row
    lines = answer()
    assert lines[:2] == [
        f"best: {row.point}, FID {row.value:.4g} ({row.low:.4g} to {row.high:.4g})",
        "report: report/index.html",
    ]
    generate, promote, look, run = steps(lines)
    assert (generate, promote, run) == (
        "ddpm generate -n 64 --out grid.png",
        "ddpm promote",
        f"ddpm run training.steps={2 * Params.load(Path('params.yaml')).training.steps}",
    )
    assert look == "make ui"
    (checkout / project.NAME).touch()  # a project may lie in a folder with a Makefile of its own
    assert steps(answer())[2] == "python -m flows.servers.up mlflow"
    (checkout / project.NAME).unlink()
    assert "ddpm promote" not in steps(answer(promoted=True))
    served = answer(promoted=True, mlflow="http://127.0.0.1:5000/#/chart")
    assert steps(served)[1] == "http://127.0.0.1:5000/#/chart" and "with the champion" in served[3]
    # The shell cannot find `ddpm` until the environment is activated.
    (checkout / ".venv").symlink_to(sys.prefix)
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert steps(answer()) == [". .venv/bin/activate", generate, promote, "make ui"]
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert steps(answer())[0] == generate
    monkeypatch.chdir(checkout.parent)
    assert answer(checkout)[1] == f"report: {checkout.name}/report/index.html"
    assert answer(checkout / "nothing") == []


def test_dvc_repro_says_it_when_it_ran_and_when_nothing_had_to(checkout: Path) -> None:
    (checkout / "dvc.yaml").write_text(
        "stages:\n"
        "  report: {cmd: 'echo python -m ddpm report', deps: [report/best.json]}\n"
        "  other: {cmd: 'echo other', deps: [report/best.json]}\n"
    )

    def dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([DVC, *arguments], cwd=checkout, capture_output=True, text=True, check=False)

    assert dvc("init", "--no-scm", "--quiet").returncode == 0
    best = scores.read_best(checkout).line
    for arguments in (["repro"], ["repro"], ["repro", "--single-item", "report"]):
        done = dvc(*arguments)
        assert done.returncode == 0 and done.stdout.count(best) == 1, done.stdout + done.stderr
        assert len(done.stdout[done.stdout.index(best) :].splitlines()) <= 3 + MOST_STEPS
    for arguments in (["repro", "other"], ["repro", "--dry"], ["repro", "--quiet"], ["status"], ["repro", "nothing"]):
        done = dvc(*arguments)
        assert best not in done.stdout + done.stderr, done.args
    path = checkout / "report" / "best.json"
    records.write_json(path, records.read_json(path) | {"point": "another"})
    done = dvc("repro")
    assert done.returncode == 0 and f"{path}: " in done.stdout.splitlines()[-1] and "Traceback" not in done.stderr
