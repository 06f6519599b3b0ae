"""Runs the whole pipeline on real digits: the smoke recipe in a clone, by the flow, then by DVC and by the flow again."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows import links

pytestmark = pytest.mark.timeout(600)
# These values are in the environment of all processes here, and must appear nowhere else.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "planted-key-30c1",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-5d27",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-91ab",
    "DDPM_PLANTED": "planted-word-08be",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, clone_maker: Callable[[Path], Any]) -> Iterator[Any]:
    made = clone_maker(tmp_path_factory.mktemp("clone"))
    made.environment |= SECRETS
    yield made
    made.end()


def test_data_to_champion(clone: Any, check_log: Callable[..., list[str]]) -> None:
    done = clone.run(sys.executable, "-m", "flows", "--recipe", "smoke")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    with (clone.root / "report" / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    best = min(rows, key=lambda row: (float(row["fid"]), int(row["evaluations"])))["point"]
    decision = f"champion: version 1 ({best}): {best} is the first champion"
    assert decision in done.stdout
    with closing(sqlite3.connect(clone.root / ".prefect" / "prefect.db")) as database:
        assert database.execute("select name from flow_run").fetchall() == [("smoke",)]
        shown = dict(database.execute("select key, description from artifact where type = 'markdown'").fetchall())
    assert shown["champion"] == decision
    assert re.fullmatch(rf"best: {best}, FID [\d.e+-]+ \([\d.e+-]+ to [\d.e+-]+\)", shown["report"])
    assert answered(done.stdout) == [shown["report"], "report: report/index.html", "next:"]
    assert not check_log(clone.root / ".prefect" / "server.log")
    assert (clone.root / "report" / "samples.png").stat().st_size > 1000
    assert "compareRunsMode=CHART" in links.mlflow(clone.root, "http://127.0.0.1:5000")
    assert not clone.running()


def test_then_neither_dvc_nor_the_flow_has_anything_to_do(clone: Any) -> None:
    assert "Running stage" not in clone.repro()
    lock = (clone.root / "dvc.lock").read_bytes()
    done = clone.run(sys.executable, "-m", "flows")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert (
        "13 stages unchanged" in done.stdout
    )  # prepare, probe, train, likelihood, four samples, four evaluations, report
    assert "is already the champion" in done.stdout and len(answered(done.stdout)) == 3
    assert (clone.root / "dvc.lock").read_bytes() == lock


def answered(said: str) -> list[str]:
    """Returns the last lines of a run, from `best:` to `next:`. Asserts that only one line begins with `best:`."""
    lines = said.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("best: "))
    assert 1 <= len(lines) - first - 3 <= 4
    return lines[first : first + 3]


def would_run(clone: Any) -> list[str]:
    """Returns the stages that `dvc status` lists as changed. Stages that depend only on their outputs are not listed."""
    done = clone.run("dvc", "status", "--json")
    assert done.returncode == 0, done.stderr
    return sorted(json.loads(done.stdout))


def test_a_change_touches_what_depends_on_it_and_nothing_else(clone: Any) -> None:
    def edit(path: str, old: str, new: str) -> list[str]:
        file = clone.root / path
        before = file.read_text(encoding="utf-8")
        assert old in before
        try:
            file.write_text(before.replace(old, new, 1), encoding="utf-8")
            return would_run(clone)
        finally:
            file.write_text(before, encoding="utf-8")

    points = [f"cosine-{sampler}-{steps}" for sampler in ("ddim", "ddpm") for steps in (2, 5)]
    evaluations = [f"evaluate@{point}" for point in points]
    samples = [f"sample@{point}" for point in points]
    assert would_run(clone) == []
    new = ["evaluate@cosine-ddim-3", "evaluate@cosine-ddpm-3", "sample@cosine-ddim-3", "sample@cosine-ddpm-3"]
    assert edit("params.yaml", "steps: [2, 5]", "steps: [2, 5, 3]") == sorted(["report", *new])
    row = edit("params.yaml", "ddim: {sampler: ddim, eta: 0.0", "ddim: {sampler: ddim, eta: 0.5")
    assert row == ["report", "sample@cosine-ddim-2", "sample@cosine-ddim-5"]  # `samplers` is a parameter of the report
    assert edit("ddpm/scores/fidelity.py", '"""', '"""Edited. ') == evaluations
    assert edit("ddpm/diffusion/bound.py", '"""', '"""Edited. ') == ["likelihood@cosine"]
    assert edit("ddpm/diffusion/samplers.py", '"""', '"""Edited. ') == samples
    assert edit("params.yaml", "slots: 2", "slots: 1") == []
    assert edit("ddpm/stages/report.py", '"""', '"""Edited. ') == ["report"]
    assert "train@cosine" in edit("ddpm/networks/unet.py", '"""', '"""Edited. ')


def test_dvc_shows_metrics_plots_and_parameters(clone: Any) -> None:
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json").stdout)
    metrics = next(iter(shown.values()))["data"]
    best = metrics["report/best.json"]["data"]
    assert metrics[f"metrics/{best['lowest']}.json"]["data"]["fid"] == min(
        entry["data"]["fid"] for name, entry in metrics.items() if name.startswith("metrics/cosine-")
    )
    page = clone.run("dvc", "plots", "show")
    assert page.returncode == 0 and "index.html" in page.stdout, page.stderr
    assert "training.steps" in clone.run("dvc", "params", "diff").stdout  # compares smoke with the committed recipe


def test_the_champion_makes_images(clone: Any) -> None:
    from PIL import Image

    done = clone.run("ddpm", "generate", "--model", "models:/ddpm-digits@champion", "-n", "9", "--out", "grid.png")
    assert done.returncode == 0, done.stderr
    with Image.open(clone.root / "grid.png") as picture:
        assert picture.width == picture.height > 9
        assert len(picture.getcolors(maxcolors=256) or ()) > 10


def test_no_secret_is_left_anywhere(clone: Any) -> None:
    """Searches outputs, DVC's files and cache, and the databases and logs of Prefect and MLflow."""
    files = [path for path in clone.root.rglob("*") if path.is_file() and path.suffix != ".py"]
    for kind in ("dvc.lock", "mlflow.db", "prefect.db", "server.log"):
        assert any(path.name == kind for path in files), kind
    assert [str(path) for path in files if b"planted-" in path.read_bytes()] == []
