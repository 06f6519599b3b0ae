"""Checks that `ddpm.load` returns the network, process and classes of a folder, or fails in one line."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm import UNet, load, sample
from ddpm.errors import InputError
from ddpm.files import checkpoint
from ddpm.files.models import NetworkEntry


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a checkpoint with three classes, a learned variance and another target. Tests must not change this checkpoint."""
    torch.manual_seed(0)
    sizes = {"image_channels": 1, "image_size": 8, "channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [4]}
    entry = NetworkEntry.of("unet", {**sizes, "out_channels": 2, "classes": 3})
    net = UNet(**entry.settings)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    description = {
        "schedule": {"name": "short", "timesteps": 60, "schedule": "cosine", "s": 0.02},
        "target": "v",
        "variance": "learned",
        "network": entry.content,
        "data": {"shape": [1, 8, 8], "range": [-1, 1], "classes": ["cat", "dog", "owl"]},
    }
    folder = tmp_path_factory.mktemp("conditional") / "model"
    checkpoint.save(folder, net, description)
    return folder


def test_a_conditional_model_with_a_learned_variance(conditional: Path) -> None:
    denoiser = load(str(conditional))
    expected, _ = checkpoint.load(conditional, clip=True)
    assert (denoiser.target, denoiser.clip, denoiser.schedule.T) == ("v", True, 60)
    assert torch.equal(denoiser.schedule.alpha_bar, expected.schedule.alpha_bar)
    x_T = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def noise(k: int) -> torch.Tensor:
        return torch.randn(x_T.shape, generator=torch.Generator().manual_seed(2 + k))

    def drawn(model: object, label: int) -> torch.Tensor:
        labelled = replace(model, labels=torch.full((6,), label), guidance=2.0)  # type: ignore[type-var]
        return sample(labelled, x_T, sampler="ddpm", steps=6, noise=noise, variance="learned")

    assert torch.equal(drawn(denoiser, 1), drawn(expected, 1))
    assert not torch.equal(drawn(denoiser, 1), drawn(denoiser, 2))


def test_the_clip_is_that_of_the_call(conditional: Path) -> None:
    assert load(conditional, clip=0.9).clip == 0.9
    assert load(conditional, clip=False).clip is False


def test_a_folder_that_is_damaged_or_missing(
    conditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "cosine"
    folder.mkdir(parents=True)
    for path in conditional.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^models/linear: no such folder; choose one of models/cosine$"):
        load("models/linear")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InputError, match=r"models/cosine: .*checksum"):
        load("models/cosine")


def test_a_registered_model_without_mlflow_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r"^models:/ddpm-digits@champion: MLflow at \S+ has no such model"):
        load("models:/ddpm-digits@champion")
    assert not list(tmp_path.iterdir())  # the request creates no database
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    (tmp_path / "other.db").touch()
    with pytest.raises(InputError, match=r"^models:/ddpm-digits@champion: \S+ has no package mlflow: activate"):
        load("models:/ddpm-digits@champion")
