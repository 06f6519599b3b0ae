"""Checks `evaluate` on real digits: the scores, their record, and the cache of reference features."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm.errors import InputError
from ddpm.files import arrays, paths, records
from ddpm.files.params import Params
from ddpm.files.samples import read_samples_record, write_samples
from ddpm.files.scores import Scores, read_point_influence, read_scores
from ddpm.parameters import Compute, Evaluation, Point
from ddpm.runtime.progress import Progress
from ddpm.scores import fidelity, inception
from ddpm.scores.copying import copying
from ddpm.scores.extractors import Extractor, judges
from ddpm.scores.features import extract
from ddpm.scores.intervals import standard_error
from ddpm.scores.metrics import METRICS
from ddpm.stages.evaluate import evaluate, reference_images

POINT = Point(schedule="linear", sampler="ddim", steps=5)
COMPUTING = "later points reuse them"


def protocol(images: int = 12, device: Any = "cpu", seed: int = 0) -> Params:
    base = Params.load(Path(__file__).parents[2] / "params.yaml")
    evaluation = Evaluation(layer=64, images=images, batch=5, threads=1)
    return base.model_copy(update={"evaluation": evaluation, "compute": Compute(device=device), "seed": seed})


def digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return (load_digits().images[:60, None] * (255 / 16)).round().astype(np.uint8)


def write_dataset(root: Path, train: np.ndarray) -> None:
    folder = root / paths.dataset_dir()
    folder.mkdir(exist_ok=True)
    np.save(folder / "train.npy", train)
    np.save(folder / "test.npy", train[:2])
    about = {"name": "digits", "sha256": "the version", "shape": [1, 8, 8], "counts": {"train": len(train), "test": 2}}
    about |= {"classes": None, "mean": [0.3], "std": [0.4], "flip": False}
    records.write_record(folder / "dataset.json", about, [folder / "train.npy", folder / "test.npy"])


@pytest.fixture
def root(tmp_path: Path, inception_cache: Path) -> Path:
    """Creates a dataset of 30 digits and a sample set of 20 others."""
    write_dataset(tmp_path, digits()[:30])
    write_samples(tmp_path / paths.samples_file(POINT), digits()[30:50], evaluations=5, model="m")
    (tmp_path / paths.CACHE).mkdir()
    (tmp_path / paths.CACHE / "inception").symlink_to(inception_cache)
    return tmp_path


def run(root: Path, params: Params | None = None) -> tuple[dict[str, Any], list[Progress]]:
    seen: list[Progress] = []
    scores = evaluate(params or protocol(), POINT, root, seen.append).to_json()
    assert scores == records.read_record(root / paths.metrics_file(POINT))
    return scores, seen


def computed(seen: list[Progress]) -> bool:
    return any(COMPUTING in progress.message for progress in seen)


def cached(root: Path) -> list[Path]:
    return sorted((root / paths.CACHE / "features").glob("*.npz"))


def test_the_record_is_what_the_features_say(root: Path, inception_cache: Path) -> None:
    scores, seen = run(root)
    extractor = inception.load(64, inception_cache)
    fake, real = (extract(extractor, images) for images in (digits()[30:42], reference_images(digits()[:30], 12)))
    fid = fidelity.fid(fidelity.statistics(fake), fidelity.statistics(real))
    kid, kid_std = fidelity.kid(fake, real, subset_size=6)
    influence = read_point_influence(root, POINT, read_scores(root, POINT))
    np.testing.assert_allclose(influence, fidelity.jackknife(fake, fidelity.statistics(real)).influence, rtol=1e-4)
    reach = 1.959964 * standard_error(influence)
    assert scores.pop("fid_high") == pytest.approx(fid + reach, rel=1e-5)
    assert scores.pop("fid_low") == pytest.approx(max(0.0, fid - reach), rel=1e-5)
    copied = copying(*fidelity.nearest_distances(fake, real))
    assert [scores.pop("copying"), scores.pop("copying_z")] == pytest.approx([copied.closer, copied.z], rel=1e-4)
    found = [scores.pop("density"), scores.pop("coverage")]
    assert found == pytest.approx(fidelity.density_coverage(fake, real), rel=1e-7)
    found = [scores.pop("precision"), scores.pop("recall")]
    assert found == pytest.approx(fidelity.precision_recall(fake, real), rel=1e-7)
    assert scores.pop("fid") == pytest.approx(fid, rel=1e-5)
    assert scores.pop("kid") == pytest.approx(kid, rel=1e-4)
    assert scores.pop("kid_std") == pytest.approx(kid_std, rel=1e-4)
    reach = 1.959964 * np.hypot(standard_error(fidelity.kid_influence(fake, real)), kid_std / np.sqrt(100))
    assert [scores.pop("kid_low"), scores.pop("kid_high")] == pytest.approx([kid - reach, kid + reach], rel=1e-4)
    assert scores == {  # no fid_infinity with 12 images and 64 features, and no Inception Score without a classifier
        "confidence": 0.95,
        "point": POINT.name,
        "evaluation": {"layer": 64, "images": 12, "batch": 5, "threads": 1},
        "model": "m",
        "evaluations": 5,
        "images": 12,
        "reference_images": 12,
        "layer": 64,
        "reference": "the version",
        "extractor": "inception-v3-2015-12-05",
        "extractor_sha256": extractor.sha256,
        "samples": read_samples_record(root / paths.samples_file(POINT)).record_sha256,
        "files": {paths.influence_file(POINT).name: records.sha256(root / paths.influence_file(POINT))},
    }
    assert json.loads((root / paths.metrics_file(POINT)).read_text()).items() >= scores.items()
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert seen[0].done == 0 and seen[-1].done == seen[-1].total == 24


PIXELS = """
import hashlib
import torch
TITLE, LAYERS, DEFAULT = "halves", (32,), 32
JUDGES = {"fd_dinov2": 32, "cmmd": 16}
class Half:
    sha256, logits = "9" * 64, lambda self, features: None
    def __init__(self, layer, device):
        self.name, self.layer, self.device = f"half-{layer}", layer, torch.device(device)
    def __call__(self, images):
        return images.flatten(1)[:, :self.layer] / 255
def load(layer, cache, device="cpu"):
    return Half(layer, device)
"""


@pytest.fixture
def halves(monkeypatch: Any) -> None:
    """Replaces DINOv2 and CLIP by extractors of an image's first pixels."""
    module = types.ModuleType("halves")
    exec(PIXELS, module.__dict__)
    row = Extractor("dinov2", "halves", (32,), 32, {"fd_dinov2": 32, "cmmd": 16})
    monkeypatch.setattr("ddpm.stages.evaluate.judges", lambda: {**judges(), **dict.fromkeys(row.judges, row)})
    monkeypatch.setitem(sys.modules, "ddpm.scores.dinov2", module)


def test_judges_score_the_same_samples_and_change_no_other_score(root: Path, halves: None) -> None:
    alone, _ = run(root)
    headline = read_point_influence(root, POINT, read_scores(root, POINT))
    base = protocol()
    names = ("cmmd", "fd_dinov2")
    params = base.model_copy(update={"evaluation": replace(base.evaluation, judges=names)})
    scores, seen = run(root, params)
    own = {entry for name in names for entry in METRICS[name].names} | {"judges", "evaluation", "files"}
    assert {name: value for name, value in scores.items() if name not in own} == {
        name: value for name, value in alone.items() if name not in own
    }
    assert "judges" not in alone and scores["evaluation"] == {**alone["evaluation"], "judges": list(names)}
    assert list(scores["judges"]) == list(names)
    assert scores["judges"]["cmmd"] == {"extractor": "half-16", "layer": 16, "extractor_sha256": "9" * 64}
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert seen[-1].done == seen[-1].total == 3 * 24

    sets = digits()[30:42], reference_images(digits()[:30], 12)
    fake, real = (images.reshape(12, 64)[:, :32] / np.float32(255) for images in sets)
    read = read_scores(root, POINT)
    assert list(read.judges) == list(names)
    found = fidelity.jackknife(fake, fidelity.statistics(real))
    value, influence = fidelity.cmmd(fake[:, :16].copy(), real[:, :16].copy())
    for name, expected, values in (("fd_dinov2", found.fid, found.influence), ("cmmd", value, influence)):
        ours = read_point_influence(root, POINT, read, name)
        np.testing.assert_allclose(ours, values, rtol=1e-4, atol=1e-4 * abs(values).max())
        estimate = read.estimate(ours, name)
        assert estimate.value == pytest.approx(expected, rel=1e-5)
        assert estimate.error == pytest.approx(standard_error(ours), rel=1e-4)
    np.testing.assert_array_equal(read_point_influence(root, POINT, read), headline)
    with pytest.raises(ValueError, match="cmmd_low: missing"):
        Scores.from_json({name: value for name, value in scores.items() if name != "cmmd_low"})


def test_an_unknown_judge_is_one_line(smoke: Any) -> None:
    assert smoke(evaluation={"judges": ["sfid", "cmmd"]}).evaluation.judges == ("sfid", "cmmd")
    with pytest.raises(
        InputError, match=r"evaluation\.judges: expected some of cmmd, fd_dinov2, sfid \(given: 'fid'\)"
    ):
        smoke(evaluation={"judges": ["fid"]})
    with pytest.raises(InputError, match="names something twice"):
        smoke(evaluation={"judges": ["sfid", "sfid"]})


def test_the_training_images_themselves_score_nothing(root: Path) -> None:
    write_samples(root / paths.samples_file(POINT), digits()[:30], evaluations=5, model="m")
    copies = run(root, protocol(images=30))[0]
    assert copies["fid"] < 1e-6
    assert copies["copying"] > 0.99 and copies["copying_z"] > 5
    write_samples(root / paths.samples_file(POINT), 255 - digits()[:30], evaluations=5, model="m")
    assert run(root, protocol(images=30))[0]["fid"] > 1


def test_same_input_same_bytes_with_or_without_the_cache_and_whatever_the_seed(root: Path) -> None:
    path = root / paths.metrics_file(POINT)
    assert computed(run(root)[1])
    first = path.read_bytes()
    kept, seen = run(root, protocol(seed=99))
    assert path.read_bytes() == first
    assert not computed(seen)
    assert seen[0].done == 12  # the cached reference images count as done
    shutil.rmtree(root / paths.CACHE / "features")
    assert computed(run(root)[1])
    assert path.read_bytes() == first
    assert kept["fid"] > 0


def test_reference_features_are_found_by_content(root: Path, inception_weights: Path, monkeypatch: Any) -> None:
    before, _ = run(root)
    changed = digits()[:30]
    changed[:, 0, 4, 4] ^= 1  # changes one grey level, but not the version in dataset.json
    write_dataset(root, changed)
    after, seen = run(root)
    assert computed(seen)
    assert after["fid"] != before["fid"]
    assert computed(run(root, protocol(images=8))[1])
    monkeypatch.setenv(inception.WEIGHTS_VARIABLE, str(inception_weights))
    other, seen = run(root)
    assert computed(seen)
    assert other["extractor_sha256"] != after["extractor_sha256"]
    assert len(cached(root)) == 4


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "another archive", "of other images"])
def test_a_damaged_cache_file_is_computed_again(root: Path, damage: str) -> None:
    before, _ = run(root)
    (path,) = cached(root)
    good = path.read_bytes()
    if damage == "another archive":
        arrays.write_arrays(path, path.stem, something=np.zeros(3))
    elif damage == "of other images":
        kept = arrays.read_arrays(path, path.stem)
        arrays.write_arrays(path, "another key", **{name: array + 1 for name, array in kept.items()})
    else:
        middle = 1000  # a byte within the features
        flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        path.write_bytes(good[:middle] if damage == "truncated" else flipped)
    after, seen = run(root)
    assert computed(seen)
    assert after == before
    assert path.read_bytes() == good


@pytest.mark.proof
def test_processes_at_once_compute_the_reference_once(root: Path) -> None:
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_evaluate import POINT, protocol
from ddpm.stages.evaluate import evaluate
evaluate(protocol(30), POINT, Path(sys.argv[1]), lambda progress: print(progress.message))
"""
    command = [sys.executable, "-c", code, str(root), str(Path(__file__).parent)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    output = "".join(process.communicate(timeout=120)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert output.count(COMPUTING) == 1


def test_fewer_samples_than_asked_for_are_counted(root: Path) -> None:
    scores, seen = run(root, protocol(images=500))
    assert (scores["images"], scores["reference_images"]) == (20, 30)
    assert "scoring all 20 samples, fewer than evaluation.images = 500" in [progress.message for progress in seen]


def test_reference_images_are_drawn_from_everywhere_and_grow() -> None:
    """About 1 of 840 seeds in the code would fail this test, because all 10 images would lie in the same half."""
    train = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    few, more = (set(reference_images(train, count).ravel()) for count in (10, 40))
    assert len(few) == 10 and len(more) == 40
    assert few < more
    assert max(few) >= 50 > min(few)
    np.testing.assert_array_equal(reference_images(train, 1000), train)


def test_wrong_input_is_one_line_and_leaves_nothing(root: Path, monkeypatch: Any) -> None:
    def refused(match: str, params: Params | None = None) -> None:
        with pytest.raises(InputError, match=match) as caught:
            run(root, params)
        assert "\n" not in str(caught.value)
        assert not (root / paths.metrics_file(POINT)).exists()

    if not torch.cuda.is_available():
        refused("cuda", protocol(device="cuda"))
    monkeypatch.setenv(inception.WEIGHTS_VARIABLE, str(root / "nothing.pth"))
    refused(r"nothing\.pth")
    monkeypatch.delenv(inception.WEIGHTS_VARIABLE)
    samples = root / paths.samples_file(POINT)
    write_samples(samples, digits()[:3], evaluations=5, model="m")
    refused("at least 4 of each")
    write_samples(samples, np.zeros((4, 3, 8, 8), np.uint8), evaluations=5, model="m")
    refused(r"\[3, 8, 8\].*\[1, 8, 8\]")
    samples.write_bytes(samples.read_bytes()[:100])
    refused("not a sample set")
    samples.unlink()
    refused("no such sample set")
    shutil.rmtree(root / paths.dataset_dir())
    write_samples(samples, digits()[:4], evaluations=5, model="m")
    refused("dataset")


@pytest.mark.proof
def test_full_weights_at_the_last_layer_give_an_inception_score(
    root: Path, inception_weights: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    state = torch.load(inception_weights, weights_only=True)
    classifier = torch.randn(1008, 2048, generator=torch.Generator().manual_seed(0))
    torch.save(state | {"fc.weight": classifier}, tmp_path / "full.pth")
    monkeypatch.setenv(inception.WEIGHTS_VARIABLE, str(tmp_path / "full.pth"))
    assert "inception_score" not in run(root)[0]
    params = protocol()
    params = params.model_copy(update={"evaluation": replace(params.evaluation, layer=2048)})
    scores, _ = run(root, params)
    extractor = inception.load(2048, tmp_path)
    logits = torch.from_numpy(extract(extractor, digits()[30:42])) @ classifier.T
    theirs = isc_features_to_metric(logits)
    assert scores["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert scores["inception_score"] > 1.01
    assert scores["inception_score_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-3)


def test_with_five_images_per_feature_fid_is_extrapolated() -> None:
    features = np.random.default_rng(0).normal(size=(2, 40, 8)).astype(np.float32)
    fake, real = features[0] + 0.5, features[1]
    found = fidelity.jackknife(fake, fidelity.statistics(real))
    scores = METRICS["fid"].values(fidelity.Sets(fake, real, fidelity.statistics(real)))
    assert scores["fid_infinity"] == pytest.approx(found.fid - found.bias)
    assert 0 <= scores["fid_infinity_low"] < scores["fid_infinity"] < scores["fid"]
    assert scores["fid_infinity_high"] - scores["fid_infinity"] > scores["fid_high"] - scores["fid"]
    assert not METRICS["fid"].values(fidelity.Sets(fake[1:], real, fidelity.statistics(real))).keys() & {
        "fid_infinity",
        "fid_infinity_low",
    }


def test_the_negative_fid_infinity_of_old_scores_is_left_out(root: Path) -> None:
    scores, _ = run(root)
    assert "fid_infinity" not in Scores.from_json({**scores, "fid_infinity": -0.75}).values
    with pytest.raises(ValueError, match="fid_infinity"):
        Scores.from_json({**scores, "fid_infinity": 2.0, "fid_infinity_low": 3.0, "fid_infinity_high": 4.0})
