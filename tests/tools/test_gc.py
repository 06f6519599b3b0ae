"""Checks that `ddpm gc` removes old files of .cache, keeps those from which a run would continue, and touches nothing else."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddpm.cli import app
from ddpm.files import paths
from ddpm.files.params import Params
from ddpm.stages.train import train
from ddpm.tools import cleaning

Smoke = Callable[..., Params]


def later() -> float:
    """Returns a time after which every file counts as old."""
    return time.time() + 60


def aged(path: Path, days: float = 30) -> Path:
    """Sets the dates of a file, or of a folder and its content, to `days` ago."""
    moment = time.time() - days * 86400
    for item in (*path.rglob("*"), path):
        os.utime(item, (moment, moment))
    return path


def made(root: Path, name: str, size: int = 1_000_000) -> Path:
    """Writes a file below .cache."""
    path = root / paths.CACHE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def test_states_that_nobody_goes_on_from(root: Path, smoke: Smoke) -> None:
    now, before = smoke(training={"steps": 4}), smoke(training={"steps": 4, "learning_rate": 1e-3})
    for params in (now, before):
        train(params, "cosine", root)
    assert len(list((root / ".cache" / "training").iterdir())) == 2
    assert list(cleaning.leftovers(now, root, time.time() - 86400)) == []  # a training may still be using these states
    (gone,) = cleaning.leftovers(now, root, later())
    assert gone.kind == "training states" and gone.size > 1000
    gone.remove()
    said: list[str] = []
    train(smoke(training={"steps": 6}), "cosine", root, lambda progress: said.append(progress.message))
    assert "resuming after step 4" in said


def test_states_of_another_decay(root: Path, smoke: Smoke) -> None:
    """States from before the decay stay, and so do those of the present decay."""
    for to in (0.5, 0.1):
        params = smoke(training={"steps": 8, "decay": "linear", "decay_share": 0.5, "decay_to": to})
        train(params, "cosine", root)
    (gone,) = cleaning.leftovers(params, root, later())
    gone.remove()
    said: list[str] = []
    train(params, "cosine", root, lambda progress: said.append(progress.message))
    assert "resuming after step 8" in said
    said.clear()
    train(smoke(training={"steps": 12}), "cosine", root, lambda progress: said.append(progress.message))
    assert "resuming after step 4" in said


def test_without_a_dataset_every_state_stays(tmp_path: Path, smoke: Smoke) -> None:
    aged(made(tmp_path, "training/cosine-0123/000000040.safetensors"))
    assert list(cleaning.leftovers(smoke(), tmp_path, later())) == []


@pytest.mark.parametrize("text", ['{"name": "digits", "sha256": "c8c4"}', "{", ""])
def test_a_dataset_that_cannot_be_read_keeps_the_states_and_nothing_else(
    text: str, tmp_path: Path, smoke: Smoke
) -> None:
    """The record is one of version 0.1.0, which had no checksum, or a damaged one."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "dataset.json").write_text(text)
    aged(made(tmp_path, "training/cosine-0123/000000040.safetensors"))
    aged(made(tmp_path, "features/a.npz"))
    (gone,) = cleaning.leftovers(smoke(), tmp_path, later())
    assert gone.kind == "reference features"


def test_images_of_the_sweep_stay_and_what_is_used_stays(root: Path, smoke: Smoke) -> None:
    params = smoke()
    gone = {
        "sampling/cosine-former-7": ("images.npy", "batches.jsonl"),
        "features/b.npz": (),
        "features/.b.npz.tmp-1-x": (),
        "inception/inception-v0.safetensors": (),
        "previews/linear": ("0000040.png",),
    }
    stays = {
        f"sampling/{params.points()[0].name}": ("images.npy",),
        "features/a.npz": (),
        "downloads/cifar10": ("data",),
    }
    for name, files in (gone | stays).items():
        for file in files or ("",):
            made(root, f"{name}/{file}".rstrip("/"))
    aged(root / paths.CACHE)
    made(root, "features/a.lock", 0)  # a reader of the features took this lock today

    def found() -> set[str]:
        old = cleaning.leftovers(params, root, time.time() - 86400)
        return {str(path.relative_to(root / paths.CACHE)) for item in old for path in item.paths}

    assert found() == {*gone}
    os.utime(root / paths.CACHE / "features" / "b.npz", (time.time(), 1))  # the file was read today
    assert found() == {name for name in gone if "features" not in name}


def test_the_command_shows_first_and_leaves_the_stores_alone(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(Path(__file__).parents[2] / "recipes" / "smoke.yaml", checkout / "params.yaml")
    monkeypatch.chdir(checkout)
    for outside in (".dvc/cache/files/md5/00/11", "mlartifacts/ddpm-digits/0/artifacts/file"):
        aged(made(checkout, f"../{outside}"))
    old = made(checkout, "training/cosine-of-old/000000040.safetensors", 2_000_000).parent
    assert "nothing to remove" in CliRunner().invoke(app, ["gc"]).output
    aged(old)
    before = {path for path in checkout.rglob("*") if old not in (path, path.parent)}
    shown = CliRunner().invoke(app, ["gc"]).output
    assert "would remove 1 training states, 2.0 MB; --delete removes them" in shown and old.exists()
    assert "nothing to remove" in CliRunner().invoke(app, ["gc", "--older-than", "40"]).output
    assert "removed 1 training states" in CliRunner().invoke(app, ["gc", "--delete"]).output
    assert set(checkout.rglob("*")) == before
