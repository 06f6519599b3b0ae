"""Measures what DVC, Prefect and process start-up add to the stages in a clone of this checkout, and the stage `prepare`."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.harness import TINY, alternate, figure, ratios
from ddpm.databases import empty
from ddpm.files import dataset
from ddpm.files.params import Params
from ddpm.files.yaml_file import rewritten
from ddpm.parameters import Data
from ddpm.provenance import dvc_lock
from ddpm.runtime.display import PREFIX
from ddpm.stages.prepare import prepare as run_prepare
from flows.servers import embedded

ROOT = Path(__file__).parents[1]
RECIPE = "smoke"
FLOW = [sys.executable, "-m", "flows", "--no-promote"]
# includes the changes of ddpm.tools.dvc, while `python -m dvc` is plain DVC
DVC = str(Path(sys.executable).parent / "dvc")
REPEATS = 1 if TINY else 3
PICTURES = 200 if TINY else 5_000  # PNG files in the zip that `prepare` reads
SIZES = (2, 4) if TINY else (12, 50, 200)  # numbers of points of the sweeps

# In the sweeps every stage does as little work as possible, so that most of their time is the overhead of the flow.
LEAST = {
    "network": {"channels": 8},
    "training": {"steps": 10},
    "sampling": {"images": 8, "batch": 8},
    "evaluation": {"images": 8},
}

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
def _clone(points: int = 0) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yields a fresh clone of this checkout's commit, and the environment for its commands.

    points: the size of the sweep, with LEAST work for each point; 0 for the recipe as it is.
    """
    if not (embedded.EMPTY.exists() and empty.EMPTY.exists()):
        raise SystemExit("the empty databases are missing, which make flows start faster; call `make bench`")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
        text = (ROOT / "recipes" / f"{RECIPE}.yaml").read_text(encoding="utf-8")
        (root / "params.yaml").write_text(_sweep(text, points) if points else text, encoding="utf-8")
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


def _sweep(text: str, points: int) -> str:
    """Returns the recipe with two samplers at 1, 2, ... steps, and LEAST work for each point."""

    def change(document: Any) -> None:
        for section, values in LEAST.items():
            document[section].update(values)
        document["sweep"]["steps"] = list(range(1, points // 2 + 1))

    return rewritten(text, change)


@contextmanager
def _server(root: Path, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Runs the Prefect server of `make up` while the block runs. Yields the environment of flows that use that server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with subprocess.Popen(
        [sys.executable, "-m", "flows.servers.up", "prefect"],
        cwd=root,
        env={**environment, "PREFECT_PORT": port},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("ready") for line in process.stdout)
        yield {**environment, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
        process.send_signal(signal.SIGINT)
        process.communicate()


def _stages(root: Path, environment: dict[str, str]) -> list[str]:
    """Returns the names of all stages of dvc.yaml."""
    command = [DVC, "stage", "list", "--all", "--name-only"]
    listed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def _same_outputs(root: Path, other: Path) -> bool:
    for output in ("dataset/train.npy", "models/cosine/model.safetensors", "report/points.csv"):
        assert (root / output).read_bytes() == (other / output).read_bytes(), output
    return True


def demo(device: str) -> dict[str, Any]:
    """Measures the smoke recipe: by the flow, by DVC and the flow with nothing to do, and as bare Python calls."""
    flow, bare = list[float](), list[float]()
    for _ in range(REPEATS):
        with _clone() as (root, environment), _clone() as (other, others):
            flow.append(_timed(FLOW, root, environment))
            bare.append(_timed([sys.executable, "-c", BARE], other, others))
            same = _same_outputs(root, other)
            if len(flow) < REPEATS:
                continue
            stages, digest = len(_stages(root, environment)), (root / "dvc.lock").read_bytes()
            repro = [_timed([DVC, "repro"], root, environment) for _ in range(REPEATS)]
            again = [_timed(FLOW, root, environment) for _ in range(REPEATS)]
            with _server(root, environment) as beside:
                shared = [_timed(FLOW, root, beside) for _ in range(REPEATS)]
            assert digest == (root / "dvc.lock").read_bytes()
    added = [(whole - calls) / stages for whole, calls in zip(flow, bare, strict=True)]
    ratio = [whole / calls for whole, calls in zip(flow, bare, strict=True)]
    return {
        "work": f"the {RECIPE} recipe, {stages} stages, published to MLflow; the outputs equal those of bare calls",
        "per_call": "one run",
        "checks": {"same outputs": same, "stages": stages},
        "times": {
            "flow": {"wall": flow},
            "stages called directly, in one process": {"wall": bare},
            "dvc repro with nothing to do": {"wall": repro},
            "flow with nothing to do": {"wall": again},
            "flow with nothing to do, while a Prefect server runs": {"wall": shared},
        },
        "figures": [
            figure("overhead of the flow per stage", added, "s", 1.0, most=True),
            figure("flow / the same stages called directly", ratio, "x", 1.5, most=True),
            figure("dvc repro with nothing to do", repro, "s", 5.0, most=True),
            figure("flow with nothing to do", again, "s", 12.0, most=True),
            figure("flow with nothing to do, while a Prefect server runs", shared, "s", 6.0, most=True),
        ],
    }


def _plain(root: Path, names: Sequence[str], folder: Path) -> None:
    """Makes a DVC repository with as many stages, dependencies and outputs as the sweep in `root`, and no other features."""
    stages, files, locked = {}, set[str](), dvc_lock.read(root)
    for name in names:
        stage = locked[name]
        deps, outs = ([entry["path"] for entry in stage.get(kind, ())] for kind in ("deps", "outs"))
        stages[name.replace("@", "-")] = {"cmd": "true", "deps": deps, "outs": outs}
        files.update(deps, outs)
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir():
            shutil.copytree(root / name, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(root / name, target)
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}), encoding="utf-8")
    for command in (["git", "init", "--quiet"], ["dvc", "init", "--quiet"], ["dvc", "commit", "--quiet", "--force"]):
        command = [sys.executable, "-m", *command] if command[0] == "dvc" else command  # noqa: PLW2901
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


def sweeps(device: str) -> dict[str, Any]:
    """Measures the overhead of the flow per point of several sweeps.

    For the largest sweep, also measures `dvc repro` and the report.
    """
    times: dict[str, dict[str, list[float]]] = {}
    added: dict[int, float] = {}
    for points in SIZES:
        with _clone(points) as (root, environment), _clone(points) as (other, others):
            flow, bare = _timed(FLOW, root, environment), _timed([sys.executable, "-c", BARE], other, others)
            same, added[points] = _same_outputs(root, other), (flow - bare) / points
            times |= {
                f"flow, {points} points": {"wall": [flow]},
                f"stages called directly, {points} points": {"wall": [bare]},
            }
            if points == SIZES[-1]:
                names, plain = _stages(root, environment), other.parent / "plain"
                plain.mkdir()
                _plain(root, names, plain)
                stages = len(names)
                sides = {
                    "ours": lambda root=root, env=environment: _timed([DVC, "repro"], root, env),
                    "plain": lambda plain=plain, env=environment: _timed(
                        [sys.executable, "-m", "dvc", "repro"], plain, env
                    ),
                }
                repro, _ = alternate(sides, REPEATS)
                reports = [
                    _timed([str(Path(DVC).with_name("ddpm")), "report"], root, environment) for _ in range(REPEATS)
                ]
    largest = SIZES[-1]
    times[f"dvc repro with nothing to do, {largest} points"] = repro["ours"]
    times[f"the same with plain DVC, {stages} stages"] = repro["plain"]
    nothing = f"dvc repro with nothing to do, {largest} points: this pipeline / a plain DVC pipeline of as many stages"
    clock, processor = (
        [ours / plain for ours, plain in zip(repro["ours"][kind], repro["plain"][kind], strict=True)]
        for kind in ("wall", "cpu")
    )
    return {
        "work": f"the {RECIPE} recipe with {', '.join(map(str, SIZES))} points and a tiny network, published to MLflow",
        "per_call": "one run",
        "checks": {"same outputs": same, "stages of the largest": stages},
        "times": times,
        "figures": [
            *(
                figure(f"overhead of the flow per point, {points} points", [value], "s")
                for points, value in added.items()
            ),
            figure(
                f"overhead of the flow per point: sweep of {largest} points / sweep of {SIZES[0]} points",
                [added[largest] / added[SIZES[0]]],
                "x",
                1.2,
                most=True,
            ),
            figure(nothing, clock, "x", 1.2, most=True),
            figure(f"{nothing}, processor time", processor, "x"),
            figure(f"report of {largest} points", reports, "s", 10.0, most=True),
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


def _pack(path: Path) -> str:
    """Writes a zip of PICTURES pictures in ten class folders, from CIFAR-10 if available, else random. Returns their source."""
    whole = Path(os.environ.get("BENCH_DATA", ROOT.parent / "shared" / "data")) / "cifar10-test.zip"
    with zipfile.ZipFile(path, "w") as packed:
        if whole.is_file():
            with zipfile.ZipFile(whole) as archive:
                names = [name for name in archive.namelist() if name.endswith(".png")]
                for name in names[:: len(names) // PICTURES][:PICTURES]:
                    packed.writestr(name.partition("/")[2], archive.read(name))
            return "CIFAR-10"
        random = np.random.default_rng(0)
        for index in range(PICTURES):
            small = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
            file = io.BytesIO()
            small.resize((32, 32)).save(file, "png")
            packed.writestr(f"{index % 10}/{index:05d}.png", file.getvalue())
    return "made here"


def prepare(device: str) -> dict[str, Any]:
    """Measures the preparation of PICTURES PNG files from a zip."""
    from torchvision.datasets import ImageFolder

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "images").mkdir()
        source = _pack(root / "images" / "pack.zip")
        base = Params.load(ROOT / "params.yaml")
        params = base.model_copy(update={"data": Data(source="image_folder", path="images", test_fraction=0.0)})

        def ours() -> dataset.Dataset:
            run_prepare(params, root)
            return dataset.read_dataset(root)

        def theirs() -> tuple[np.ndarray, np.ndarray]:
            with tempfile.TemporaryDirectory(dir=root) as unpacked:
                with zipfile.ZipFile(root / "images" / "pack.zip") as archive:
                    archive.extractall(unpacked)
                pairs = [(np.asarray(image), label) for image, label in ImageFolder(unpacked)]
            images = np.stack([image for image, _ in pairs]).transpose(0, 3, 1, 2)
            labels = np.array([label for _, label in pairs])
            np.save(root / "images.npy", images)
            return images, labels

        times, given = alternate({"ours": ours, "ImageFolder": theirs}, 5, warmups=1)
        mine, (images, labels) = given["ours"], given["ImageFolder"]
        assert np.array_equal(mine.train, images) and np.array_equal(mine.train_labels, labels)
    return {
        "work": f"{PICTURES:,} PNG files in a zip ({source}) to one array with labels;"
        " ours also writes checksums, mean and deviation, and a preview",
        "per_call": f"all {PICTURES:,} images",
        "checks": {"same pixels and labels": True},
        "times": times,
        "figures": ratios(times, "ImageFolder", 3.0, name="torchvision's ImageFolder / ours"),
    }
