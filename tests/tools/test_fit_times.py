"""Checks that `ddpm fit-times` prints a row that the sample stage accepts with the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from ddpm.cli import app
from ddpm.diffusion import fitted
from ddpm.errors import InputError
from ddpm.files import checkpoint, models
from ddpm.files.models import NetworkEntry
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train
from ddpm.tools.fit_times import fit_row

ROWS = {"third": {"sampler": "unipc", "order": 3, "spacing": "karras"}, "noisy": {"sampler": "ddpm"}}


@pytest.fixture(scope="module")
def trained(digits: Path, smoke: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fitted")
    (root / "dataset").symlink_to(digits / "dataset")
    train(smoke(training={"steps": 10}), "cosine", root)
    return root


def test_the_printed_row_is_sampled_with_the_model_that_it_was_fitted_to(
    trained: Path, smoke: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitted, "REFERENCE", 100)
    folder = trained / "models/cosine"
    text, errors = fit_row(smoke(samplers=ROWS), folder, [2, 3], "third", images=4)
    assert "\n" not in text
    row = YAML(typ="safe").load(text)
    assert {**row, "times": 0} == {
        "sampler": "unipc",
        "order": 3,
        "times": 0,
        "fitted_to": models.read_model_record(folder).weights_sha256,
    }
    assert set(row["times"]) == set(errors) == {2, 3} and min(errors.values()) > 0
    params = smoke(samplers={"fitted": row}, sampling={"images": 4}, sweep={"samplers": ["fitted"], "steps": [3]})
    assert sample_point(params, Point.parse("cosine-fitted-3"), trained) == 3


def test_times_that_were_fitted_to_an_average_belong_to_its_length(
    digits: Path, smoke: Callable[..., Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitted, "REFERENCE", 100)
    (tmp_path / "dataset").symlink_to(digits / "dataset")

    def of(**row: Any) -> Params:
        rows = {"short": {"sampler": "unipc", **row}}
        sweep = {"samplers": ["short"], "steps": [3]}
        return smoke(
            training={"steps": 10, "snapshot_every": 2}, samplers=rows, sampling={"images": 4, "batch": 4}, sweep=sweep
        )

    train(of(), "cosine", tmp_path)
    text, _ = fit_row(of(ema=0.05), tmp_path / "models/cosine", [3], "short", images=4)
    row, point = YAML(typ="safe").load(text), Point.parse("cosine-short-3")
    assert row["ema"] == 0.05 and sample_point(of(**row), point, tmp_path) == 3
    for other in ({"ema": 0.1}, {"ema": None}):
        with pytest.raises(InputError, match=r"samplers\.short\.fitted_to: the times were fitted to weights "):
            sample_point(of(**{**row, **other}), point, tmp_path)


def never(*_: Any) -> Any:
    raise AssertionError("followed the trajectory for nothing")


def test_guidance_takes_a_network_that_predicts_without_labels(smoke: Callable[..., Params], tmp_path: Path) -> None:
    network = {"image_channels": 1, "image_size": 8, "channels": 8, "multipliers": [1], "blocks": 1, "attention": []}
    entry = NetworkEntry.of("unet", {**network, "classes": 2, "null_class": False})
    about = {"schedule": {"name": "cosine", "timesteps": 100, "schedule": "cosine"}, "target": "eps"}
    about |= {"network": entry.content, "data": {"shape": [1, 8, 8], "range": [-1, 1], "classes": ["a", "b"]}}
    checkpoint.save(tmp_path, checkpoint.network(entry), about)
    params = smoke(samplers={"guided": {"sampler": "ddim", "guidance": 2.0}}, diffusion={"conditional": True})
    with pytest.raises(InputError, match="predicts without labels too"):
        fit_row(params, tmp_path, [3], "guided", images=2)


def test_wrong_input_is_one_line(trained: Path, smoke: Callable[..., Params], monkeypatch: pytest.MonkeyPatch) -> None:
    params, folder = smoke(samplers=ROWS), trained / "models/cosine"
    for settings, message in (
        ({"sampler": "none"}, "no row 'none' in samplers"),
        ({"sampler": "noisy"}, "draws noise of its own"),
    ):
        with pytest.raises(InputError, match=message):
            fit_row(params, folder, [3], images=2, **settings)
    monkeypatch.setattr("ddpm.tools.fit_times.Path.of", never)
    # refused before the trajectory is computed
    with pytest.raises(InputError, match=r"steps = 101 must lie in 1 ... 100"):
        fit_row(params, folder, [3, 101], images=2)
    result = CliRunner().invoke(app, ["fit-times", str(folder), "--steps", "5;8"])
    assert isinstance(result.exception, InputError) and "--steps 5;8: expected numbers" in str(result.exception)
