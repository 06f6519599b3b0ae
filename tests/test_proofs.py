"""Runs slow proofs (`make proof`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.proof, pytest.mark.timeout(3600)]
Clone = Callable[..., Path]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """Returns clone(name, recipe, **changes), which clones the last commit and changes values of the recipe."""

    def make(name: str, recipe: str, **changes: dict[str, object]) -> Path:
        root = tmp_path / name
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
        yaml = YAML()
        params = yaml.load((root / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
        for section, values in changes.items():
            params[section].update(values)
        with (root / "params.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(params, file)
        return root

    return make


def run(root: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_two_clones_end_with_the_same_lock_and_force_changes_nothing(clone: Clone) -> None:
    locks = []
    for name in ("one", "two"):
        root = clone(name, "smoke")
        run(root, "dvc", "repro")
        locks.append((root / "dvc.lock").read_bytes())
    assert locks[0] == locks[1]
    subprocess.run(
        ["rm", "-rf", str(root / ".cache" / "training")], check=True
    )  # otherwise training would resume at its end
    run(root, "dvc", "repro", "--force")
    assert (root / "dvc.lock").read_bytes() == locks[0]


def test_an_experiment_prolongs_a_training_and_tells_what_changed(clone: Clone) -> None:
    root = clone("experiment", "smoke")
    run(root, "dvc", "repro")
    said = run(root, "dvc", "exp", "run", "-S", "training.steps=80")
    assert "resuming after step 60" in said
    assert json.loads((root / "metrics/train/cosine.json").read_text())["steps"] == 80


def test_the_table_of_the_ablation_is_queued_and_a_cell_of_it_runs(clone: Clone) -> None:
    """Runs the commands of docs/ablation.md: queues six cells, and runs one cell with the smoke recipe."""
    root = clone("ablation", "smoke", sweep={"samplers": ["ddpm"], "steps": [5]})
    targets, learned = (
        "diffusion.target=eps,mu",
        ["-S", "diffusion.variance=learned", "-S", "samplers.ddpm.variance=learned"],
    )
    run(root, "dvc", "exp", "run", "--queue", "-S", targets, "-S", "training.loss=simple,vlb")
    run(root, "dvc", "exp", "run", "--queue", "-S", targets, "-S", "training.loss=vlb", *learned)
    assert run(root, "dvc", "queue", "status").count("Queued") == 6
    run(root, "dvc", "exp", "run", "-S", "diffusion.target=mu", "-S", "training.loss=vlb", *learned)
    about = json.loads((root / "models/cosine/model.json").read_text())
    assert (about["target"], about["training"]["loss"]) == ("mu", "vlb")
    assert about["network"]["out_channels"] == 2 * about["network"]["image_channels"]  # so the variance is learned
    assert json.loads((root / "metrics/cosine-ddpm-5.json").read_text())["evaluations"] == 5
    shown = json.loads(run(root, "dvc", "plots", "show", "--json", "metrics/train/cosine.by_time.csv"))
    assert "metrics/train/cosine.by_time.csv" in str(shown)


def test_fifty_thousand_images_in_bounded_memory(clone: Clone) -> None:
    root = clone(
        "many",
        "smoke",
        network={"channels": 8, "multipliers": [1], "attention": []},
        training={"steps": 1, "validate_every": 1000},
        sampling={"images": 50_000, "batch": 1000},
        sweep={"steps": [1]},
    )
    run(root, "dvc", "repro", "sample@cosine-ddim-1")
    few = {"images": 1000, "batch": 1000}
    peak = json.loads((root / "samples/cosine-ddim-1.run.json").read_text())["peak_memory_bytes"]
    base = clone(
        "few", "smoke", network={"channels": 8, "multipliers": [1], "attention": []}, sampling=few, sweep={"steps": [1]}
    )
    run(base, "dvc", "repro", "sample@cosine-ddim-1")
    least = json.loads((base / "samples/cosine-ddim-1.run.json").read_text())["peak_memory_bytes"]
    assert peak < least + 100e6


@pytest.mark.skipif(not (ROOT.parent / "shared/data").is_dir(), reason="the CIFAR-10 zips are not beside this checkout")
def test_the_papers_network_on_cifar10_through_all_stages(clone: Clone) -> None:
    """A few steps and images show that every stage works with this network."""
    threads = {"threads": os.cpu_count() or 1}
    root = clone(
        "cifar",
        "cifar10",
        data={"source": "image_folder", "path": str(ROOT.parent / "shared/data")},
        training={
            "steps": 3,
            "batch": 8,
            "precision": "float32",
            "compile": False,
            "log_every": 1,
            "validation_images": 16,
            **threads,
        },
        sampling={"images": 16, "batch": 16, "precision": "float32", "compile": False, **threads},
        evaluation={"images": 16, "batch": 16, **threads},
        likelihood={"images": 2, "times": 2, "batch": 2, **threads},
        sweep={"schedules": ["linear"], "samplers": ["ddim"], "steps": [2]},
    )
    run(root, "dvc", "repro")
    about = json.loads((root / "dataset/dataset.json").read_text())
    assert about["counts"] == {"train": 50_000, "test": 10_000} and about["shape"] == [3, 32, 32]
    assert about["mean"] == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-5)
    assert json.loads((root / "metrics/train/linear.json").read_text())["parameters"] == 35_746_307
    assert json.loads((root / "metrics/linear-ddim-2.json").read_text())["layer"] == 2048
    assert "first champion" in run(root, "ddpm", "promote")
