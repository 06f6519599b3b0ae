"""Checks that no reader unpickles files that would run code, and that no line of our code could unpickle."""

from __future__ import annotations

import ast
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm.errors import InputError
from ddpm.files import arrays, checkpoint, dataset, models, paths, records, samples, scores
from ddpm.files.params import Params
from ddpm.scores import inception
from ddpm.scores.inception import WeightsError
from ddpm.tools.exchange import import_diffusers

ROOT = Path(__file__).parents[1]


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture
def bomb(mark: Path) -> bytes:
    return pickle.dumps(Bomb(mark), protocol=2)  # the protocol of torch.save


def array(mark: Path) -> np.ndarray:
    return np.array([Bomb(mark)], dtype=object)


def npz(path: Path, mark: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array(mark) for name in names})
    about: dict[str, Any] = {
        "point": path.stem,
        "model": "m",
        "evaluations": 1,
        "settings": {},
        "arrays": {"images": "0" * 64},
    }
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(samples.RECORD, json.dumps({**about, records.CHECKSUM: records.record_digest(about)}))


def test_the_bomb_is_live(bomb: bytes, mark: Path, tmp_path: Path) -> None:
    pickle.loads(bomb)
    assert mark.exists()
    mark.unlink()
    np.save(tmp_path / "a.npy", array(mark), allow_pickle=True)
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert mark.exists()


def plant_weights(folder: Path, content: bytes) -> None:
    """Writes a checkpoint that records the correct checksum of its weights."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    about = {"weights_sha256": records.sha256(folder / "model.safetensors"), "network": {}, "schedule": {}}
    records.write_record(folder / "model.json", {"format": models.MODEL_FORMAT, **about})


def torch_zip(mark: Path) -> bytes:
    """Returns the output of torch.save: a zip archive that contains a pickle."""
    content = io.BytesIO()
    torch.save({"weights": Bomb(mark)}, content)
    return content.getvalue()


@pytest.mark.parametrize("write", ["pickle", "torch", "zip"])
def test_weights_that_are_a_pickle(write: str, bomb: bytes, mark: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("model.safetensors", bomb)
    plant_weights(tmp_path / "model", {"pickle": bomb, "torch": torch_zip(mark), "zip": content.getvalue()}[write])
    with pytest.raises(InputError):
        checkpoint.load(tmp_path / "model")
    assert not mark.exists()


def test_a_description_that_is_a_pickle(bomb: bytes, mark: Path, tmp_path: Path) -> None:
    plant_weights(tmp_path / "model", b"")
    (tmp_path / "model" / "model.json").write_bytes(bomb)
    with pytest.raises(InputError):
        checkpoint.load(tmp_path / "model")
    assert not mark.exists()


def test_a_training_state_that_is_a_pickle(bomb: bytes, mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "000000010.safetensors"
    path.write_bytes(bomb)
    path.with_suffix(".json").write_text(json.dumps({"step": 10, "sha256": records.sha256(path)}))
    state, complaints = checkpoint.read_resume(tmp_path, 100)
    assert state is None and len(complaints) == 1
    assert not mark.exists()


def test_arrays_that_hold_a_pickle(mark: Path, tmp_path: Path) -> None:
    folder = tmp_path / paths.dataset_dir()
    folder.mkdir(parents=True)
    for name in ("train", "test", "train-labels", "test-labels"):
        np.save(folder / f"{name}.npy", array(mark), allow_pickle=True)
    about = {"name": "planted", "sha256": "0" * 64, "shape": [1, 8, 8], "counts": {"train": 1, "test": 1}}
    about |= {"classes": ["a"], "mean": [0.5], "std": [0.5], "flip": False}
    records.write_record(folder / "dataset.json", about, sorted(folder.glob("*.npy")))
    npz(tmp_path / "samples.npz", mark, "images", "evaluations", "labels")
    npz(tmp_path / "arrays.npz", mark, "features")
    np.save(tmp_path / "influence.npy", array(mark), allow_pickle=True)
    for read in (
        lambda: dataset.read_dataset(tmp_path),
        lambda: samples.read_samples(tmp_path / "samples.npz"),
        lambda: arrays.read_arrays(tmp_path / "arrays.npz", "key"),
        lambda: scores.read_influence(tmp_path / "influence.npy", records.sha256(tmp_path / "influence.npy")),
    ):
        with pytest.raises((InputError, ValueError, KeyError)):
            read()
    assert not mark.exists()


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_inception_weights_that_are_a_pickle(write: str, bomb: bytes, mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "inception.pth"
    path.write_bytes(bomb if write == "pickle" else torch_zip(mark))
    with pytest.raises(WeightsError):
        inception.load(64, tmp_path / "cache", weights=path)
    assert not mark.exists()


def test_a_diffusers_folder_with_a_pickle(mark: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (folder / "diffusion_pytorch_model.bin").write_bytes(torch_zip(mark))
    with pytest.raises(InputError):
        import_diffusers(folder, "planted", tmp_path)
    assert not mark.exists()


def test_params_that_name_a_python_object(mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"seed: !!python/object/apply:os.system ['touch \"{mark}\"']\n")
    with pytest.raises(InputError):
        Params.load(path)
    assert not mark.exists()


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_no_line_of_ours_unpickles() -> None:
    for path in sorted([*ROOT.glob("ddpm/**/*.py"), *ROOT.glob("flows/*.py"), *ROOT.glob("deploy/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {name.name.partition(".")[0] for name in node.names} & UNSAFE, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in UNSAFE, where
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                given = {item.arg: ast.unparse(item.value) for item in node.keywords}
                if name in ("np.load", "numpy.load"):
                    assert given.get("allow_pickle") == "False", where
                elif name == "torch.load":
                    assert given.get("weights_only") == "True", where
                assert name not in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"), where
                assert given.get("shell") != "True", where
