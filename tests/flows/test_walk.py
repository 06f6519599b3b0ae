"""Runs README's commands for own pictures as a new user would, on a messy folder in a fresh clone, and opens the report."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from ruamel.yaml import YAML

from ddpm.errors import InputError
from ddpm.files.params import Params
from ddpm.stages.prepare import prepare

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
SIDE = 64
# Smaller values for the recipe, so that this test takes a minute.
SMALL: dict[str, dict[str, Any]] = {
    "network": {"channels": 8},
    "training": {"steps": 6, "batch": 4, "validate_every": 6, "validation_images": 4},
    "sampling": {"images": 8, "batch": 8},
    "evaluation": {"layer": 64, "images": 8},
    "likelihood": {"images": 4, "times": 2},
    "sweep": {"samplers": ["ddim"], "steps": [2, 3]},
}


def commands() -> list[list[str]]:
    """Returns README's commands below "Your own images"."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own images")[2]
    return [shlex.split(line, comments=True) for line in section.split("```")[1].strip().splitlines()]


def messy_folder(folder: Path) -> list[str]:
    """Fills a folder with typical pictures of a user. Returns the names of the broken files."""
    random = np.random.default_rng(0)
    for sub in ("holiday/2019", "holiday/2020", "Scans"):
        (folder / sub).mkdir(parents=True)
    picture = [
        Image.fromarray(np.kron(random.integers(0, 256, (4, 6, 3), np.uint8), np.ones((30, 25, 1), np.uint8)))
        for _ in range(24)
    ]
    for number in range(8):
        picture[number].save(folder / f"holiday/2019/IMG_{number}.JPG", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture[8].save(folder / "holiday/2020/turned.jpeg", exif=turned)
    picture[9].convert("L").save(folder / "Scans/grey.png")
    picture[10].convert("CMYK").save(folder / "Scans/print.jpg")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture[11].save(folder / "Scans/with-profile.PNG", icc_profile=profile)
    Image.fromarray(random.integers(0, 2**16, (90, 70), np.uint16)).save(folder / "Scans/deep.png")
    picture[12].convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "holiday/2020/palette.png")
    ghost = picture[13].convert("RGBA")
    ghost.putalpha(Image.linear_gradient("L").resize(ghost.size))
    ghost.save(folder / "holiday/2020/transparent.png")
    picture[14].save(folder / "holiday/2020/moving.gif", save_all=True, append_images=picture[15:18])
    for number in range(18, 24):
        picture[number].resize((200 + number, 100)).save(folder / f"holiday/2020/wide {number}.png")
    half = io.BytesIO()
    picture[0].save(half, "JPEG")
    (folder / "holiday/2020/half.jpg").write_bytes(half.getvalue()[: len(half.getvalue()) // 2])
    (folder / "holiday/2020/empty.png").touch()
    for name in (".DS_Store", "Thumbs.db", "holiday/._IMG_1.JPG", "notes.txt"):
        (folder / name).write_bytes(b"\0\1")
    return ["holiday/2020/empty.png", "holiday/2020/half.jpg"]


# The advice of each refusal of the messy folder, in order, and the setting that follows the advice.
ADVICE: list[tuple[str, dict[str, object]]] = [
    ("data.convert: true converts some of them", {"convert": True}),
    ("data.size and data.fit give some of them one size", {"size": 32}),
    ("data.size and data.fit give some of them one size", {"fit": "crop"}),
    ("leave them out with data.unusable: skip", {"unusable": "skip"}),
]


def test_the_advice_of_each_refusal_leads_to_a_dataset(smoke: Callable[..., Params], tmp_path: Path) -> None:
    broken = messy_folder(tmp_path / "images")
    data: dict[str, object] = {"source": "image_folder"}
    for advice, change in ADVICE:
        with pytest.raises(InputError, match=re.escape(advice)):
            prepare(smoke(data=data), tmp_path)
        data |= change
    record = prepare(smoke(data=data), tmp_path)
    assert list(record.shape) == [3, 32, 32] and sum(record.counts.values()) == 22
    rows = (tmp_path / "dataset" / "unusable.csv").read_text().splitlines()[1:]
    assert [row.partition(",")[0] for row in rows] == broken


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, clone_maker: Callable[[Path], Any]) -> Iterator[Any]:
    made = clone_maker(tmp_path_factory.mktemp("walk"))
    yield made
    made.end()


def walk(clone: Any, command: list[str]) -> str:
    """Runs a command of README in the environment of the tests, instead of the environment that `make` creates."""
    if command[:2] == ["make", "demo"]:
        command = [sys.executable, "-m", "flows", "--recipe", command[2].removeprefix("RECIPE=")]
    if command[0] == ".":
        return ""
    done = clone.run(*command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return str(done.stdout + done.stderr)


def test_from_a_folder_of_pictures_to_a_report_and_a_grid(clone: Any, page: Any) -> None:
    broken = messy_folder(clone.root / "images" / "mine")
    yaml, path = YAML(), clone.root / "recipes" / "photos-cpu.yaml"
    recipe = yaml.load(path)
    for section, values in SMALL.items():
        recipe[section].update(values)
    yaml.dump(recipe, path)

    train, *others = commands()
    said = walk(clone, train)
    answer = re.search(r"^best: (\S+), FID \S+ \(\S+ to \S+\)$", said, re.MULTILINE)
    assert answer and "report/index.html" in said.partition(answer[0])[2]
    assert [line.partition(",")[0] for line in (clone.root / "dataset/unusable.csv").read_text().splitlines()[1:]] == [
        f"mine/{name}" for name in broken
    ]
    for command in others:
        walk(clone, command)
    with Image.open(clone.root / "grid.png") as grid:
        assert grid.mode == "RGB" and min(grid.size) > 8 * SIDE  # a grid of 64 images

    address = (clone.root / "report" / "index.html").as_uri()
    page.goto(address)
    assert answer[1] in page.inner_text("body")
    wide = page.evaluate("[...document.images].filter(image => image.complete && image.naturalWidth >= 64).length")
    assert wide > 0
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_then_a_value_is_changed_and_dvc_has_nothing_left_to_do(clone: Any) -> None:
    said = walk(clone, ["ddpm", "run", "sweep.steps=[2]"])
    assert re.search(r"^best: cosine-ddim-2, FID ", said, re.MULTILINE)
    assert "Running stage" not in clone.repro()
    assert re.search(r"^champion: version \d+ \(cosine-ddim-", walk(clone, ["ddpm", "promote"]), re.MULTILINE)
