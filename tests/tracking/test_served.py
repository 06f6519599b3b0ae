"""Checks the registered model as its users load it: from the registry, outside of this checkout."""

from __future__ import annotations

import json
import os
import pickletools
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from mlflow.models import Model
from mlflow.tracking import MlflowClient
from PIL import Image

from ddpm import tracking
from ddpm.files import arrays, paths
from ddpm.files.models import read_model_record
from ddpm.files.params import Params
from ddpm.files.samples import read_samples
from ddpm.parameters import Point
from ddpm.provenance import code
from ddpm.tools.generate import generate
from ddpm.tracking.registry.registry import served_modules

Smoke = Callable[..., Params]

POINT = Point(schedule="cosine", sampler="ddim", steps=5)  # the point of the champion

# Removes this checkout from Python's paths, and then loads the model.
ELSEWHERE = """
import importlib.util, json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in f"{finder!r}{getattr(finder, '__module__', '')}"]
sys.path = [path for path in sys.path if path != sys.argv[1]]
assert importlib.util.find_spec("ddpm") is None, importlib.util.find_spec("ddpm")
import mlflow, numpy, pandas
mlflow.set_tracking_uri(sys.argv[2])
model = mlflow.pyfunc.load_model(sys.argv[3])
images = model.predict(pandas.DataFrame({"n": [6]}))
numpy.save("default.npy", images)
rows = {"n": [2, 3], "seed": [0, 7], "steps": [5, 2], "sampler": ["ddim", "ddpm"]}
numpy.save("rows.npy", model.predict(pandas.DataFrame(rows)))
numpy.save("example.npy", model.predict(model.input_example))
errors = []
for wrong in ({"n": [0]}, {"n": [1], "sampler": ["none"]}, {"n": [1], "steps": [100000]}, {"seed": [1]}):
    try:
        model.predict(pandas.DataFrame(wrong))
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
import ddpm
print(json.dumps({"errors": errors, "ddpm": ddpm.__file__}))
"""


@pytest.fixture
def params(smoke: Smoke) -> Params:
    return smoke(training={"steps": 24})


def model_folder(root: Path) -> Path:
    client = MlflowClient(tracking.tracking_uri(root))
    version = client.get_model_version_by_alias("ddpm-digits", "champion")
    location = client.get_model_version_download_uri("ddpm-digits", version.version)
    return Path(location.removeprefix("file://"))


def test_it_makes_the_samples_of_its_point_without_this_checkout(
    checkout: Path, params: Params, tmp_path: Path
) -> None:
    tracking.promote(params, checkout)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    repository = Path(__file__).parents[2]
    uri = tracking.tracking_uri(checkout)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(repository), uri, "models:/ddpm-digits@champion"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert not Path(told["ddpm"]).is_relative_to(repository)
    assert Path(told["ddpm"]).is_relative_to(model_folder(checkout))

    samples = read_samples(checkout / paths.samples_file(POINT)).images
    other = read_samples(checkout / paths.samples_file(Point(schedule="cosine", sampler="ddpm", steps=2))).images
    default, rows = np.load(elsewhere / "default.npy"), np.load(elsewhere / "rows.npy")
    assert default.dtype == np.uint8
    assert np.abs(default.astype(int) - samples[:6]).max() <= 1  # float32 with another batch size
    assert np.abs(rows[:2].astype(int) - samples[:2]).max() <= 1
    assert rows.shape == (5, 1, 8, 8) and (rows[2:] != other[:3]).any()  # uses another seed
    assert np.load(elsewhere / "example.npy").shape == (4, 1, 8, 8)
    faults = ["n = 0", "no sampler 'none'", "steps = 100000", "missing inputs"]
    assert [fault in error for fault, error in zip(faults, told["errors"], strict=True)] == [True] * 4


def assert_generated(images: np.ndarray, params: Params, out: Path, seed: int) -> None:
    """Asserts that the images equal those of `ddpm generate` with the champion, bit for bit."""
    generate(params, out=out, count=len(images), seed=seed)
    with Image.open(out) as picture:
        np.testing.assert_array_equal(arrays.grid(images.astype(np.uint8))[0], np.asarray(picture))


@pytest.mark.proof
def test_mlflow_serves_it(
    checkout: Path,
    params: Params,
    tmp_path: Path,
    serve: Callable[..., AbstractContextManager[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracking.promote(params, checkout)
    uri = tracking.tracking_uri(checkout)
    command = ("models", "serve", "--model-uri", "models:/ddpm-digits@champion", "--env-manager", "local")
    with serve(tmp_path, *command, MLFLOW_TRACKING_URI=uri, OMP_NUM_THREADS="1") as url:
        body = json.dumps({"dataframe_records": [{"n": 6, "seed": 3}]}).encode()
        request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            images = np.array(json.load(answer)["predictions"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert_generated(images, params, tmp_path / "grid.png", 3)


BARE = """
import importlib.util, sys
assert importlib.util.find_spec("ddpm") is None
import mlflow, numpy, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/ddpm-digits@champion")
numpy.save("images.npy", model.predict(pandas.DataFrame({"n": [6], "seed": [3]})))
"""


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_it_needs_no_more_than_its_own_requirements(
    checkout: Path, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment contains only the model's requirements.txt, in the versions that are installed and cached here."""
    tracking.promote(params, checkout)
    uri, folder = tracking.tracking_uri(checkout), tmp_path / "bare"
    python, uv = folder / "bin" / "python", str(Path(sys.executable).with_name("uv"))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    versions = tmp_path / "versions.txt"
    freeze = [uv, "pip", "freeze", "--python", sys.executable, "--exclude-editable"]
    versions.write_text(subprocess.run(freeze, capture_output=True, text=True, check=True).stdout)
    for command in (
        [uv, "venv", "--python", sys.executable, str(folder)],
        [
            uv,
            "pip",
            "install",
            "--python",
            str(python),
            "--constraints",
            str(versions),
            "--requirements",
            str(model_folder(checkout) / "requirements.txt"),
        ],
        [str(python), "-c", BARE, uri],
    ):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert_generated(np.load(tmp_path / "images.npy"), params, tmp_path / "grid.png", 3)


def test_its_folder_holds_no_pickle_and_says_what_it_needs(checkout: Path, params: Params) -> None:
    tracking.promote(params, checkout)
    folder = model_folder(checkout)
    for path in folder.rglob("*"):
        if path.is_file():
            with pytest.raises((ValueError, IndexError)):
                list(pickletools.genops(path.read_bytes()))
    model = Model.load(folder)
    assert [(column.name, column.required) for column in model.signature.inputs.inputs] == [
        ("n", True),
        ("seed", False),
        ("steps", False),
        ("sampler", False),
    ]
    assert model.signature.outputs.inputs[0].shape == (-1, 1, 8, 8)
    assert model.metadata["point"] == POINT.name
    needed = {line.partition("=")[0].strip("<>") for line in (folder / "requirements.txt").read_text().split()}
    assert {name.partition("<")[0] for name in needed} == {
        "mlflow",
        "numpy",
        "pandas",
        "pydantic",
        "safetensors",
        "torch",
    }


def test_its_code_is_what_python_imports_for_it(checkout: Path, params: Params) -> None:
    """Compares modules of this package only. A function may import more, such as the part with the C compiler."""
    tracking.promote(params, checkout)
    carried = model_folder(checkout) / "code"
    modules = served_modules(read_model_record(checkout / "models/cosine"))
    imports = ", ".join(sorted(name for name in modules if name in code.modules([name])))
    program = f"import sys, {imports}; print(*[name for name in sys.modules if name.split('.')[0] == 'ddpm'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=carried, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == set(code.modules(modules))
    files = {path.relative_to(carried) for path in carried.rglob("*") if path.suffix in (".py", ".c")}
    assert files == set(code.files(*modules))
