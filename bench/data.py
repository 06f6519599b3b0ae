"""Measures how fast PNG files in a zip are read into one array, compared with a loop over torchvision's ImageFolder."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.harness import TINY, alternate, ratios
from ddpm.files import dataset
from ddpm.files.params import Params
from ddpm.parameters import Data
from ddpm.stages.prepare import prepare as run_prepare

ROOT = Path(__file__).parents[1]
IMAGES = 200 if TINY else 5_000


def _pack(path: Path) -> str:
    """Writes a zip of IMAGES pictures in ten class folders, from CIFAR-10 if available, else random. Returns their source."""
    whole = Path(os.environ.get("BENCH_DATA", ROOT.parent / "shared" / "data")) / "cifar10-test.zip"
    with zipfile.ZipFile(path, "w") as packed:
        if whole.is_file():
            with zipfile.ZipFile(whole) as archive:
                names = [name for name in archive.namelist() if name.endswith(".png")]
                for name in names[:: len(names) // IMAGES][:IMAGES]:
                    packed.writestr(name.partition("/")[2], archive.read(name))
            return "CIFAR-10"
        random = np.random.default_rng(0)
        for index in range(IMAGES):
            small = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
            file = io.BytesIO()
            small.resize((32, 32)).save(file, "png")
            packed.writestr(f"{index % 10}/{index:05d}.png", file.getvalue())
    return "made here"


def prepare(device: str) -> dict[str, Any]:
    """Measures the preparation of IMAGES PNG files from a zip."""
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
        "work": f"{IMAGES:,} PNG files in a zip ({source}) to one array with labels;"
        " ours also writes checksums, mean and deviation, and a preview",
        "per_call": f"all {IMAGES:,} images",
        "checks": {"same pixels and labels": True},
        "times": times,
        "figures": ratios(times, "ImageFolder", 3.0),
    }
