"""Checks that an extractor is added by one file, and a metric by one row. No other file of the pipeline names either of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from ddpm.errors import InputError
from ddpm.files import paths
from ddpm.files.dataset import read_dataset
from ddpm.files.params import Params
from ddpm.files.records import read_csv, read_record
from ddpm.files.samples import read_samples
from ddpm.parameters import Point
from ddpm.scores import extractors, fidelity
from ddpm.stages.evaluate import reference_images

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
POINT = Point.parse("cosine-ddim-5")
PROGRAM = """
from ddpm import tracking
from ddpm.files.params import Params
from ddpm.stages.evaluate import evaluate
from ddpm.stages.report import report
params = Params.load()
for point in params.points():
    evaluate(params, point)
report(params)
tracking.publish(params)
print(tracking.promote(params).reason)
"""


def replaced(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), encoding="utf-8")


def run(root: Path, program: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")
    }
    return subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def added(made: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a checkout with an added extractor and metric, and runs it from scores to promotion."""
    root = tmp_path_factory.mktemp("added") / "checkout"
    shutil.copytree(made, root, symlinks=True, ignore=shutil.ignore_patterns("training", "metrics", "report"))
    shutil.copytree(made / "metrics" / "train", root / "metrics" / "train")
    shutil.copyfile(empty_database, root / "mlflow.db")
    shutil.copytree(ROOT / "ddpm", root / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "recipes" / "smoke.yaml", root / "params.yaml")
    replaced(root / "params.yaml", "steps: 60", "steps: 24")
    room = root / "ddpm" / "scores"
    # Adds the extractor.
    shutil.copyfile(HERE / "pixel_extractor.py", room / "pixels.py")
    replaced(root / "params.yaml", "  extractor: inception\n  layer: 64\n", "  extractor: pixels\n")
    # Adds the metric.
    shutil.copyfile(HERE / "toy_metric.py", room / "mean_distance.py")
    row = "from ddpm.scores.mean_distance import MEAN_DISTANCE\n"
    replaced(room / "metrics.py", "from ddpm.scores.metric import", f"{row}from ddpm.scores.metric import")
    replaced(room / "metrics.py", "ROWS = (\n", "ROWS = (\n    MEAN_DISTANCE,\n")
    done = run(root, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert "is the first champion" in done.stdout
    return root


@pytest.fixture(scope="module")
def features(added: Path) -> tuple[Any, Any]:
    """Returns the pixels of the samples and of the reference images, in 0 ... 1."""
    samples, train = read_samples(added / paths.samples_file(POINT)).images[:64], read_dataset(added).train
    fake, real = (
        np.asarray(images).reshape(64, -1) / np.float32(255) for images in (samples, reference_images(train, 64))
    )
    return fake, real


def test_an_extractor_is_one_file(added: Path, features: tuple[Any, Any]) -> None:
    scores = read_record(added / paths.metrics_file(POINT))
    fake, real = features
    assert scores["fid"] == pytest.approx(fidelity.fid(*map(fidelity.statistics, features)), rel=1e-5)
    assert scores["precision"] == pytest.approx(fidelity.precision_recall(fake, real)[0], rel=1e-6)
    assert (scores["layer"], scores["extractor"]) == (1, "pixels")
    assert "inception_score" not in scores
    assert {row["extractor"] for row in read_csv(added / "report" / "points.csv")} == {"pixels"}
    page = (added / "report" / "index.html").read_text(encoding="utf-8")
    assert "pixels layer 1, 64 samples against 64 images" in page and "Inception" not in page
    client = MlflowClient(f"sqlite:///{added / 'mlflow.db'}")
    champion = client.get_model_version_by_alias("ddpm-digits", "champion")
    assert json.loads(champion.tags["ddpm.protocol"])["extractor_sha256"] == scores["extractor_sha256"]
    run = client.get_run(champion.run_id)
    assert "at pixels layer 1" in run.data.tags["mlflow.note.content"]
    assert run.data.tags["ddpm.evaluation.extractor"] == "pixels"
    assert "at pixels layer 1" in champion.description and "Inception" not in champion.description


def test_a_metric_is_one_row(added: Path, features: tuple[Any, Any]) -> None:
    fake, real = features
    value = read_record(added / paths.metrics_file(POINT))["mean_distance"]
    assert value == pytest.approx(np.linalg.norm(fake.mean(0) - real.mean(0)), rel=1e-5)
    (row,) = [row for row in read_csv(added / "report" / "points.csv") if row["point"] == POINT.name]
    assert row["mean_distance"] == str(value)
    page = (added / "report" / "index.html").read_text(encoding="utf-8")
    assert ">distance of means</button>" in page and f'<td data-value="{value}">{value:.3g}</td>' in page
    client = MlflowClient(f"sqlite:///{added / 'mlflow.db'}")
    champion = client.get_model_version_by_alias("ddpm-digits", "champion")
    best = read_record(added / "report" / "best.json")
    assert f"| distance of means (lower is better) | {best['mean_distance']:.3g} | " in champion.description
    (experiment,) = [each for each in client.search_experiments() if each.name == "ddpm-digits"]
    runs = client.search_runs([experiment.experiment_id], "tags.`ddpm.sampler` = 'ddim'")
    history = client.get_metric_history(runs[0].info.run_id, "mean_distance")
    assert value in [measured.value for measured in history if measured.step == POINT.steps]


def test_a_layer_is_one_of_the_extractors(smoke: Any) -> None:
    assert smoke(evaluation={"layer": 2048}).evaluation.layer == 2048
    with pytest.raises(InputError, match=r"evaluation\.layer: expected one of 64, 192, 768, 2048 \(given: 1\)"):
        smoke(evaluation={"layer": 1})
    for name in ("pixels", "fidelity", "../scores/inception", "", 3):
        with pytest.raises(InputError, match=r"evaluation\.extractor: "):
            smoke(evaluation={"extractor": name})


def test_params_without_an_extractor_mean_inception() -> None:
    params = Params.load(ROOT / "params.yaml")
    section = {name: value for name, value in params.evaluation.recorded().items() if name != "layer"}
    assert "extractor" not in section
    read = Params.check({**params.to_json(), "evaluation": section}, "params")
    assert (read.evaluation.extractor, read.evaluation.layer) == ("inception", 2048)


def test_params_are_checked_without_torch(added: Path) -> None:
    done = run(
        added, "import sys\nfrom ddpm.files.params import Params\nParams.load()\nassert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


SAYING = """
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.stages.evaluate import evaluate
evaluate(Params.load(), Point.parse("cosine-ddim-5"), report=lambda progress: print(progress.message))
"""


def test_an_edited_extractor_computes_the_reference_features_again(added: Path) -> None:
    assert "later points reuse them" not in run(added, SAYING).stdout
    with (added / "ddpm" / "scores" / "pixels.py").open("a") as file:
        file.write("# and so on\n")
    assert "later points reuse them" in run(added, SAYING).stdout


def test_an_extractor_with_a_value_that_is_not_json_is_refused(added: Path) -> None:
    module = added / "ddpm" / "scores" / "tuples.py"
    module.write_text('TITLE = "tuples"\nLAYERS = (1,)\nDEFAULT = 1\n')
    done = run(added, "from ddpm.scores.extractors import EXTRACTORS\nprint(*EXTRACTORS)")
    module.unlink()
    assert "tuples.py: TITLE, LAYERS, DEFAULT and JUDGES must be JSON, each in one line" in done.stderr


def test_extractors_are_read_without_ast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads cannot use `ast` at once before CPython 3.11.8, and Prefect's threads use it while a flow reads params.yaml."""
    monkeypatch.setattr("ast.parse", lambda *_, **__: pytest.fail("used ast"))
    extractors._values.cache_clear()
    assert extractors.EXTRACTORS["inception"].layers == (64, 192, 768, 2048)
