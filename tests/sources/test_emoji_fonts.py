"""recipes/emoji.py says in one line why it cannot read a font, and writes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "emoji.py"
PLAIN = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@pytest.mark.parametrize("font", [PLAIN, SCRIPT])
def test_a_font_without_pictures_is_one_line(tmp_path: Path, font: Path) -> None:
    command = [sys.executable, SCRIPT, tmp_path / "all", font]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"{font}: not a font with one table CBDT")
    assert not (tmp_path / "all").exists()


def test_asking_for_help_writes_no_folder(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("usage: ") and not list(tmp_path.iterdir())
