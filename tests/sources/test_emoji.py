"""Checks that recipes/emoji.py takes the pictures out of the font, and that recipes/emoji.yaml reads them on white."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from ddpm.files.params import Params
from ddpm.runtime.progress import silent
from ddpm.sources.source import SOURCES

ROOT = Path(__file__).parents[2]
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SCRIPT = ROOT / "recipes" / "emoji.py"
PLAIN = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def written(folder: Path, *font: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, folder, *font]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_pictures_of_the_font_become_images_on_white(tmp_path: Path) -> None:
    if not FONT.exists():
        pytest.skip("no emoji font: apt-get install fonts-noto-color-emoji")
    done = written(tmp_path / "all")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert done.stdout == f"{len(names):,} pictures written to {tmp_path / 'all'}\n" and len(names) > 3000
    (tmp_path / "images").mkdir()
    for name in ("u1F600.png", "u1F34E.png", *names[:6]):  # checks a grinning face, a red apple and a few others
        shutil.copy(tmp_path / "all" / name, tmp_path / "images" / name)
    data = replace(Params.load(ROOT / "recipes" / "emoji.yaml").data, path="images", test_fraction=0.0)
    contents = SOURCES["image_folder"].open(data, 0, tmp_path, silent)
    images = np.zeros((contents.counts[0], *contents.shape), np.uint8)
    contents.fill(images, images[:0])
    assert contents.shape == (3, 32, 32) and len(images) == len(list((tmp_path / "images").iterdir()))
    order = sorted(path.name for path in (tmp_path / "images").iterdir())
    face, apple = (images[order.index(name)].astype(int) for name in ("u1F600.png", "u1F34E.png"))
    for picture in (face, apple):
        assert (picture[:, [0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert apple[0, 16, 16] > 150 > apple[1, 16, 16] and apple[2, 16, 16] < 150  # the apple is red
    yellow = face[:, 8, 16]
    assert min(yellow[:2]) > 150 > yellow[2]


def test_a_missing_font_is_one_line(tmp_path: Path) -> None:
    done = written(tmp_path / "all", str(tmp_path / "none.ttf"))
    assert done.returncode == 1 and "fonts-noto-color-emoji" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "all").exists()


@pytest.mark.parametrize("font", [PLAIN, SCRIPT])
def test_a_font_without_pictures_is_one_line(tmp_path: Path, font: Path) -> None:
    done = written(tmp_path / "all", str(font))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"{font}: not a font with one table CBDT")
    assert not (tmp_path / "all").exists()


def test_asking_for_help_writes_no_folder(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("usage: ") and not list(tmp_path.iterdir())


def test_pictures_of_the_font_have_an_alpha_channel_that_matters(tmp_path: Path) -> None:
    """Without transparent pixels, test_the_pictures_of_the_font_become_images_on_white would show nothing."""
    if not FONT.exists():
        pytest.skip("no emoji font: apt-get install fonts-noto-color-emoji")
    written(tmp_path)
    with Image.open(tmp_path / "u1F600.png") as picture:
        assert picture.convert("RGBA").getpixel((0, 0))[3] == 0
