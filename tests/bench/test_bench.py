"""Checks that docs/speed.md and the other tables show exactly the recorded results."""

import subprocess
import sys
from pathlib import Path

from bench import growth

ROOT = Path(__file__).parents[2]


def test_the_page_equals_its_results() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.page", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_usual_settings_are_measured_on_every_device() -> None:
    """The table of phases describes the base settings, so growth.VALUES must contain them on every device."""
    for device, base in growth.BASE.items():
        for name, values in growth.VALUES[device].items():
            assert base[name] in values, (device, name)
