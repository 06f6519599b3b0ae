"""Checks that the memory of `prepare` and `train` does not grow with the images, which are memory-mapped files.

Measures the anonymous memory of all processes of a stage, without the page cache (Pss_Anon of /proc/PID/smaps_rollup).
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from ddpm.files.params import Params

ROOT = Path(__file__).parents[2]
FEW, MANY, SIDE = 2_000, 22_000, 64
SMALLEST = {"channels": 8, "multipliers": [1], "attention": []}

pytestmark = [
    pytest.mark.proof,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells anonymous memory"),
]


def png(index: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (index % 256, index // 256 % 256, 7)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def zipped(path: Path, count: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(count):
            archive.writestr(f"class{index % 10}/image-{index:07}.png", png(index))


def parquet(path: Path, count: int) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.mkdir()
    for start in range(0, count, FEW):
        table = pa.table({"image": [png(index) for index in range(start, start + FEW)]})
        pq.write_table(table, path / f"train-{start:07}.parquet", row_group_size=500)


def anonymous(process: psutil.Process) -> int:
    """Returns the anonymous memory of a process and its children in KiB."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            text = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):  # the process has ended
            continue
        total += sum(map(int, re.findall(r"^Pss_Anon: +(\d+) kB$", text, re.MULTILINE)))
    return total


def peak(root: Path, *verb: str) -> int:
    """Runs a stage and returns its peak of anonymous memory in KiB."""
    highest, command = 0, [sys.executable, "-B", "-m", "ddpm", *verb]
    with (root / "said").open("w") as said:
        process = psutil.Popen(command, cwd=root, stdout=said, stderr=subprocess.STDOUT)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            highest = max(highest, anonymous(process))
        time.sleep(0.05)
    assert process.returncode == 0, (root / "said").read_text()
    return highest


@pytest.mark.parametrize(
    ("source", "make", "path"), [("image_folder", zipped, "many.zip"), ("huggingface", parquet, "many")]
)
def test_memory_does_not_grow_with_the_images(
    source: str,
    make: Callable[[Path, int], None],
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    smoke: Callable[..., Params],
) -> None:
    if source == "huggingface":
        pytest.importorskip("datasets")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    training = {"steps": 3, "batch": 4, "validation_images": 8}
    params = smoke(data={"source": source, "path": path}, network=SMALLEST, training=training)
    peaks: dict[str, list[int]] = {"prepare": [], "train": []}
    for count in (FEW, MANY):
        root = tmp_path / str(count)
        root.mkdir()
        make(root / path, count)
        (root / "params.yaml").write_text(json.dumps(params.to_json()), encoding="utf-8")
        peaks["prepare"].append(peak(root, "prepare"))
        peaks["train"].append(peak(root, "train", "cosine"))
    array = (MANY - FEW) * 3 * SIDE**2 / 1024
    print(f"KiB for {FEW:,} and {MANY:,} images: {peaks}; the arrays grow by {array:,.0f}")
    for few, many in peaks.values():
        assert many - few < 0.1 * array
