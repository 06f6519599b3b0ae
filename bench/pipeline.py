"""Measures what DVC, Prefect and process start-up add to the stages, in a clone of this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.harness import TINY, figure
from ddpm.runtime.display import PREFIX

ROOT = Path(__file__).parents[1]
RECIPE = "smoke"

BARE = """
import sys
from pathlib import Path
from ddpm.files.params import Params
from ddpm.stages.prepare import prepare
from ddpm.stages.train import train
from ddpm.stages.likelihood import likelihood
from ddpm.stages.sample import sample_point
from ddpm.stages.evaluate import evaluate
from ddpm.stages.report import report
params = Params.load()
prepare(params)
for schedule in params.sweep.schedules:
    train(params, schedule)
    likelihood(params, schedule)
for point in params.points():
    sample_point(params, point)
    evaluate(params, point)
report(params)
"""


@contextmanager
def _clone() -> Iterator[tuple[Path, dict[str, str]]]:
    """Yields a fresh clone of this checkout's commit, and the environment for its commands."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
        (root / "params.yaml").write_bytes((ROOT / "recipes" / f"{RECIPE}.yaml").read_bytes())
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_TRACKING", "PREFECT_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        yield root, {**kept, "PATH": path, "PYTHONPATH": str(root)}


def _timed(command: list[str], root: Path, environment: dict[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return time.perf_counter() - began


def _first_work(verb: list[str], root: Path, environment: dict[str, str]) -> float:
    """Returns the seconds from the start of a stage's process to its first progress line with work done."""
    began, first = time.perf_counter(), None
    with subprocess.Popen(
        [str(Path(sys.executable).parent / "ddpm"), *verb],
        cwd=root,
        env={**environment, "DDPM_PROGRESS": "lines"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if first is None and line.startswith(PREFIX) and json.loads(line.removeprefix(PREFIX))["done"] > 0:
                first = time.perf_counter() - began
    assert process.returncode == 0 and first is not None, verb
    return first


def demo(device: str) -> dict[str, Any]:
    """Measures the smoke recipe: run by the flow, run as bare Python calls, and DVC and the flow with nothing to do."""
    python = sys.executable
    with _clone() as (root, environment):
        flow = [_timed([python, "-m", "flows", "--no-promote"], root, environment)]
        digest = (root / "dvc.lock").read_bytes()
        repro = [_timed([python, "-m", "dvc", "repro"], root, environment) for _ in range(3)]
        again = [_timed([python, "-m", "flows", "--no-promote"], root, environment) for _ in range(2)]
        assert digest == (root / "dvc.lock").read_bytes()
        listed = subprocess.run(
            [python, "-m", "dvc", "stage", "list", "--all"],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        stages = len([line for line in listed.stdout.splitlines() if line.strip()])
        with _clone() as (other, others):
            bare = [_timed([python, "-c", BARE], other, others)]
            for output in ("dataset/train.npy", "models/cosine/model.safetensors", "report/points.csv"):
                assert (root / output).read_bytes() == (other / output).read_bytes(), output
    added = [(whole - calls) / stages for whole, calls in zip(flow, bare, strict=True)]
    return {
        "work": f"the {RECIPE} recipe, {stages} stages, published to MLflow; the outputs equal those of bare calls",
        "per_call": "one run",
        "checks": {"same outputs": True, "stages": stages},
        "times": {
            "flow": {"wall": flow},
            "bare calls in one process": {"wall": bare},
            "dvc repro with nothing to do": {"wall": repro},
            "flow with nothing to do": {"wall": again},
        },
        "figures": [
            figure("overhead of the flow per stage", added, "s", 8.0, most=True),
            figure("dvc repro with nothing to do", repro, "s", 5.0, most=True),
            figure("flow with nothing to do", again, "s", 30.0, most=True),
        ],
    }


def start(device: str) -> dict[str, Any]:
    """Measures the time from the start of a stage's process to its first progress."""
    verbs = {"train": ["train", "cosine", "--fresh"], "sample": ["sample", "cosine-ddim-5"]}
    verbs["evaluate"] = ["evaluate", "cosine-ddim-5"]
    goals = {"train": 4.0, "sample": 4.0, "evaluate": 10.0}
    with _clone() as (root, environment):
        for verb in (["prepare"], *verbs.values()):
            _timed([str(Path(sys.executable).parent / "ddpm"), *verb], root, environment)
        times = {
            name: [_first_work(verb, root, environment) for _ in range(1 if TINY else 5)]
            for name, verb in verbs.items()
        }
    return {
        "work": "seconds from the start of a stage's process to its first progress",
        "per_call": "one process",
        "checks": {},
        "times": {name: {"wall": values} for name, values in times.items()},
        "figures": [figure(name, values, "s", goals[name], most=True) for name, values in times.items()],
    }
