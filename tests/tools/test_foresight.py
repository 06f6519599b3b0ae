"""Checks that the dataset is compared with params.yaml before anything is read or trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from ddpm import cli
from ddpm.errors import InputError
from ddpm.files.params import Params
from ddpm.parameters import OtherNetwork
from ddpm.runtime.progress import Progress
from ddpm.stages import prepare as prepare_stage
from ddpm.tools.foresight import check, check_contents

Smoke = Callable[..., Params]


def folder_params(smoke: Smoke, **changes: Any) -> Params:
    data = {"source": "image_folder", "path": "images", **changes.pop("data", {})}
    network = changes.pop("network", {})
    if isinstance(network, OtherNetwork):
        return smoke(data=data, **changes).model_copy(update={"network": network})
    return smoke(data=data, network=network, **changes)


def draw(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(path)


def prepared(params: Params, root: Path) -> list[str]:
    """Runs `ddpm prepare` and returns its warnings."""
    said: list[Progress] = []
    prepare_stage.prepare(params, root, said.append, partial(check_contents, params))
    return [progress.message for progress in said[:-1] if progress.message]


TEN = [f"{split}/{name}" for split in ("train", "test") for name in "abcde"]
# For each case: the images, the changes of params.yaml, and the message.
REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "one image": (
        ["a"],
        {},
        "images: 1 train and 0 test images, but a score needs at least 4 train images; add images$",
    ),
    "two images": (
        ["a", "b"],
        {},
        "images: 2 train and 0 test images, but a score needs at least 4 train images; add images$",
    ),
    "most are held out": (
        list("abcdef"),
        {"data": {"test_fraction": 0.5}},
        "images: 3 train and 3 test images, .*; add images, or move some from test to train$",
    ),
    "all are held out": (["a"], {"data": {"test_fraction": 0.9}}, "images: no training images; add images or lower"),
    "no training images": ([f"test/{name}" for name in "abcde"], {}, "images: no training images: all lie in test"),
    "a class of test alone": (
        [*(f"train/cat/{name}" for name in "abcd"), "test/ape/e", "test/cat/f"],
        {"diffusion": {"conditional": True}},
        "images: no training images of ape, so a conditional network cannot learn these classes; add training images, remove",
    ),
    "no classes": (
        TEN,
        {"diffusion": {"conditional": True}},
        "conditional is true, but the dataset image_folder has no classes; set it to false or add classes ",
    ),
    "attention": (
        TEN,
        {"network": {"attention": [5]}},
        r"attention at height 5 never occurs: the resolutions \(height x width\) are 8x8, 4x4$",
    ),
    "too deep": (TEN, {"network": {"multipliers": [1] * 5, "attention": []}}, "image_size 8 cannot be halved 4 times"),
    "a key that this network lacks": (
        TEN,
        {"network": OtherNetwork(kind="dit", rest={"deph": 3})},
        "network: dit takes no deph, only width, depth, heads, patch, dropout$",
    ),
    "a wrong transformer": (
        TEN,
        {"network": OtherNetwork(kind="dit", rest={"width": 16, "heads": 3})},
        "network: heads = 3 must divide width = 16$",
    ),
    "too few snapshots": (
        TEN,
        {"training": {"steps": 60, "snapshot_every": 25}, "samplers": {"ddim": {"ema": 0.2}}},
        r"samplers\.ddim\.ema: the closest average to length 0\.2 that 3 snapshots give is ..% away from it; take more",
    ),
    "two samples": (
        TEN,
        {"sampling": {"images": 2}},
        "sampling.images: 2 is too few; a score needs at least 4 samples",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_fail_later_is_refused_by_prepare(smoke: Smoke, tmp_path: Path, case: str) -> None:
    names, changes, message = REFUSED[case]
    draw(tmp_path, *names)
    with pytest.raises(InputError, match=message):
        prepared(folder_params(smoke, **changes), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_dataset_of_the_hub_is_named_and_not_the_folder_beside_it(smoke: Smoke) -> None:
    hub = "me/pictures@" + "0" * 40
    data = {"source": "huggingface", "path": "images", "hub": hub}
    with pytest.raises(InputError, match=f"^{hub}: 3 train and 1 test images, but "):
        check(smoke(data=data), (1, 8, 8), (3, 1), None)
    with pytest.raises(InputError, match=f"^{hub}: no training images of eel, "):
        check(smoke(data=data, diffusion={"conditional": True}), (1, 8, 8), (9, 1), {"cat": 9, "eel": 0})


def test_an_imported_network_needs_no_network_section_that_fits(smoke: Smoke) -> None:
    schedules = {"linear": {"schedule": "linear", "imported": "0" * 64}}
    wrong = {"network": {"attention": [5]}, "sweep": {"schedules": ["linear"]}}
    assert check(smoke(schedules=schedules, **wrong), (1, 8, 8), (1438, 359), None) == []


def test_settings_without_the_wanted_effect_are_named(smoke: Smoke, tmp_path: Path) -> None:
    draw(tmp_path, *(f"train/cat/{name}" for name in "abcd"), "test/ape/e")
    sizes = {"sampling": {"images": 9}, "evaluation": {"images": 6}}
    assert prepared(folder_params(smoke, **sizes), tmp_path) == [
        "sampling.images: 9 images are drawn for each point, but a score uses only evaluation.images = 6",
        "evaluation.images: 6, but there are fewer images, so scores will compare 6 samples and 4 training images",
        "no training images of ape",
    ]
    assert check(smoke(), (1, 8, 8), (1438, 359), None) == []


def test_the_verbs_check_before_they_work(smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """params.yaml may change after `ddpm prepare`, so `ddpm train` checks too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpm.stages.train.train", lambda *rest, **options: pytest.fail("it trained"))

    def write(**changes: Any) -> None:
        with Path("params.yaml").open("w") as file:
            YAML().dump(folder_params(smoke, **changes).to_json(), file)

    draw(tmp_path, *(f"train/cat/{name}" for name in "abcd"), "test/ape/e")
    write(diffusion={"conditional": True})
    with pytest.raises(InputError, match="no training images of ape"):
        cli.prepare()
    assert not Path("dataset").exists()
    write()
    cli.prepare()
    write(diffusion={"conditional": True})
    with pytest.raises(InputError, match="no training images of ape"):
        cli.train("linear")
