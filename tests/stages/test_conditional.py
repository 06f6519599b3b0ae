"""Checks class-conditional models in the stages: labels from the dataset to the pictures, and how requests fail."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.models import Model
from PIL import Image

from ddpm import Denoiser, sample, tracking
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.timesteps import network_times
from ddpm.errors import InputError
from ddpm.files import arrays, checkpoint, models, paths, records, samples
from ddpm.files.dataset import read_dataset, read_dataset_record
from ddpm.files.params import Params
from ddpm.parameters import OtherNetwork, Point
from ddpm.reporting.published import preview_fids
from ddpm.runtime.drawing import class_labels, to_uint8
from ddpm.scores import features, fidelity
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train
from ddpm.tools.generate import generate
from ddpm.tools.preview import preview_file, previews
from ddpm.tracking.lineage import identity_of_model, training_identity

Smoke = Callable[..., Params]

ROWS = {
    "plain": {"sampler": "ddim"},
    "guided": {"sampler": "ddim", "guidance": 3},
    "free": {"sampler": "ddim", "guidance": 0.0},
    "inside": {"sampler": "ddim", "guidance": 3.0, "guidance_interval": [0.3, 3.0], "guidance_rescale": 0.5},
}
DIT = OtherNetwork(kind="dit", rest={"width": 64, "depth": 3, "heads": 4, "patch": 2})
PLAIN, GUIDED, FREE, INSIDE = (Point(schedule="cosine", sampler=name, steps=4) for name in ROWS)


@pytest.fixture(scope="module")
def params(smoke: Smoke) -> Callable[..., Params]:
    """Returns params(**changes), the smoke recipe with classes and with changed sections."""

    def make(**changes: dict[str, Any]) -> Params:
        base: dict[str, Any] = {
            "diffusion": {"conditional": True},
            "training": {"steps": 12},
            "samplers": ROWS,
            "sweep": {"samplers": list(ROWS), "steps": [4]},
        }
        return smoke(**{name: {**base.get(name, {}), **changes.get(name, {})} for name in {*base, *changes}})

    return make


@pytest.fixture(scope="module")
def trained(params: Callable[..., Params], digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a root with a conditional digits model that was trained for a moment."""
    root = tmp_path_factory.mktemp("conditional")
    (root / "dataset").symlink_to(digits / "dataset")
    train(params(), "cosine", root)
    return root


@pytest.fixture(scope="module")
def unconditional(smoke: Smoke, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unconditional")
    (root / "dataset").symlink_to(digits / "dataset")
    train(smoke(training={"steps": 1}), "cosine", root)
    return root


def draw(root: Path, params: Params, point: Point) -> dict[str, np.ndarray]:
    sample_point(params, point, root)
    with np.load(root / paths.samples_file(point)) as archive:
        return dict(archive)


def test_the_checkpoint_says_how_many_classes_it_knows(trained: Path, params: Callable[..., Params]) -> None:
    denoiser, about = checkpoint.load(trained / "models/cosine")
    assert about.network.classes == 10 and about.data.classes == [str(digit) for digit in range(10)]
    x, t = gaussian(0, range(3), 0, (1, 8, 8)), torch.full((3,), 50.0)
    told = denoiser.net(x, t, torch.tensor([1, 2, 3]))
    assert float((told - denoiser.net(x, t)).abs().amax((1, 2, 3)).min()) > 0
    assert identity_of_model(about) == training_identity(params(), "cosine", about.data.sha256)


def test_classes_come_in_turn_and_are_kept_with_the_images(trained: Path, params: Callable[..., Params]) -> None:
    made = draw(trained, params(sampling={"images": 23, "batch": 23}), GUIDED)
    assert made["labels"].tolist() == [image % 10 for image in range(23)] and made["evaluations"] == 8
    for batch in (1, 7):
        split = draw(trained, params(sampling={"images": 23, "batch": batch}), GUIDED)
        assert np.array_equal(split["labels"], made["labels"])
        assert np.abs(split["images"].astype(int) - made["images"]).max() <= 1
    assert samples.read_samples(trained / paths.samples_file(GUIDED)).evaluations == 8


def test_guidance_of_the_row_is_that_of_the_denoiser(trained: Path, params: Callable[..., Params]) -> None:
    few, (denoiser, _) = (
        params(sampling={"images": 6, "batch": 6}),
        checkpoint.load(trained / "models/cosine", clip=True),
    )
    x_T = gaussian(few.seed, range(6), 0, (1, 8, 8))
    for point, guidance, evaluations in ((PLAIN, 1.0, 4), (GUIDED, 3.0, 8), (FREE, 0.0, 4)):
        made = draw(trained, few, point)
        aimed = Denoiser(denoiser.net, denoiser.schedule, denoiser.target, True, torch.arange(6), guidance)
        expected = to_uint8(sample(aimed, x_T, "ddim", 4)).numpy().astype(int)
        assert np.abs(expected - made["images"]).max() <= 1 and made["evaluations"] == evaluations
    limited = replace(aimed, guidance=3.0, guidance_interval=(0.3, 3.0), guidance_rescale=0.5)
    made = draw(trained, few, INSIDE)
    assert np.abs(to_uint8(sample(limited, x_T, "ddim", 4)).numpy().astype(int) - made["images"]).max() <= 1
    inside = sum(limited.evaluations(t) == 2 for t in network_times(denoiser.schedule, 4))
    assert 0 < inside < 4 and made["evaluations"] == 4 + inside


def test_an_unconditional_set_is_as_it_was(unconditional: Path, smoke: Smoke) -> None:
    point = Point.parse("cosine-ddim-5")
    assert set(draw(unconditional, smoke(), point)) == {"images", "evaluations", samples.RECORD}
    assert models.read_model_record(unconditional / "models/cosine").network.classes == 0


def test_previews_show_the_classes_in_turn(trained: Path, params: Callable[..., Params], tmp_path: Path) -> None:
    (tmp_path / "dataset").symlink_to(trained / "dataset")
    now = params(training={"steps": 2}, compute={"preview_every": 2})
    shown: list[arrays.Images] = []
    train(now, "cosine", tmp_path, previews(now, tmp_path, "cosine", lambda step, picture: shown.append(picture)))
    assert len(shown) == 1 and (tmp_path / preview_file("cosine", 2)).exists()


def test_the_fid_of_previews_is_that_of_their_images(
    trained: Path, params: Callable[..., Params], tmp_path: Path
) -> None:
    """The model of the last preview is the saved model. Drawing previews changes no weight."""
    (tmp_path / "dataset").symlink_to(trained / "dataset")
    now = params(training={"steps": 3}, compute={"preview_every": 3, "preview_fid": 50})
    scores: dict[int, float] = {}
    train(now, "cosine", tmp_path, previews(now, tmp_path, "cosine", lambda *_: None, scores.__setitem__))
    denoiser, _ = checkpoint.load(tmp_path / "models/cosine", clip=True)
    drawn = sample(
        replace(denoiser, labels=torch.arange(50) % 10), gaussian(now.seed, range(50), 0, (1, 8, 8)), "ddim", 25
    )
    extractor = features.load("inception", 64, tmp_path / paths.CACHE / "inception")
    mine, real = (
        features.extract(extractor, images) for images in (to_uint8(drawn).numpy(), read_dataset(tmp_path).train)
    )
    expected = fidelity.fid(fidelity.statistics(mine), fidelity.statistics(real))
    assert scores == {3: pytest.approx(expected, rel=1e-3)}
    # The report shows the FIDs of previews as long as the previewed model is the present model.
    row: Any = SimpleNamespace(schedule="cosine")
    assert preview_fids(tmp_path, [row]) == {"cosine": scores}
    longer = params(training={"steps": 6}, compute={"preview_every": 3, "preview_fid": 50})
    train(longer, "cosine", tmp_path, previews(longer, tmp_path, "cosine", lambda *_: None))
    assert list(preview_fids(tmp_path, [row])["cosine"]) == [3, 6]
    # Another previewing does not keep the FIDs of a later step, whose weights this training may never have.
    shorter = params(training={"steps": 5}, compute={"preview_every": 4, "preview_fid": 50})
    train(shorter, "cosine", tmp_path, previews(shorter, tmp_path, "cosine", lambda *_: None), fresh=True)
    assert list(preview_fids(tmp_path, [row])["cosine"]) == [4]
    train(params(training={"steps": 7}), "cosine", tmp_path)
    assert preview_fids(tmp_path, [row]) == {}
    train(now, "cosine", tmp_path, fresh=True)

    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "dataset").symlink_to(trained / "dataset")
    train(params(training={"steps": 3}), "cosine", plain)
    name = "models/cosine/model.safetensors"
    assert (plain / name).read_bytes() == (tmp_path / name).read_bytes()


def model_of(names: list[str], counts: list[int] | None = None) -> models.ModelRecord:
    network = {"kind": "unet", "image_channels": 1, "image_size": 8, "classes": len(names)}
    data = {"shape": [1, 8, 8], "classes": names, "class_counts": counts}
    schedule = {"name": "linear", "timesteps": 100, "schedule": "linear"}
    entries = {"weights_sha256": "w", "schedule": schedule, "target": "eps", "network": network, "data": data}
    return records.build(models.ModelRecord, entries)


def test_a_class_by_name_or_number() -> None:
    about = model_of(["cat", "2", "dog"])
    asked = {label: class_labels(about, 2, label) for label in ("dog", "2", "0", 2, None)}
    assert {label: list(labels) for label, labels in asked.items() if labels is not None} == {
        "dog": [2, 2],
        "2": [1, 1],  # a name takes precedence over a number
        2: [1, 1],
        "0": [0, 0],
        None: [0, 1],
    }
    for wrong in ("cow", "3", "-1", ""):
        with pytest.raises(ValueError, match=r"no class '.*'; there are cat, 2, dog"):
            class_labels(about, 2, wrong)


def test_a_sample_set_has_the_classes_of_the_data() -> None:
    def labels(counts: list[int] | None, count: int) -> list[int]:
        found = class_labels(model_of(["cat", "cow", "dog"], counts), count)
        assert found is not None
        return list(found)

    assert labels([40, 40, 40], 7) == labels([40, 36, 45], 7) == labels(None, 7) == [0, 1, 2, 0, 1, 2, 0]
    counts = np.array([900, 90, 10])
    many = labels(counts.tolist(), 1000)
    assert np.bincount(many).tolist() == counts.tolist()
    # In every prefix, each class is within one image of its share. A shorter list is a prefix of a longer list.
    for count in range(1, 1000):
        assert np.abs(np.bincount(many[:count], minlength=3) - counts * count / 1000).max() < 1
    assert labels(counts.tolist(), 123) == many[:123]
    assert labels([0, 5, 0], 4) == [1, 1, 1, 1]


def test_generate_makes_the_class_asked_for(trained: Path, params: Callable[..., Params], tmp_path: Path) -> None:
    model, out = str(trained / "models/cosine"), tmp_path / "grid.png"

    def picture(**options: Any) -> np.ndarray:
        generate(params(), out=out, count=4, model=model, steps=4, **options)
        return np.asarray(Image.open(out)).astype(int)

    in_turn, threes = picture(guidance=3.0), picture(label="3", guidance=3.0)
    cell = (in_turn.shape[0] - 3) // 2 + 1  # the fourth of 2 x 2 images is a three in both pictures
    assert np.abs(in_turn - threes)[cell:, cell:].max() <= 1 and np.abs(in_turn - threes)[:cell, :cell].max() > 1
    assert np.abs(picture(label="3") - threes).max() > 1
    with pytest.raises(InputError, match="generate: no class 'ten'; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"):
        picture(label="ten")
    with pytest.raises(InputError, match="finite"):
        picture(guidance=float("inf"))


def test_an_unconditional_model_refuses_labels_and_guidance(unconditional: Path, smoke: Smoke, tmp_path: Path) -> None:
    model, out = str(unconditional / "models/cosine"), tmp_path / "grid.png"
    for options, message in (({"label": "3"}, "takes no label"), ({"guidance": 2.0}, "class-conditional")):
        with pytest.raises(InputError, match=message):
            generate(smoke(), out=out, count=4, model=model, **options)
    rows = {"guided": {"sampler": "ddim", "guidance": 2.0}}
    with pytest.raises(InputError, match="class-conditional"):
        sample_point(smoke(samplers=rows), GUIDED, unconditional)
    assert not out.exists() and not (unconditional / paths.samples_file(GUIDED)).exists()
    with pytest.raises(InputError, match=r"samplers\.guided: guidance needs a class-conditional model"):
        smoke(samplers=rows, sweep={"samplers": ["guided"]})


def test_no_classes_in_the_dataset(digits: Path, params: Callable[..., Params], tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name in ("train.npy", "test.npy"):
        (folder / name).symlink_to(digits / "dataset" / name)
    about = {**read_dataset_record(digits).content, "classes": None}
    records.write_record(folder / "dataset.json", about, sorted(folder.glob("*.npy")))
    with pytest.raises(InputError, match=r"diffusion\.conditional is true, but the dataset digits has no classes"):
        train(params(), "cosine", tmp_path)
    assert not (tmp_path / "models").exists()


@pytest.fixture
def champion(
    trained: Path,
    params: Callable[..., Params],
    write_scores: Callable[..., None],
    empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[str, np.ndarray]:
    """Creates a store in which a conditional model is champion, and returns its 12 samples: classes 0 to 9, 0 and 1."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root, settings = tmp_path / "checkout", params(sampling={"images": 12, "batch": 12})
    shutil.copytree(trained, root, symlinks=True, ignore=shutil.ignore_patterns(".cache"))
    shutil.copyfile(empty_database, root / "mlflow.db")
    made = draw(root, settings, GUIDED)
    write_scores(root, GUIDED, 3.0)
    tracking.promote(settings, root)
    return tracking.tracking_uri(root), made["images"]


def test_the_registered_model_takes_a_class(champion: tuple[str, np.ndarray]) -> None:
    uri, made = champion
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/ddpm-digits@champion")
    images = model.predict(pd.DataFrame({"n": [12]})).astype(int)
    assert np.abs(images - made).max() <= 1
    threes = model.predict(pd.DataFrame({"n": [12, 1], "label": ["3", None]})).astype(int)
    assert np.abs(threes[3] - images[3]).max() <= 1 and np.abs(threes[2] - images[2]).max() > 1
    assert np.abs(threes[12] - images[0]).max() <= 1
    with pytest.raises(ValueError, match="no class 'ten'; there are 0, 1, 2"):
        model.predict(pd.DataFrame({"n": [1], "label": ["ten"]}))
    columns = Model.load("models:/ddpm-digits@champion").signature.inputs.inputs
    assert [(column.name, column.required) for column in columns][-1] == ("label", False)


@pytest.mark.proof
def test_mlflow_serves_the_class_asked_for(
    champion: tuple[str, np.ndarray], serve: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    """A client of `mlflow models serve` gets images of the requested class, equal to the samples.

    An unknown class is refused.
    """
    uri, made = champion
    command = ("models", "serve", "--model-uri", "models:/ddpm-digits@champion", "--env-manager", "local")
    with serve(tmp_path, *command, MLFLOW_TRACKING_URI=uri, OMP_NUM_THREADS="1") as url:

        def answer(*rows: dict[str, Any]) -> np.ndarray:
            body = json.dumps({"dataframe_records": rows}).encode()
            request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                return np.array(json.load(response)["predictions"])

        in_turn, threes = answer({"n": 12}), answer({"n": 4, "label": "3"})
        mixed = answer({"n": 4, "label": "3"}, {"n": 2, "label": None})
        with pytest.raises(urllib.error.HTTPError) as refused:
            answer({"n": 1, "label": "ten"})
        assert "no class 'ten'; there are 0, 1, 2" in refused.value.read().decode()
    assert np.abs(in_turn - made).max() <= 1
    assert np.abs(threes[3] - made[3]).max() <= 1 and np.abs(threes[2] - made[2].astype(int)).max() > 1
    assert np.abs(mixed[:4] - threes).max() <= 1 and np.abs(mixed[4:] - made[:2]).max() <= 1


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_conditional_digits_model_makes_the_digits_asked_for(
    kind: str, params: Callable[..., Params], digits: Path, tmp_path: Path
) -> None:
    """A classifier, 99% right on held-out real digits, recognises the requested class, and more often under guidance.

    Measured with the U-Net: 9% at w = 0, 88% at w = 1, 99.8% at w = 3.
    """
    from sklearn.svm import SVC

    (tmp_path / "dataset").symlink_to(digits / "dataset")
    rows = {f"w{w}": {"sampler": "ddim", "spacing": "trailing", "guidance": float(w)} for w in (0, 1, 3)}
    settings = params(
        training={
            **{"unet": {"steps": 400}, "dit": {"steps": 2000, "learning_rate": 3e-3}}[kind],
            "batch": 64,
            "ema": 0.98,
            "threads": 2,
        },
        sampling={"images": 400, "batch": 400},
        samplers=rows,
        sweep={"samplers": list(rows), "steps": [20]},
    )
    if kind == "dit":
        settings = settings.model_copy(update={"network": DIT})
    train(settings, "cosine", tmp_path)
    dataset = read_dataset(tmp_path)

    def pixels(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1) / 16

    classifier = SVC(gamma=0.001, C=10).fit(pixels(dataset.train), dataset.train_labels)
    assert classifier.score(pixels(dataset.test), dataset.test_labels) > 0.97
    right = {}
    for point in settings.points():
        made = draw(tmp_path, settings, point)
        right[point.sampler] = classifier.score(pixels(made["images"]), made["labels"])
    assert right["w0"] < 0.2 and 0.7 < right["w1"] < right["w3"] and right["w3"] > 0.95, right
