"""The page of measurements is what its results say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_equals_its_results() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.page", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
