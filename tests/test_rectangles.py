"""Runs images of 16x24 pixels through every stage. Red rises to the right and green downwards, so a transposition shows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ddpm import Denoiser, NoiseSchedule, sample, tracking
from ddpm.diffusion.bound import variational_bound
from ddpm.diffusion.noise import gaussian
from ddpm.files import checkpoint, records
from ddpm.files.dataset import read_dataset
from ddpm.files.params import Params
from ddpm.files.samples import read_samples
from ddpm.reporting import page
from ddpm.scores.copying import nearest
from ddpm.stages.evaluate import evaluate
from ddpm.stages.likelihood import likelihood
from ddpm.stages.prepare import prepare
from ddpm.stages.report import report
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train
from ddpm.tools.exchange import WEIGHTS, export_diffusers, import_diffusers
from ddpm.tools.generate import generate

HEIGHT, WIDTH, COUNT = 16, 24, 60
RECIPES = Path(__file__).parents[1] / "recipes"


def pictures() -> np.ndarray:
    """Returns images, uint8 N,H,W,3: red rises to the right, green rises downwards, and blue is constant within an image."""
    generator = np.random.default_rng(0)
    images = np.zeros((COUNT, HEIGHT, WIDTH, 3))
    images[..., 0] = np.linspace(30, 220, WIDTH)
    images[..., 1] = np.linspace(30, 220, HEIGHT)[:, None]
    images[..., 2] = generator.integers(30, 220, (COUNT, 1, 1))
    return (images + generator.normal(0, 5, images.shape)).clip(0, 255).astype(np.uint8)


def recipe(smoke: Callable[..., Params]) -> Params:
    return smoke(
        data={"source": "image_folder", "size": [HEIGHT, WIDTH]},
        network={"attention": [8]},
        diffusion={"target": "v"},
        training={"steps": 60, "batch": 16, "validation_images": 4},
        sampling={"images": 16},
        evaluation={"images": 16},
        likelihood={"images": 4, "times": 5},
        sweep={"samplers": ["ddim"], "steps": [5, 20]},
        tracking={"name": "rectangles"},
    )


@pytest.fixture(scope="module")
def params(smoke: Callable[..., Params]) -> Params:
    return recipe(smoke)


@pytest.fixture(scope="module")
def walked(params: Params, inception_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a root with the outputs of every stage. Tests must not change this root."""
    root = tmp_path_factory.mktemp("rectangles")
    (root / "images").mkdir()
    for index, image in enumerate(pictures()):
        Image.fromarray(image).save(root / f"images/{index:03d}.png")
    (root / ".cache").mkdir()
    (root / ".cache/inception").symlink_to(inception_cache)
    prepare(params, root)
    train(params, "cosine", root)
    likelihood(params, "cosine", root)
    for point in params.points():
        sample_point(params, point, root)
        evaluate(params, point, root)
    report(params, root)
    return root


def slopes(images: np.ndarray) -> tuple[float, float]:
    """Returns correlations of the mean image of N,C,H,W: red with the slope to the right, and green with the slope downwards."""
    red, green = images.mean(0)[0], images.mean(0)[1]
    across, down = (
        np.broadcast_to(np.arange(WIDTH), red.shape),
        np.broadcast_to(np.arange(HEIGHT)[:, None], green.shape),
    )
    return tuple(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in ((red, across), (green, down)))  # type: ignore[return-value]


def cells(picture: Path, columns: int) -> np.ndarray:
    """Returns the images of a grid, N,C,H,W, which the grid shows enlarged."""
    pixels = np.asarray(Image.open(picture))[1:, 1:]
    scale = 64 // WIDTH
    high, wide = HEIGHT * scale + 1, WIDTH * scale + 1
    assert pixels.shape[1] == columns * wide and pixels.shape[0] % high == 0
    rows = pixels.reshape(-1, high, columns, wide, 3)[:, :-1, :, :-1][:, ::scale, :, ::scale]
    return rows.transpose(0, 2, 4, 1, 3).reshape(-1, 3, HEIGHT, WIDTH)


def test_the_dataset_holds_the_pixels_of_the_files(walked: Path) -> None:
    dataset = read_dataset(walked)
    assert dataset.record.shape == [3, HEIGHT, WIDTH]
    given = {image.transpose(2, 0, 1).tobytes() for image in pictures()}
    assert {image.tobytes() for image in np.concatenate([dataset.train, dataset.test])} == given
    shown = cells(walked / "dataset/preview.png", 10)
    np.testing.assert_array_equal(shown[: len(dataset.train)], dataset.train)


def test_samples_are_upright_in_every_picture(walked: Path, params: Params) -> None:
    """The network learns the slopes. Both correlations would be 1 without noise, and a transposed image has 0."""
    point = params.points()[-1]
    images = read_samples(walked / f"samples/{point.name}.npz").images
    assert images.shape == (16, 3, HEIGHT, WIDTH)
    assert min(slopes(images)) > 0.8
    np.testing.assert_array_equal(cells(walked / f"samples/{point.name}.png", 4), images)
    report_page = (walked / "report/index.html").read_text(encoding="utf-8")
    assert page._strip(images[: page.SHOWN]) in report_page and "3 × 16 × 24" in report_page
    model = records.read_record(walked / "models/cosine/model.json")
    assert model["network"]["image_size"] == [HEIGHT, WIDTH] and model["data"]["shape"] == [3, HEIGHT, WIDTH]


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"count": 9}, 3),
        ({"kind": "progressive", "count": 2}, 10),
        ({"kind": "strip", "count": 2}, 11),
        ({"kind": "interpolate", "of": (0, 1), "count": 3}, 5),
        ({"kind": "blend", "of": (0, 1), "count": 3}, 5),
        ({"kind": "encode-decode", "of": (4,)}, 4),
    ],
)
def test_generated_pictures_are_upright(
    walked: Path,
    params: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    columns: int,
) -> None:
    monkeypatch.chdir(walked)
    out = tmp_path / "picture.png"
    generate(params, out=out, model="models/cosine", steps=20, **options)  # type: ignore[arg-type]
    images = cells(out, columns)
    last = images.reshape(-1, columns, *images.shape[1:])[:, -1]
    assert min(slopes(last)) > 0.8
    if options.get("kind") == "interpolate":
        np.testing.assert_array_equal(last[0], read_dataset().test[1])


@torch.no_grad()
def test_diffusers_pipeline_draws_the_same_images(walked: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    export_diffusers(walked / "models/cosine", tmp_path / "pipeline")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline", low_cpu_mem_usage=False)
    assert pipeline.unet.config.sample_size == [HEIGHT, WIDTH]
    denoiser, model = checkpoint.load(walked / "models/cosine")
    x, t = gaussian(0, range(3), 0, tuple(model.data.shape)), torch.tensor([0.0, 50.0, 99.0])
    assert float((pipeline.unet(x, t).sample - denoiser.net(x, t)).abs().max()) < 1e-5
    drawn = pipeline(batch_size=8, num_inference_steps=100, generator=torch.Generator().manual_seed(0)).images
    assert drawn[0].size == (WIDTH, HEIGHT)
    assert min(slopes(np.stack([np.asarray(image).transpose(2, 0, 1) for image in drawn]))) > 0.8

    shutil.copyfile(RECIPES / "smoke.yaml", tmp_path / "params.yaml")
    lines = import_diffusers(tmp_path / "pipeline", "theirs", tmp_path)
    assert any("images 3x16x24" in line for line in lines)
    again, imported = checkpoint.load(tmp_path / "imported/theirs")
    assert imported.data.shape == model.data.shape
    assert imported.network.image_size == [HEIGHT, WIDTH]
    assert imported.network.content["attention"] == [8]
    assert torch.equal(again.net(x, t), denoiser.net(x, t))
    export_diffusers(tmp_path / "imported/theirs", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("pipeline", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def halved(x: Tensor, t: Tensor) -> Tensor:
    """Acts as a network that treats each value separately."""
    return x / 2


def test_where_pixels_are_treated_one_by_one_the_sides_do_not_matter() -> None:
    """16x24 images give the same noise, samples, bound and distances as 24x16 and 384x1 images with the same values in a row."""
    flat = torch.from_numpy(pictures()[:6].reshape(6, -1))
    denoiser, found = Denoiser(halved, NoiseSchedule.named("cosine", 50), "eps", clip=True), []
    for shape in ((3, 16, 24), (3, 24, 16), (3, 384, 1)):
        images, x_T = flat.view(6, *shape), gaussian(0, range(2), 0, shape)
        drawn = sample(denoiser, x_T, "ddim", steps=5)
        bound = variational_bound(denoiser, images, times=5).total
        index, distance = nearest(images[:2].numpy(), images[2:].numpy())
        found.append((drawn.flatten(), bound, torch.from_numpy(index), torch.from_numpy(distance)))
    for other in found[1:]:
        for mine, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


# Runs on the machine that uses the registered model.
SERVED = """
import json, sys
import mlflow, numpy, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/ddpm-rectangles@champion")
numpy.save("drawn.npy", model.predict(pandas.DataFrame({"n": [9], "seed": [0]})))
numpy.save("example.npy", model.predict(model.input_example))
(output,) = model.metadata.signature.outputs.inputs
print(json.dumps(output.shape))
"""


@pytest.mark.proof
def test_the_registered_model_draws_the_same_images(
    walked: Path, params: Params, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "checkout"
    shutil.copytree(walked, root, symlinks=True, ignore=shutil.ignore_patterns("training"))
    shutil.copyfile(empty_database, root / "mlflow.db")
    tracking.promote(params, root)
    uri = tracking.tracking_uri(root)
    done = subprocess.run(
        [sys.executable, "-c", SERVED, uri], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [-1, 3, HEIGHT, WIDTH]
    drawn, example = np.load(tmp_path / "drawn.npy"), np.load(tmp_path / "example.npy")
    assert example.shape == (4, 3, HEIGHT, WIDTH) and min(slopes(drawn)) > 0.8
    monkeypatch.chdir(root)
    generate(params, out=tmp_path / "grid.png", count=9)
    np.testing.assert_allclose(cells(tmp_path / "grid.png", 3).astype(int), drawn, atol=1)
    version = MlflowClient(uri).get_model_version_by_alias("ddpm-rectangles", "champion")
    assert "generates images of 3×16×24" in str(version.description)
