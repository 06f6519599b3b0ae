"""Checks that a new sampler takes one function and one row of ddpm/diffusion/samplers.py, and no other change."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from ddpm.errors import InputError
from ddpm.files import paths, samples
from ddpm.files.params import Params
from ddpm.parameters import Point

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).with_name("toy_sampler.py")
POINTS = [Point(schedule="cosine", sampler=row, steps=steps) for row in ("fresh", "straight") for steps in (2, 5)]


@pytest.fixture(scope="module")
def with_the_toy(
    made: Path,
    smoke: Callable[..., Params],
    tmp_path_factory: pytest.TempPathFactory,
    write_scores: Callable[..., None],
) -> Path:
    """Creates a checkout whose code has the toy sampler, and whose params.yaml has two rows for it."""
    root = tmp_path_factory.mktemp("toy") / "checkout"
    shutil.copytree(made, root, symlinks=True, ignore=shutil.ignore_patterns("training"))
    shutil.copytree(ROOT / "ddpm", root / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "ddpm/diffusion/samplers.py").open("a", encoding="utf-8") as module:
        module.write(TOY.read_text(encoding="utf-8").partition("Sampler\n")[2])
    rows = {
        "fresh": {"sampler": "renoised", "own": {"share": 0.3}},
        "straight": {"sampler": "renoised", "own": {"share": 0}},
    }
    samplers = ["ddpm", "ddim", *rows]
    params = smoke(training={"steps": 24}, samplers=rows, sweep={"samplers": samplers})
    YAML().dump(params.to_json(), root / "params.yaml")
    for point in POINTS:
        ddpm(root, "sample", point.name)
        write_scores(root, point, 20.0)
    return root


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddpm", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)


def ddpm(root: Path, *arguments: str) -> None:
    done = run(root, *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.proof
def test_it_draws_the_points_of_a_sweep(with_the_toy: Path) -> None:
    found = {point.name: samples.read_samples(with_the_toy / paths.samples_file(point)) for point in POINTS}
    assert [each.evaluations for each in found.values()] == [2, 5, 2, 5]
    ddim = samples.read_samples(with_the_toy / paths.samples_file(Point.parse("cosine-ddim-5"))).images
    apart = {name: abs(ddim.astype(int) - each.images).max() for name, each in found.items()}
    assert apart["cosine-straight-5"] <= 1 < apart["cosine-fresh-5"]  # without fresh noise, the toy sampler is DDIM


@pytest.mark.proof
def test_the_report_shows_it(with_the_toy: Path) -> None:
    ddpm(with_the_toy, "report")
    assert json.loads((with_the_toy / "report/best.json").read_text())["point"] == "cosine-fresh-2"
    page = (with_the_toy / "report/index.html").read_text()
    assert all(point.name in page for point in POINTS)


@pytest.mark.proof
def test_pictures_are_made_with_it(with_the_toy: Path, tmp_path: Path) -> None:
    start = ("generate", "--model", "models/cosine", "--steps", "5", "--out", str(tmp_path / "picture.png"))
    ddpm(with_the_toy, *start, "--sampler", "fresh", "--strip", "-n", "2")
    ddpm(with_the_toy, *start, "--sampler", "straight", "--encode-decode", "4")
    assert json.loads((tmp_path / "picture.json").read_text())["share"] == 0
    refused = run(with_the_toy, *start, "--sampler", "fresh", "--encode-decode", "4")
    assert refused.returncode == 2 and "'renoised' with share = 0.3 draws noise of its own" in refused.stderr


def test_an_option_that_it_does_not_take_is_refused(with_the_toy: Path, smoke: Callable[..., Params]) -> None:
    text = (with_the_toy / "params.yaml").read_text(encoding="utf-8")
    try:
        (with_the_toy / "params.yaml").write_text(text.replace("share: 0.3", "shear: 0.3"), encoding="utf-8")
        refused = run(with_the_toy, "sample", POINTS[0].name)
    finally:
        (with_the_toy / "params.yaml").write_text(text, encoding="utf-8")
    expected = "ddpm: samplers.fresh: sampler 'renoised' takes no shear; it takes spacing, share\n"
    assert (refused.returncode, refused.stderr) == (2, expected)
    with pytest.raises(InputError, match="own: eta: write it in the row itself"):
        smoke(samplers={"ddim": {"own": {"eta": 0.5}}})
