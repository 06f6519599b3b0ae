"""Checks the prepare stage: the contents of dataset/, equal bytes in each run, and no remains after a failure."""

from __future__ import annotations

import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import NoiseSchedule
from ddpm.errors import InputError
from ddpm.files import dataset as dataset_file
from ddpm.files import paths, records
from ddpm.files.dataset import read_dataset, writing_dataset
from ddpm.files.params import Params
from ddpm.runtime.progress import Progress
from ddpm.stages import train
from ddpm.stages.prepare import mean_and_deviation, prepare, preview
from ddpm.tools import preview as previewing
from ddpm.training.objective import Objective

Smoke = Callable[..., Params]

CIFAR = Path(__file__).parents[3] / "shared" / "data"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def draw(path: Path, seed: int, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(path)


def draw_folder(folder: Path, count: int = 12) -> None:
    for seed in range(count):
        draw(folder / f"class {seed % 3}" / f"{seed:02}.png", seed)


def folder_params(smoke: Smoke, seed: int = 0, **data: Any) -> Params:
    return smoke(seed=seed, data={"source": "image_folder", "path": "images", "test_fraction": 0.25, **data})


def files_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "dataset").iterdir()}


def test_parts_of_a_folder_have_images_of_every_class(
    smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are read class by class. The validation images and the previews' reference images are no single class."""
    for name, grey in (("black", 0), ("white", 255)):
        for index in range(40):
            path = tmp_path / "images" / name / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), grey).save(path)
    params = folder_params(smoke, size=8, channels=1).model_copy(
        update={"compute": replace(smoke().compute, preview_fid=10)}
    )
    prepare(params, tmp_path)
    dataset = read_dataset(tmp_path)
    assert len(set(dataset.train_labels[:10])) == 1  # the first images are of one class

    settings = params.model_copy(update={"training": replace(params.training, validation_images=6)})
    objective = Objective.of(NoiseSchedule.named("cosine", 10), "eps", "cpu")
    shown = train._validation(settings, dataset, objective, torch.device("cpu"), conditional=False).images
    assert len(shown) == 6 and set(shown.unique().tolist()) == {0, 255}

    monkeypatch.setattr(previewing, "MOST_REFERENCE_IMAGES", 20)
    reference = previewing._Fids(params, tmp_path, "cosine")
    black, white = (
        reference._statistics(np.full((2, 1, 8, 8), grey, np.uint8)).mean.astype(float) for grey in (0, 255)
    )
    share = (reference.reference.mean - black) @ (white - black) / np.sum((white - black) ** 2)
    assert 0.2 < share < 0.8


# The written files.


@pytest.mark.parametrize("large", [False, True])
def test_a_changed_array_is_refused_though_its_times_say_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    shutil.copytree(digits / "dataset", tmp_path / "dataset")
    path = tmp_path / "dataset" / "train.npy"
    monkeypatch.setattr(records, "SETTLED", 0.0)  # files written just now count as old
    if large:
        monkeypatch.setattr(records, "LARGE", 1)
    assert len(dataset_file.read_dataset(tmp_path).train) == 1438
    assert (tmp_path / paths.CACHE / "verified.json").exists() is large
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"\xee")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=r"train\.npy: its bytes are not those that dataset\.json describes"):
        dataset_file.read_dataset(tmp_path)


def no_room(path: Path, value: Any) -> None:
    raise InputError(f"{path}: no room on the disk")


def read_only(path: Path, value: Any) -> None:
    raise PermissionError(f"{path}: read-only file system")


@pytest.mark.parametrize("write", [no_room, read_only])
def test_a_hash_that_cannot_be_remembered_is_computed_again(
    write: Callable[..., None],
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(digits / "dataset", tmp_path / "dataset")
    monkeypatch.setattr(records, "SETTLED", 0.0)
    monkeypatch.setattr(records, "LARGE", 1)
    monkeypatch.setattr(records, "write_record", write)
    for _ in range(2):
        assert len(read_dataset(tmp_path).train) == 1438
    assert capfd.readouterr() == ("", "")


def damaged(memory: Path) -> None:
    memory.write_bytes(memory.read_bytes()[:-20])


def unreadable(memory: Path) -> None:
    memory.unlink()
    memory.mkdir()


def of_another_form(memory: Path) -> None:
    records.write_record(memory, dict.fromkeys(records.read_record(memory), 7))


@pytest.mark.parametrize("damage", [damaged, unreadable, of_another_form])
def test_a_damaged_memory_of_hashes_counts_as_empty(
    damage: Callable[[Path], None], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits / "dataset", tmp_path / "dataset")
    monkeypatch.setattr(records, "SETTLED", 0.0)
    monkeypatch.setattr(records, "LARGE", 1)
    for work in (damage, lambda _: None):
        assert len(read_dataset(tmp_path).train) == 1438
        work(tmp_path / paths.CACHE / "verified.json")


def test_the_hash_of_a_large_array_is_computed_once(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits / "dataset", tmp_path / "dataset")
    monkeypatch.setattr(records, "SETTLED", 0.0)
    monkeypatch.setattr(records, "LARGE", 1)
    dataset_file.read_dataset(tmp_path)
    hashed: list[Path] = []
    monkeypatch.setattr(records, "sha256", hashed.append)
    dataset_file.read_dataset(tmp_path)
    assert not hashed


def test_digits(smoke: Smoke, tmp_path: Path) -> None:
    said: list[Progress] = []
    about = prepare(smoke(), tmp_path, said.append)
    dataset = read_dataset(tmp_path)
    assert sorted(files_of(tmp_path)) == [
        "dataset.json",
        "preview.png",
        "test-labels.npy",
        "test.npy",
        "train-labels.npy",
        "train.npy",
    ]
    assert dataset.record == about
    assert about.name == "digits"
    assert about.shape == [1, 8, 8]
    assert about.counts == {"train": 1438, "test": 359}
    assert about.classes == list("0123456789")
    assert about.flip is False
    assert dataset.train.dtype == np.uint8
    assert dataset.train.shape == (1438, 1, 8, 8)
    assert dataset.train_labels is not None
    assert dataset.train_labels.dtype == np.int64
    assert about.mean == pytest.approx([dataset.train.mean() / 255], abs=1e-6)
    assert about.std == pytest.approx([dataset.train.std() / 255], abs=1e-6)
    assert said[-1].message == "digits: 1,438 train and 359 test images of 1x8x8, 10 classes"
    assert (said[0].done, said[-1].done, said[-1].total, said[-1].unit) == (0, 1797, 1797, "images")


def test_digits_can_be_told_apart(digits: Path) -> None:
    """Labels belong to their images: the nearest training image nearly always has the label of the test image."""
    dataset = read_dataset(digits)
    assert dataset.train_labels is not None
    assert dataset.test_labels is not None
    train, test = (array.reshape(len(array), -1).astype(float) for array in (dataset.train, dataset.test))
    distances = (test**2).sum(1)[:, None] + (train**2).sum(1) - 2 * test @ train.T
    assert (dataset.train_labels[distances.argmin(1)] == dataset.test_labels).mean() > 0.97


def test_statistics_are_exact() -> None:
    pixels = np.zeros((3, 2, 4, 4), np.uint8)
    pixels[0, 1], pixels[1, 1] = 255, 51
    mean, deviation = mean_and_deviation(pixels)
    assert mean == [0.0, 0.4]
    assert deviation == [0.0, round(float(np.std([1, 0.2, 0])), 6)]
    many = np.random.default_rng(0).integers(0, 256, (70_000, 1, 8, 8), np.uint8)  # more than one block of images
    assert mean_and_deviation(many)[0] == [round(many.mean() / 255, 6)]


def test_preview_has_a_row_per_class(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images")
    prepare(folder_params(smoke, test_fraction=0.0), tmp_path)
    dataset = read_dataset(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "dataset" / "preview.png"))
    scale, cell_side = 8, 8 * 8 + 1  # 8x8 images are shown at 64 pixels, with one pixel between them
    assert picture.shape == (3 * cell_side + 1, 10 * cell_side + 1, 3)
    assert dataset.train_labels is not None
    for label in range(3):
        member = dataset.train[dataset.train_labels == label][1].transpose(1, 2, 0)
        cell = picture[1 + cell_side * label :, 1 + cell_side :][: 8 * scale : scale, : 8 * scale : scale]
        assert np.array_equal(cell, member)
    assert (picture[:, 1 + 4 * cell_side :] == 255).all()  # there are four images per class


def test_preview_stays_small() -> None:
    train = np.zeros((1000, 3, 256, 256), np.uint8)
    labels = np.arange(1000)
    assert preview(train, labels, 1000).shape == (3, 20 * 65 + 1, 10 * 65 + 1)
    assert preview(train, None, 0).shape == (3, 20 * 65 + 1, 10 * 65 + 1)


def test_an_empty_test_split(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images")
    about = prepare(folder_params(smoke, test_fraction=0.0), tmp_path)
    dataset = read_dataset(tmp_path)
    assert about.counts == {"train": 12, "test": 0}
    assert dataset.test.shape == (0, 3, 8, 8)
    assert dataset.test_labels is not None
    assert len(dataset.test_labels) == 0


def test_unlabelled(smoke: Smoke, tmp_path: Path) -> None:
    for seed in range(8):
        draw(tmp_path / "images" / f"{seed}.png", seed)
    about = prepare(folder_params(smoke), tmp_path)
    dataset = read_dataset(tmp_path)
    assert about.classes is None
    assert dataset.train_labels is None
    assert dataset.test_labels is None
    assert sorted(files_of(tmp_path)) == ["dataset.json", "preview.png", "test.npy", "train.npy"]


# Repeated runs.


def test_the_same_bytes_again(smoke: Smoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes do not depend on the order of files on the disk, on their times, or on the number of processes."""
    results = []
    for run, processes in enumerate((1, 3, 3)):
        root = tmp_path / str(run)
        seeds = list(range(200))
        random.Random(run).shuffle(seeds)
        for seed in seeds:
            draw(root / "images" / f"class {seed % 3}" / f"{seed:03}.png", seed)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, count=processes: range(count), raising=False)
        prepare(folder_params(smoke), root)
        results.append(files_of(root))
        prepare(folder_params(smoke), root)
        assert files_of(root) == results[-1]
    assert results[0] == results[1] == results[2]


def test_digits_are_the_same_bytes_again(smoke: Smoke, tmp_path: Path, digits: Path) -> None:
    prepare(smoke(), tmp_path)
    assert files_of(tmp_path) == files_of(digits)


def test_folder_zip_and_zips_in_a_folder_are_the_same(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "plain" / "images")
    files = sorted((tmp_path / "plain" / "images").rglob("*.png"))
    for name in ("zipped/images.zip", "mixed/images/all.zip", "mixed/images/class 1/some.zip"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                if "mixed" not in name or (file.parent.name == "class 1") == name.endswith("some.zip"):
                    below = tmp_path / "plain" / "images" / ("class 1" if name.endswith("some.zip") else "")
                    archive.write(file, file.relative_to(below))
    for root, path in (("plain", "images"), ("zipped", "images.zip"), ("mixed", "images")):
        prepare(folder_params(smoke, path=path), tmp_path / root)
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "zipped") == files_of(tmp_path / "mixed")


def test_the_split_depends_on_the_seed_and_shares_nothing(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 40)
    tests = []
    for seed in (0, 1):
        prepare(folder_params(smoke, seed=seed), tmp_path)
        dataset = read_dataset(tmp_path)
        train, test = ({image.tobytes() for image in split} for split in (dataset.train, dataset.test))
        assert (len(train), len(test), len(train | test)) == (30, 10, 40)
        tests.append(test)
    assert tests[0] != tests[1]


def test_one_image_more_less_or_changed_is_another_version(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images")
    versions = [prepare(folder_params(smoke), tmp_path).sha256]
    draw(tmp_path / "images" / "class 1" / "new.png", 99)
    versions.append(prepare(folder_params(smoke), tmp_path).sha256)
    draw(tmp_path / "images" / "class 1" / "new.png", 100)
    versions.append(prepare(folder_params(smoke), tmp_path).sha256)
    assert len(set(versions)) == 3
    (tmp_path / "images" / "class 1" / "new.png").unlink()
    assert prepare(folder_params(smoke), tmp_path).sha256 == versions[0]


def test_a_label_is_part_of_the_version(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images")
    before = prepare(folder_params(smoke, test_fraction=0.0), tmp_path).sha256
    (tmp_path / "images" / "class 0" / "09.png").rename(tmp_path / "images" / "class 1" / "00.png")
    assert prepare(folder_params(smoke, test_fraction=0.0), tmp_path).sha256 != before


# Failures, which leave nothing behind.


def damaged_png(folder: Path) -> None:
    content = bytearray((folder / "class 0" / "00.png").read_bytes())
    content[-30] ^= 1
    (folder / "class 0" / "00.png").write_bytes(bytes(content))


def huge_png(folder: Path) -> None:
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (folder / "class 1" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT5\xaf\x06\x1e")


def escaping_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("../../x.png", b"")


def repeated_image(folder: Path) -> None:
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("class 0/00.png", b"")


def no_images(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unreadable": (lambda folder: (folder / "class 1" / "x.png").write_bytes(b"x"), "1 of 13 images cannot be used: "),
    "damaged": (damaged_png, "class 0/00.png (damaged: a checksum differs)"),
    "empty": (lambda folder: (folder / "class 1" / "x.jpg").touch(), "class 1/x.jpg (empty file)"),
    "huge": (huge_png, "class 1/x.png (Image size (2500000000 pixels) exceeds limit"),
    "another size": (lambda folder: draw(folder / "class 2" / "x.png", 0, 9), "class 2/x.png (9x9 instead of 8x8)"),
    "another mode": (
        lambda folder: Image.new("CMYK", (8, 8)).save(folder / "class 2" / "x.jpg"),
        "class 2/x.jpg (mode CMYK)",
    ),
    "no zip": (lambda folder: (folder / "x.zip").write_bytes(b"x"), "x.zip (not a readable zip file"),
    "escaping": (escaping_zip, "x.zip: ../../x.png (escapes its folder)"),
    "twice": (repeated_image, "class 0/00.png (two images with this path)"),
    "no images": (no_images, "no PNG or JPEG images there"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_the_earlier_dataset(smoke: Smoke, tmp_path: Path, case: str) -> None:
    spoil, reason = BAD[case]
    draw_folder(tmp_path / "images")
    prepare(folder_params(smoke), tmp_path)
    before = files_of(tmp_path)
    spoil(tmp_path / "images")
    with pytest.raises(InputError) as caught:
        prepare(folder_params(smoke), tmp_path)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("images: ")
    assert str(caught.value).isprintable()
    assert files_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "images"]


def test_no_training_images(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images" / "test")
    with pytest.raises(InputError, match="images: no training images"):
        prepare(folder_params(smoke), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_an_interruption_leaves_the_earlier_dataset(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 200)
    prepare(folder_params(smoke), tmp_path)
    before = files_of(tmp_path)
    draw(tmp_path / "images" / "class 1" / "new.png", 99)

    def interrupt(progress: Progress) -> None:
        if progress.done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(folder_params(smoke), tmp_path, interrupt)
    assert files_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "images"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Room is reserved before anything is written. No disk here has room for 800 TB."""
    with (
        pytest.raises(InputError, match=r"train\.npy: no room for"),
        writing_dataset(tmp_path, (3, 4096, 4096), (2**24, 0), None),
    ):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


# A messy folder.

RED, TEAL, PINK = (255, 0, 0), (0, 128, 128), (250, 120, 180)
MESSY = {"fit": "crop", "size": 32, "convert": True, "unusable": "skip", "test_fraction": 0.0}


def solid(path: Path, colour: Any, mode: str = "RGB", size: tuple[int, int] = (40, 60), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def draw_messy_folder(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Draws one-coloured images and a broken file. Returns the colours in the order of the names."""
    solid(folder / "a grey.PNG", 77, "L")
    solid(folder / "b/cmyk.jpg", (0, 255, 255, 0), "CMYK", quality=98)
    Image.fromarray(np.full((50, 40), 40_000, np.uint16)).save(folder / "c 16 bit.png")
    sideways, tags = Image.new("RGB", (64, 64), TEAL), Image.Exif()
    sideways.paste(RED, (0, 0, 64, 16))
    tags[0x0112] = 6  # orientation 6: the first row is the right side
    (folder / "d/deep/er").mkdir(parents=True)
    sideways.save(folder / "d/deep/er/exif.JPEG", exif=tags, quality=98)
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, *PINK])
    palette.save(folder / "e palette.png")
    solid(folder / "f transparent.png", (0, 0, 0, 0), "RGBA", (500, 20))
    later = [Image.new("RGB", (40, 40), "blue")]
    for name in ("g.gif", "h.Webp"):
        solid(folder / name, RED, size=(40, 40), save_all=True, append_images=later, duration=100, lossless=True)
    (folder / "i broken.jpg").write_bytes((folder / "b/cmyk.jpg").read_bytes()[:300])
    for name in (".DS_Store", "._x.jpg", "Thumbs.db", "__MACOSX/b/._cmyk.jpg", "b/.hidden.png", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")
    white, grey = (255, 255, 255), (156, 156, 156)
    return {"a": (77, 77, 77), "b": RED, "c": grey, "d": TEAL, "e": PINK, "f": white, "g": RED, "h": RED}


def test_a_messy_folder(smoke: Smoke, tmp_path: Path) -> None:
    """Colours must be exact, except for 3 of 255 after JPEG and 1 after 16 bits."""
    colours = draw_messy_folder(tmp_path / "images")
    said: list[Progress] = []
    prepare(folder_params(smoke, **MESSY), tmp_path, said.append)
    train = read_dataset(tmp_path).train
    assert train.shape == (8, 3, 32, 32)
    for (name, colour), image in zip(colours.items(), train, strict=True):
        tolerance = {"b": 3, "d": 3, "c": 1}.get(name, 0)
        left = image[:, :, : 20 if name == "d" else 32]
        assert np.abs(left.astype(int) - np.reshape(colour, (3, 1, 1))).max() <= tolerance, name
    assert np.abs(train[3, :, :, 28:].astype(int) - np.reshape(RED, (3, 1, 1))).max() <= 3  # the photo is upright
    assert (tmp_path / "dataset/unusable.csv").read_text().startswith("path,reason\ni broken.jpg,")
    assert said[-1].message == (
        "image_folder: 8 train and 0 test images of 3x32x32, no classes; left out 1 unusable file, listed in dataset/unusable.csv"
    )


def test_transparent_pixels_lie_on_the_background(smoke: Smoke, tmp_path: Path) -> None:
    for index, alpha in enumerate((0, 255, 128)):
        solid(tmp_path / "images" / f"{index}.png", (0, 0, 0, alpha), "RGBA", (32, 32))
    prepare(folder_params(smoke, **MESSY, background="#ff8000"), tmp_path)
    for image, colour in zip(read_dataset(tmp_path).train, ((255, 128, 0), (0, 0, 0), (127, 64, 0)), strict=True):
        assert np.abs(image.astype(int) - np.reshape(colour, (3, 1, 1))).max() <= 1


@pytest.mark.parametrize(
    ("options", "border"), [({"convert": True}, 150), ({"convert": True, "channels": 1}, 150), ({}, 0)]
)
@pytest.mark.parametrize(("size", "inside"), [(32, (8, 24)), (None, (2, 22))])
def test_padding_has_the_colour_below_transparent_pixels(
    smoke: Smoke, tmp_path: Path, options: dict[str, Any], border: int, size: int | None, inside: tuple[int, int]
) -> None:
    """A picture with a transparent margin gets no bars of another colour. Without data.convert, padding is black."""
    solid(tmp_path / "images" / "opaque.png", RED, size=(40, 20))
    if options:
        solid(tmp_path / "images" / "clear.png", (0, 0, 0, 0), "RGBA", (40, 20))
    fit = {"size": size, "fit": "pad"} if size else {}
    prepare(folder_params(smoke, **options, **fit, background="#969696", test_fraction=0.0), tmp_path)
    *clear, opaque = read_dataset(tmp_path).train
    first, last = inside
    assert (opaque[:, :first] == border).all() and (opaque[:, last:] == border).all()
    assert (opaque[:, first:last] != border).any(0).all()
    assert all((image == border).all() for image in clear)


def test_grey_if_one_channel_is_wanted(smoke: Smoke, tmp_path: Path) -> None:
    colours = draw_messy_folder(tmp_path / "images")
    prepare(folder_params(smoke, **MESSY, channels=1), tmp_path)
    train = read_dataset(tmp_path).train
    assert train.shape == (8, 1, 32, 32)
    luma = np.array(list(colours.values())) @ [0.299, 0.587, 0.114]
    assert np.abs(train[..., :20] - luma.reshape(8, 1, 1, 1)).max() <= 4


# Files that are left out.


def draw_broken(folder: Path) -> None:
    """Draws twelve images and four unusable files."""
    draw_folder(folder)
    (folder / "class 0" / "99, cut.png").write_bytes((folder / "class 0" / "00.png").read_bytes()[:60])
    (folder / "class 1" / "x.jpg").touch()
    (folder / "class 2" / "y.zip").write_bytes(bytes(100))
    draw(folder / "class 2" / "large.png", 0, side=9)
    (folder / "broken class").mkdir()
    (folder / "broken class" / "z.png").write_bytes(b"x")


def test_broken_files_are_left_out_and_listed(smoke: Smoke, tmp_path: Path) -> None:
    """The dataset equals one without the broken files: the same images, split, classes and hash."""
    draw_folder(tmp_path / "sound" / "images")
    draw_broken(tmp_path / "broken" / "images")
    for root in ("sound", "broken"):
        prepare(folder_params(smoke, unusable="skip"), tmp_path / root)
    sound, broken = files_of(tmp_path / "sound"), files_of(tmp_path / "broken")
    listed = broken.pop("unusable.csv").decode()
    assert sound == broken
    assert listed == (
        "path,reason\n"
        'broken class/z.png,"no PNG or JPEG image, or damaged"\n'
        '"class 0/99, cut.png",truncated\n'
        "class 1/x.jpg,empty file\n"
        "class 2/large.png,9x9 instead of 8x8\n"
        "class 2/y.zip,not a readable zip file: File is not a zip file\n"
    )
    prepare(folder_params(smoke, unusable="skip"), tmp_path / "broken")
    assert files_of(tmp_path / "broken") == broken | {"unusable.csv": listed.encode()}


def test_the_list_goes_with_its_dataset(smoke: Smoke, tmp_path: Path) -> None:
    draw_broken(tmp_path / "images")
    prepare(folder_params(smoke, unusable="skip"), tmp_path)
    shutil.rmtree(tmp_path / "images")
    draw_folder(tmp_path / "images")
    prepare(folder_params(smoke, unusable="skip"), tmp_path)
    assert "unusable.csv" not in files_of(tmp_path)


def test_an_odd_first_image_is_left_out_and_not_all_others(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images")
    draw(tmp_path / "images" / "class 0" / "000.png", 0, side=16)
    about = prepare(folder_params(smoke, unusable="skip"), tmp_path)
    assert about.counts == {"train": 9, "test": 3}
    assert about.shape == [3, 8, 8]
    assert (tmp_path / "dataset/unusable.csv").read_text().endswith("\nclass 0/000.png,16x16 instead of 8x8\n")


def test_names_of_any_characters_are_one_row_each(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images")
    for name in (b"new\nline.png", b"not utf-8 \xff.png"):
        (tmp_path / "images" / "class 1" / os.fsdecode(name)).touch()
    prepare(folder_params(smoke, unusable="skip"), tmp_path)
    rows = records.read_csv(tmp_path / "dataset" / "unusable.csv")
    assert [row["path"] for row in rows] == ["'class 1/new\\nline.png'", "'class 1/not utf-8 \\udcff.png'"]


@pytest.mark.parametrize("name", ["x.png", "x.zip"])
def test_nothing_usable_is_an_error(smoke: Smoke, tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).touch()
    for unusable in ("skip", "error"):
        with pytest.raises(InputError, match=r"^images: .*x\.(png|zip) \(.*; repair or remove them$"):
            prepare(folder_params(smoke, unusable=unusable), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_all_of_another_size_than_wanted(smoke: Smoke, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images")
    with pytest.raises(InputError, match=r"12 of 12 images .*; data\.size and data\.fit give them one size$"):
        prepare(folder_params(smoke, unusable="skip", size=16), tmp_path)


# All of CIFAR-10.


@pytest.mark.skipif(not CIFAR.is_dir(), reason="../shared/data with the CIFAR-10 zips is not there")
def test_cifar10_from_the_zips(smoke: Smoke, tmp_path: Path) -> None:
    """Checks the published mean and deviation of the training images, and some images decoded by hand."""
    said: list[Progress] = []
    about = prepare(folder_params(smoke, path=str(CIFAR)), tmp_path, said.append)
    dataset = read_dataset(tmp_path)
    assert about.counts == {"train": 50_000, "test": 10_000}
    assert about.classes == NAMES
    assert about.mean == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-5)
    assert about.std == pytest.approx([0.24703, 0.24349, 0.26159], abs=1e-5)
    assert dataset.train_labels is not None
    assert dataset.test_labels is not None
    assert np.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [1000] * 10
    done = [progress.done for progress in said]
    assert done == sorted(done)
    assert done[-1] == 60_000
    with zipfile.ZipFile(CIFAR / "cifar10-test.zip") as archive:
        names = sorted(archive.namelist())
        for row in range(0, 10_000, 250):
            assert np.array_equal(dataset.test[row], unpacked_png(archive.read(names[row])))
            assert NAMES[dataset.test_labels[row]] == names[row].split("/")[1]


def unpacked_png(png: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decodes an 8-bit RGB PNG that is not interlaced to uint8 3,H,W, by the PNG specification, section 9."""
    width, height = struct.unpack(">II", png[16:24])
    packed, start = b"", 8
    while start < len(png):
        (length,) = struct.unpack(">I", png[start : start + 4])
        packed += png[start + 8 : start + 8 + length] if png[start + 4 : start + 8] == b"IDAT" else b""
        start += 12 + length
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 3 * width).astype(int)
    image = np.zeros((height + 1, width + 1, 3), int)  # a row of zeros above, and a column of zeros on the left
    for y, row in enumerate(rows, 1):
        for x, value in enumerate(row[1:].reshape(width, 3), 1):
            left, above, corner = image[y, x - 1], image[y - 1, x], image[y - 1, x - 1]
            estimate = left + above - corner
            errors = [abs(estimate - neighbour) for neighbour in (left, above, corner)]
            paeth = np.where(
                (errors[0] <= errors[1]) & (errors[0] <= errors[2]),
                left,
                np.where(errors[1] <= errors[2], above, corner),
            )
            predicted = (0, left, above, (left + above) // 2, paeth)[row[0]]
            image[y, x] = (value + predicted) % 256
    return image[1:, 1:].transpose(2, 0, 1).astype(np.uint8)
