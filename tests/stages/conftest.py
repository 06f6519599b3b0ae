"""A checkout's worth of files in a temporary folder: the smoke recipe, and real digits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from ddpm.files import store
from ddpm.files.params import Params, Point
from ddpm.scores.intervals import CONFIDENCE, quantile, standard_error
from ddpm.stages.prepare import prepare
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train

RECIPES = Path(__file__).parents[2] / "recipes"


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


@pytest.fixture(scope="session")
def smoke() -> Callable[..., Params]:
    """The smoke recipe with sections changed: smoke(training={"steps": 3})."""
    raw = YAML(typ="safe").load((RECIPES / "smoke.yaml").read_text(encoding="utf-8"))
    return lambda **changes: Params.check(merged(raw, changes), "smoke")


@pytest.fixture(scope="session")
def digits(smoke: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the prepared digits; read-only by agreement."""
    root = tmp_path_factory.mktemp("digits")
    prepare(smoke(), root)
    return root


@pytest.fixture
def root(digits: Path, tmp_path: Path) -> Path:
    """A root of its own that shares the prepared digits."""
    (tmp_path / "dataset").symlink_to(digits / "dataset")
    return tmp_path


# What tracking publishes.


def run_record(stage: str, started: int, seconds: int, count: int, unit: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "started": started,
        "ended": started + 1000 * seconds,
        "seconds": float(seconds),
        "count": count,
        "unit": unit,
        "per_second": count / seconds,
        "peak_memory_bytes": 500_000_000,
        "device": "cpu",
        "hardware": {"cpu": "a processor", "cores": 2},
        "versions": {"ddpm": "0.1.0"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": False,
    }


def influence_of(point: Point, count: int, error: float) -> np.ndarray:
    """Influence values of `count` images, with that standard error exactly; each point has its own."""
    values = np.random.default_rng(list(point.name.encode())).normal(size=count)
    return ((values - values.mean()) * (error / standard_error(values))).astype(np.float32)


def scores_of(root: Path, point: Point, fid: float, error: float = 0.1, **changes: Any) -> None:
    """What `evaluate` would write, and a report whose best point is the one of the lowest FID."""
    samples, values = root / store.samples_file(point), root / store.influence_file(point)
    store.write_influence(values, influence_of(point, changes.get("images", 64), error))
    about = store.read_samples_record(samples)
    scores = {
        "point": point.name,
        "model": about["model"],
        "evaluation": {"layer": changes.get("layer", 64), "images": 64, "batch": 32, "threads": 1},
        "fid": fid,
        "fid_low": fid - quantile() * error,
        "fid_high": fid + quantile() * error,
        "confidence": CONFIDENCE,
        "precision": 0.5,
        "recall": 0.25,
        "kid": fid / 1000,
        "kid_low": fid / 1000 - 0.003,
        "kid_high": fid / 1000 + 0.003,
        "kid_std": fid / 10_000,
        "evaluations": about["evaluations"],
        "images": 64,
        "reference_images": 64,
        "layer": 64,
        "reference": store.read_dataset_record(root)["sha256"],
        "extractor": "inception-v3-2015-12-05",
        "extractor_sha256": "e" * 64,
        "samples": about[store.CHECKSUM],
    }
    store.write_record(root / store.metrics_file(point), {**scores, **changes}, [values])
    files = [path for path in (root / "metrics").glob("*-*.json") if not path.name.endswith(".run.json")]
    all_scores = {path.stem: store.read_record(path) for path in files}
    best = min(all_scores, key=lambda name: (all_scores[name]["fid"], all_scores[name]["evaluations"]))
    record = root / "report" / "best.json"
    store.write_record(record, {**all_scores[best], "points": len(all_scores)})
    store.write_record(root / "report" / "front.json", {"metric": "fid"}, [record])


@pytest.fixture(scope="session")
def write_scores() -> Callable[..., None]:
    """write_scores(root, point, fid, error, **changes to the other entries)."""
    return scores_of


@pytest.fixture(scope="session")
def made(digits: Path, smoke: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the outputs of every stage of the smoke recipe; only the scores are made up. Read-only by agreement."""
    root, params = tmp_path_factory.mktemp("made"), smoke(training={"steps": 24})
    (root / "dataset").symlink_to(digits / "dataset")
    train(params, "cosine", root)
    started = 1_700_000_000_000
    record = run_record("train@cosine", started, 60, 24, "steps")
    store.write_json(root / store.run_file(store.model_dir("cosine")), record)
    for index, point in enumerate(params.points()):
        sample_point(params, point, root)
        scores_of(root, point, 40.0 - index)
        for output, stage in ((store.samples_file(point), "sample"), (store.metrics_file(point), "evaluate")):
            started += 100_000
            record = run_record(f"{stage}@{point.name}", started, 10, 64, "images")
            store.write_json(root / store.run_file(output), record)
    return root


@pytest.fixture
def checkout(made: Path, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of its own with outputs that were never published, and an empty MLflow store at its default place."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "checkout"
    shutil.copytree(made, root, symlinks=True, ignore=shutil.ignore_patterns("training"))
    shutil.copyfile(empty_database, root / "mlflow.db")
    return root
