"""Checks that bad input to a command gives one clear line, exit code 2, no changed file, and little memory use.

These tests give the commands each kind of file that a stage reads. Tests of single readers are in the files of their modules,
such as test_decoding.py and test_params.py.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from ddpm import cli
from ddpm.errors import InputError
from ddpm.files import arrays as arrays_file
from ddpm.files import checkpoint, dataset, models, paths, records, samples
from ddpm.files.params import Params
from ddpm.files.scores import Best, Row, read_scores, write_table
from ddpm.parameters import Point
from ddpm.runtime.drawing import check_point
from ddpm.stages.report import _read_rows
from ddpm.stages.sample import sample_point
from ddpm.stages.train import network_entry, noise_schedule, schedule_entry
from ddpm.tools.exchange import export_diffusers, import_diffusers
from ddpm.tracking.publish.publishing import PointFiles

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
VALID = json.dumps(YAML(typ="safe").load(RECIPE.read_text(encoding="utf-8")))
POINT = Point.parse("cosine-ddim-5")
MODEL, SAMPLES, METRICS = Path("models/cosine"), paths.samples_file(POINT), paths.metrics_file(POINT)
PIPELINE = Path("pipeline")  # a folder of diffusers
CONFIG, SCHEDULER = str(PIPELINE / "unet" / "config.json"), str(PIPELINE / "scheduler" / "scheduler_config.json")
ROOM = 2**30  # the largest number of bytes that a refused command may use

pytestmark = pytest.mark.timeout(60)


# A checkout, and the messages of the program in this checkout.


@pytest.fixture(scope="module")
def checkout(
    smoke: Callable[..., Params],
    digits: Path,
    write_scores: Callable[..., None],
    bound_of: Callable[[str], dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Creates every kind of file that a stage reads, for the smoke recipe. Files are made up where that is quicker."""
    root, params = tmp_path_factory.mktemp("bad"), smoke()
    shutil.copyfile(RECIPE, root / "params.yaml")
    shutil.copytree(digits / "dataset", root / "dataset")
    network = network_entry(params, (1, 8, 8))
    about = {"schedule": schedule_entry(params, "cosine").to_json(), "target": "eps", "variance": "fixed"}
    about["network"] = network.content
    about |= {"data": {"name": "digits", "sha256": "d" * 64, "shape": [1, 8, 8], "classes": None, "range": [-1, 1]}}
    about |= {"training": {"seed": 0}}
    torch.manual_seed(0)
    checkpoint.save(root / MODEL, checkpoint.network(network), about)
    images = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), np.uint8)
    for point in params.points():
        samples.write_samples(root / paths.samples_file(point), images, point.steps, "m" * 64)
        write_scores(root, point, 10.0)
    shutil.rmtree(root / "report")
    curves = [root / paths.history_file("cosine"), root / paths.losses_by_time_file("cosine")]
    curves.append(root / paths.likelihood_curve_file("cosine"))
    records.write_csv(curves[0], [{"step": 1, "loss": 1.0, "validation_loss": ""}])
    records.write_csv(curves[1], [{"t": 1, "loss_simple": 1.0}])
    records.write_csv(curves[2], [{"time": 1, "rate": 1.0, "distortion": 1.0}])
    records.write_record(root / paths.training_metrics_file("cosine"), TRAINED, curves[:2])
    bound = bound_of("cosine")
    records.write_record(root / paths.likelihood_file("cosine"), bound, curves[2:])
    export_diffusers(root / MODEL, root / PIPELINE)
    for number in range(4):
        folder = root / "images" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number, 0]).save(folder / f"{number}.png")
    return root


TRAINED = {"schedule": "cosine", "steps": 60, "parameters": 5000, "loss": 0.5, "validation_loss": None}


@pytest.fixture(scope="module")
def copy(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Returns a copy of `checkout` that tests damage in turn, and the tree of the undamaged copy."""
    root = tmp_path_factory.mktemp("copy") / "root"
    shutil.copytree(checkout, root)
    return root, tree(root)


@pytest.fixture
def here(checkout: Path, copy: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes the copy the working folder, and repairs it after the test."""
    root, good = copy
    monkeypatch.chdir(root)
    for variable in ("MLFLOW_TRACKING_URI", "DVC_STAGE", "DDPM_WATCH_PID"):
        monkeypatch.delenv(variable, raising=False)
    yield root
    for name in sorted(changes(good, tree(root)), reverse=True):  # the content of a folder comes before the folder
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):  # this also removes a file in the place of a folder
            path.unlink()
    for name in sorted(changes(good, tree(root))):
        (root / name).mkdir() if (checkout / name).is_dir() else shutil.copyfile(checkout / name, root / name)
    good.update(tree(root))


def tree(root: Path) -> dict[str, Any]:
    """Returns every file and folder below root, with values that change when a file is written or replaced."""
    found = {path.relative_to(root).as_posix(): path.lstat() for path in root.rglob("*")}
    return {
        name: None if stat.S_ISDIR(about.st_mode) else (about.st_ino, about.st_size, about.st_mtime_ns)
        for name, about in found.items()
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in {*before, *after} if before.get(name, ...) != after.get(name, ...)}


@contextmanager
def bounded() -> Iterator[None]:
    """Limits this process to ROOM bytes more than its present memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def one_line(text: str) -> str:
    assert text.endswith("\n"), text
    line = text.removesuffix("\n")
    assert line.isprintable(), text  # so the message is a single line
    assert line.startswith("ddpm: "), text
    assert "Traceback" not in line
    assert "pickle" not in line  # numpy would recommend loading the refused file with pickle
    assert len(line) < 1000, line
    return line.removeprefix("ddpm: ")


Refused = Callable[..., str]


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Refused]:
    """Returns refused("train", "cosine"), which runs the program and returns the one line with which it refuses."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ddpm", *arguments])
        before = tree(here)
        with bounded(), pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert ended.value.code == 2, said
        assert not changes(before, tree(here))
        return one_line(said.err)

    yield run
    signal.signal(signal.SIGTERM, handler)


def set_params(*places: tuple[str, Any]) -> None:
    """Sets values in params.yaml. A place is a dotted key. The value ... removes the key."""
    values = json.loads(VALID)
    for place, value in places:
        *path, last = place.split(".")
        section = values
        for key in path:
            section = section[key]
        if value is ...:
            del section[last]
        else:
            section[last] = value
    text = json.dumps(values)  # JSON is valid YAML, except for infinities and NaN
    Path("params.yaml").write_text(
        text.replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan")
    )


# params.yaml: single values.

NAN, INFINITY = float("nan"), float("inf")
HUGE = 10**30
VALUES: list[tuple[str, Any, str]] = [
    # unknown keys, missing keys, values of another type
    ("trainning", {"steps": 3}, "trainning: Extra inputs"),
    ("data.sourse", "digits", "data.sourse: Extra"),
    ("samplers.ddim.etta", 0.5, "samplers.ddim.etta"),
    ("schedules.cosine.end", "0.1", "schedules.cosine.end"),
    ("data", ..., "data: Field required"),
    ("network.channels", ..., "network.channels: Field required"),
    ("sweep.steps", ..., "sweep.steps: Field required"),
    ("data", None, "data: "),
    ("data", [], "data: "),
    ("training", "fast", "training: "),
    ("training", 3, "training: "),
    ("sweep", ["cosine"], "sweep: "),
    ("samplers", [{"sampler": "ddim"}], "samplers: "),
    ("samplers", {}, "sweep.samplers: no row 'ddpm'"),
    ("samplers.ddim", "ddim", "samplers.ddim"),
    ("samplers.ddim", None, "samplers.ddim"),
    ("schedules.cosine", {}, "schedules.cosine.schedule: Field required"),
    ("seed", "0", "seed: "),
    ("seed", 0.0, "seed: "),
    ("seed", [0], "seed: "),
    ("data.path", 3, "data.path: "),
    ("data.path", None, "data.path: "),
    # booleans for numbers, numbers for booleans
    ("seed", True, "seed: "),
    ("network.blocks", True, "network.blocks: "),
    ("network.dropout", True, "network.dropout: "),
    ("sampling.batch", False, "sampling.batch: "),
    ("training.flip", 1, "training.flip: "),
    ("training.compile", "no", "training.compile: expected true, false or auto (given: 'no')"),
    ("sampling.compile", 1, "sampling.compile: expected true, false or auto (given: 1)"),
    ("sampling.precision", True, "sampling.precision: "),
    ("diffusion.conditional", 0, "diffusion.conditional: "),
    ("sampling.clip", 1, "sampling.clip: "),
    ("sampling.clip", None, "sampling.clip: "),
    # infinities and NaN
    ("training.ema", NAN, "training.ema: "),
    ("training.clip", NAN, "training.clip: "),
    ("training.clip", INFINITY, "training.clip: "),
    ("training.learning_rate", INFINITY, "training.learning_rate: "),
    ("network.dropout", NAN, "network.dropout: "),
    ("data.test_fraction", NAN, "data.test_fraction: "),
    ("sampling.clip", NAN, "sampling.clip: "),
    ("samplers.ddim.eta", NAN, "samplers.ddim.eta: "),
    ("schedules.cosine.s", NAN, "schedules.cosine.s: "),
    ("schedules.linear.end", INFINITY, "schedules.linear.end: "),
    # negative, zero, beyond the end
    ("seed", 2**32, "seed: "),
    ("network.dropout", -0.1, "network.dropout: "),
    ("network.channels", -8, "network.channels: "),
    ("network.channels", 0, "network.channels: "),
    ("network.multipliers", [1, -2], "network.multipliers.1: "),
    ("network.multipliers", [0], "network.multipliers.0: "),
    ("network.multipliers", [1] * 9, "network.multipliers: "),
    ("network.attention", [-4], "network.attention.0: "),
    ("network.heads", 0, "network.heads: "),
    ("training.batch", -1, "training.batch: "),
    ("training.warmup", -1, "training.warmup: "),
    ("training.ema", -0.5, "training.ema: "),
    ("training.label_dropout", 1.0, "training.label_dropout: "),
    ("training.validation_images", -1, "training.validation_images: "),
    ("training.threads", 0, "training.threads: "),
    ("diffusion.timesteps", 1, "diffusion.timesteps: "),
    ("diffusion.timesteps", 100_001, "diffusion.timesteps: "),
    ("evaluation.images", 3, "evaluation.images: "),
    ("likelihood.images", 1, "likelihood.images: "),
    ("data.size", 2, "data.size: expected null, a side of 4 ... 4096 pixels, or [height, width] (given: 2)"),
    (
        "data.size",
        [64, 96, 3],
        "data.size: expected null, a side of 4 ... 4096 pixels, or [height, width] (given: [64, 9",
    ),
    ("data.size", [64, 96.0], "data.size: "),
    ("data.size", [64, 8192], "data.size: "),
    ("data.size", "64x96", "data.size: "),
    ("data.size", True, "data.size: "),
    ("data.background", "red", 'data.background: expected "#rrggbb", six hexadecimal digits, in quotes'),
    ("data.background", None, "since YAML takes # for a comment (given: None)"),
    ("data.background", "#ffffff\n", "data.background: "),
    ("data.channels", 4, "data.channels: "),
    ("samplers.ddim.eta", -0.1, "samplers.ddim.eta: "),
    ("samplers.ddim.eta", 1.5, "samplers.ddim.eta: "),
    ("compute.slots", 0, "compute.slots: "),
    ("compute.device", "tpu", "compute.device: "),
    # huge
    ("seed", HUGE, "seed: "),
    ("training.steps", HUGE, "training.steps: "),
    ("training.batch", 2**21, "training.batch: "),
    ("training.warmup", HUGE, "training.warmup: "),
    ("network.blocks", 65, "network.blocks: "),
    ("network.multipliers", [65], "network.multipliers.0: "),
    ("network.heads", HUGE, "network.heads: "),
    ("sampling.images", HUGE, "sampling.images: "),
    ("evaluation.images", HUGE, "evaluation.images: "),
    ("likelihood.batch", HUGE, "likelihood.batch: "),
    ("sweep.steps", [HUGE], "sweep.steps.0: "),
    ("compute.checkpoint_every", HUGE, "compute.checkpoint_every: "),
    # lists of names
    ("sweep.steps", [], "sweep.steps: "),
    ("sweep.steps", 5, "sweep.steps: "),
    ("sweep.steps", [0], "sweep.steps.0: "),
    ("sweep.steps", [2.5], "sweep.steps.0: "),
    ("sweep.samplers", [], "sweep.samplers: "),
    ("sweep.samplers", "ddim", "sweep.samplers: "),
    ("sweep.schedules", ["cosine", "cosine"], "sweep.schedules: names something twice"),
    ("sweep.schedules", ["../cosine"], "sweep.schedules.0: "),
    ("sweep.steps", ["a"] * 2000, "and 1,996 more"),
    ("data.source", "d" * 100_000, "data.source: "),
    ("samplers.a\nb", {"sampler": "ddim"}, "samplers.a"),
    ("sweep.schedules", ["a" * 65], "sweep.schedules.0: "),
    ("schedules." + "a" * 65, {"schedule": "cosine"}, "at most 64 characters"),
    ("data.path", "", "data.path: "),
    ("data.path", "a" * 5000, "data.path: "),
    ("data.path", "images/" + "\u00e9" * 128, "data.path: no file system has such a path"),
    ("data.path", "images\0", "data.path: no file system has such a path"),
]


@pytest.mark.parametrize(("place", "value", "message"), VALUES, ids=lambda value: str(value)[:30])
def test_a_value(refused: Refused, place: str, value: Any, message: str) -> None:
    set_params((place, value))
    line = refused("prepare")
    assert line.startswith("params.yaml: ")
    assert message in line


# params.yaml: faults that only a combination of values shows. They are found before anything is computed.

COMBINATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "attention where there is no such resolution": ({"network.attention": [5]}, "attention at height 5 never occurs"),
    "a side that cannot be halved so often": ({"network.multipliers": [1, 1, 1, 1, 1]}, "cannot be halved 4 times"),
    "heads that do not divide the channels": ({"network.heads": 3}, "heads = 3 must divide the channels"),
    "channels without whole groups": ({"network.channels": 20}, "network.channels: "),
    "a network that no memory holds": (
        {"network.channels": 4096, "network.multipliers": [64, 64]},
        "out of memory: raise training.accumulate",
    ),
    "parts of a batch": ({"training.accumulate": 3}, "accumulate: a batch of 32 does not divide"),
    "a weight decay of Adam": ({"training.weight_decay": 0.1}, "weight_decay: more than 0 for adamw"),
    "AdamW without one": ({"training.optimizer": "adamw"}, "weight_decay: more than 0 for adamw"),
    "a share without decay": (
        {"training.decay_share": 0.5},
        "decay_share, decay_to: they have no effect without decay",
    ),
    "a batch too large to pair": (
        {"training.pairing": "immiscible", "training.batch": 8192},
        "pairing: immiscible takes a batch of at most 4,096 (given: 8,192)",
    ),
    "a base that is imported": (
        {"schedules.cosine.imported": "0" * 64, "schedules.cosine.base": "a@" + "0" * 64},
        "base: an imported network is not trained here",
    ),
    "hybrid without learned variance": ({"training.loss": "hybrid"}, "training.loss: hybrid trains a variance"),
    "min_snr with a learned one": (
        {"training.loss": "min_snr", "diffusion.variance": "learned"},
        "would leave the variance",
    ),
    "a sampler that needs a learned variance": (
        {"samplers.ddpm.variance": "learned"},
        "samplers.ddpm.variance: learned needs diffusion.variance = learned",
    ),
    "guidance without classes": ({"samplers.ddim.guidance": 2.0}, "samplers.ddim: guidance needs a class-conditional"),
    "an interval without guidance": (
        {"samplers.ddim.guidance_interval": [0.3, 3.0]},
        "guidance: missing, but guidance_interval",
    ),
    "an interval that ends before it starts": (
        {"diffusion.conditional": True, "samplers.ddim.guidance": 2.0, "samplers.ddim.guidance_interval": [3.0, 0.3]},
        "samplers.ddim.guidance_interval: expected two noise levels",
    ),
    "an interval of one number": ({"samplers.ddim.guidance_interval": 3.0}, "samplers.ddim.guidance_interval"),
    "times for other steps": (
        {"samplers.ddim": {"sampler": "ddim", "times": {3: [900, 400, 0]}}},
        "samplers.ddim.times: no entry for ",
    ),
    "times that do not fall": (
        {"samplers.ddim": {"sampler": "ddim", "times": {2: [4, 9]}}},
        "samplers.ddim.times: expected S falling timesteps",
    ),
    **{
        f"times that are no numbers: {times!s:.16}": (
            {"samplers.ddim": {"sampler": "ddim", "times": times}},
            "samplers.ddim.times: expected S falling timesteps",
        )
        for times in (
            {2.5: [9, 4]},
            {True: [4]},
            {2: "94"},
            {1: [float("inf")]},
            {1: [10**400]},
        )
    },
    "times that are none": (
        {"samplers.ddim": {"sampler": "ddim", "times": [4]}},
        "samplers.ddim.times: expected S falling",
    ),
    "times and a spacing": (
        {"samplers.ddim": {"sampler": "ddim", "spacing": "leading", "times": {2: [9, 4]}}},
        "samplers.ddim.times: a row with times has neither spacing nor along",
    ),
    "a fitted row without times": (
        {"samplers.ddim": {"sampler": "ddim", "fitted_to": "a" * 64}},
        "samplers.ddim.fitted_to: only a row with times",
    ),
    "eps at a terminal SNR of zero": ({"schedules.cosine.zero_terminal_snr": True}, "set diffusion.target to v"),
    "more steps than times": ({"sweep.steps": [101]}, "sweep.steps: 101 is more than diffusion.timesteps = 100"),
    "more times than T": ({"likelihood.times": 101}, "likelihood.times: 101 is more than"),
    "a schedule that does not take it": (
        {"schedules.cosine.end": 0.5},
        "schedules.cosine: schedule 'cosine' takes no end; it takes s",
    ),
    "no such schedule": ({"schedules.cosine.schedule": "cosin"}, "schedules.cosine: no schedule 'cosin'; there are"),
    "no such sampler": ({"samplers.ddim.sampler": "dimm"}, "samplers.ddim: no sampler 'dimm'; there are"),
    "a spacing of many letters": ({"samplers.ddim.spacing": "x" * 9999}, "samplers.ddim: no spacing 'xxx"),
    "no such spacing": ({"samplers.ddim.spacing": "even"}, "samplers.ddim: no spacing 'even'; there are"),
    "ddim takes no variance": ({"samplers.ddim.variance": "fixed_small"}, "samplers.ddim: sampler 'ddim' takes no"),
    "ddpm takes no eta": ({"samplers.ddpm.eta": 0.5}, "samplers.ddpm: sampler 'ddpm' takes no eta"),
    "ddim takes no order": ({"samplers.ddim.order": 2}, "samplers.ddim: sampler 'ddim' takes no order"),
    "no schedule to go along": ({"samplers.ddim.along": "nowhere"}, "samplers.ddim: along: no schedule 'nowhere'"),
    "a GPU that is not there": ({"compute.device": "cuda"}, "compute.device is cuda, but torch finds no GPU"),
    "conditional on no classes": ({"diffusion.conditional": True}, "has no classes"),
    "a row that is not there": ({"sweep.schedules": ["linear"]}, "no row 'cosine' in schedules"),
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_a_combination_is_refused_before_a_training(refused: Refused, here: Path, case: str) -> None:
    changes, message = COMBINATIONS[case]
    if "GPU" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    set_params(*changes.items())
    if "no classes" in message:
        unlabelled(here)
    if "no row" in message:
        set_params(("sweep.schedules", ["linear"]), ("schedules.cosine", ...))
    assert message in refused("train", "cosine")


def unlabelled(root: Path) -> None:
    about = dict(dataset.read_dataset_record(root).content)
    records.write_record(root / "dataset/dataset.json", {**about, "classes": None})
    for split in ("train", "test"):
        (root / f"dataset/{split}-labels.npy").unlink()


def test_a_learned_variance_is_missed_before_the_first_evaluation(refused: Refused) -> None:
    """The row is outside the sweep, which params.yaml allows."""
    set_params(("samplers.learned", {"sampler": "ddpm", "variance": "learned"}))
    assert "cosine-learned-5: variance learned: this network has learned no variance" in refused(
        "sample", "cosine-learned-5"
    )


# params.yaml: the file as text.

GOOD = RECIPE.read_bytes()
TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "found nothing"),
    "a comment": (b"# nothing yet\n", "found nothing"),
    "a list": (b"- data\n- training\n", "found a list"),
    "a word": (b"digits\n", "found a str"),
    "a number": (b"42\n", "found a int"),
    "a tab": (b"seed: 0\ndata:\n\tsource: digits\n", "(line 3, column 1)"),
    "a key twice": (GOOD + b"seed: 1\n", 'found duplicate key "seed"'),
    "a nested key twice": (GOOD.replace(b"  path: images", b"  source: cifar10"), 'duplicate key "source"'),
    "no end of a list": (GOOD + b"x: [1, 2\n", "not readable as YAML"),
    "no end of a quote": (GOOD + b'x: "1\n', "not readable as YAML"),
    "two colons": (GOOD + b"x: y: z\n", "mapping values are not allowed"),
    "two documents": (GOOD + b"---\nseed: 1\n", "another document"),
    "an unknown alias": (GOOD + b"x: *y\n", "undefined alias"),
    "an alias of itself": (GOOD + b"x: &x [*x]\n", "x: Extra inputs"),
    "a list as a key": (GOOD + b"? [a, b]\n: c\n", "Keys should be strings"),
    "a mapping as a key": (GOOD + b"? {a: b}\n: c\n", "unhashable key"),
    "a number as a key": (GOOD + b"3: 4\n", "Keys should be strings"),
    "a Python object": (GOOD + b"x: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    "an impossible date": (GOOD.replace(b"seed: 0", b"seed: 2020-99-99"), "month must be in 1..12"),
    "a date": (GOOD.replace(b"seed: 0", b"seed: 2020-01-01"), "seed: "),
    "a tagged word": (GOOD.replace(b"seed: 0", b"seed: !!int zero"), "invalid literal for int()"),
    "a tagged float": (GOOD.replace(b"seed: 0", b"seed: !!float zero"), "could not convert string to float"),
    "5,000 digits": (GOOD.replace(b"seed: 0", b"seed: " + b"9" * 5000), "Exceeds the limit"),
    "beyond all floats": (GOOD.replace(b"2.0e-3", b"1.0e400"), "training.learning_rate: "),
    "101 brackets": (b"x: " + b"[" * 101 + b"]" * 101, "nested more than 100 levels deep"),
    "brackets without end": (b"x: " + b"[" * 300_000 + b"]" * 300_000, "nested more than 100 levels deep"),
    "dashes without end": (b"- " * 200_000, "nested more than 100 levels deep"),
    "a billion laughs": (
        b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 123)) + GOOD,
        "Extra inputs",
    ),
    "Latin-1": (GOOD + b"# caf\xe9\n", "not UTF-8 in line 75"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not UTF-8 in line 1"),
    "zeros": (bytes(4096), "control characters are not allowed"),
    "a bell": (GOOD + b"x: \x07\n", "control characters are not allowed"),
    "a PNG": (b"\x89PNG\r\n\x1a\n" + bytes(64), "not UTF-8 in line 1"),
    "another YAML": (b"%YAML 9.9\n---\n" + GOOD, "incompatible YAML document"),
    "merge of a number": (GOOD + b"<<: 3\n", "for merging"),
    "JSON cut off": (b'{"seed": 0, "data": {"source"', "not readable as YAML"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text(refused: Refused, here: Path, case: str) -> None:
    content, message = TEXTS[case]
    (here / "params.yaml").write_bytes(content)
    line = refused("prepare")
    assert line.startswith("params.yaml: ")
    assert message in line


@pytest.mark.parametrize("kind", ["missing", "a folder", "a dangling link", "a link to itself"])
def test_no_file_of_parameters(refused: Refused, here: Path, kind: str) -> None:
    path = here / "params.yaml"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to("nowhere" if kind == "a dangling link" else "params.yaml")
    assert refused("prepare").startswith("params.yaml: no")


# The command line.

COMMANDS: dict[str, tuple[list[str], str]] = {
    "no such verb": (["trian"], "No such command 'trian'"),
    "no such option": (["train", "cosine", "--fast"], "No such option"),
    "no schedule": (["train"], "Missing argument"),
    "no point to draw": (["sample"], "Missing argument"),
    "two schedules": (["train", "cosine", "linear"], "unexpected extra argument"),
    "an unknown schedule": (["train", "exponential"], "no row 'exponential' in schedules; the rows are"),
    "a schedule that is a path": (["train", "../cosine"], "no row '../cosine' in schedules"),
    "no point": (["sample", "cosine"], "no point of a sweep"),
    "a point that is a path": (["sample", "../cosine-ddim-5"], "no point of a sweep"),
    "no steps": (["sample", "cosine-ddim-0"], "no point of a sweep"),
    "very many steps": (["sample", f"cosine-ddim-{'9' * 5000}"], "no point of a sweep"),
    "more steps than times": (["sample", "cosine-ddim-101"], "times repeat"),
    "superscript steps": (["sample", "cosine-ddim-\N{SUPERSCRIPT TWO}"], "no point of a sweep"),
    "a schedule that was not trained": (["sample", "linear-ddim-5"], "make it with `ddpm train linear`"),
    "a sampler that is not there": (["sample", "cosine-heun-5"], "no row 'heun' in samplers"),
    "a point without samples": (["evaluate", "cosine-ddim-9"], "make it with `ddpm sample cosine-ddim-9`"),
    "a likelihood without a model": (["likelihood", "linear"], "make it with `ddpm train linear`"),
    "a likelihood of an unknown schedule": (["likelihood", "x"], "no row 'x' in schedules; the rows are linear, "),
    "a point of an unknown schedule": (["sample", "x-ddim-5"], "no row 'x' in schedules; the rows are linear, "),
    "no images": (["generate", "-m", "models/cosine", "-n", "0"], "-n"),
    "words for a number": (["generate", "-m", "models/cosine", "-n", "many"], "-n"),
    "another picture": (["generate", "-m", "models/cosine", "-o", "x.jpg"], "x.jpg: the picture is a PNG"),
    "no folder of a model": (["generate", "-m", "cosine"], "cosine: no such folder; choose one of models/cosine"),
    "more test images than there are": (
        ["generate", "-m", "models/cosine", "--encode-decode", str(10**12)],
        f"--encode-decode {10**12}: the test split has only 359 images",
    ),
    "no steps at all": (["generate", "-m", "models/cosine", "--steps", "0"], "--steps"),
    "one time": (["schedules", "--timesteps", "1"], "--timesteps"),
    "no times": (["schedules", "--timesteps", "0"], "--timesteps"),
    "a label": (["generate", "-m", "models/cosine", "--label", "3"], "unconditional"),
    "guidance": (["generate", "-m", "models/cosine", "--guidance", "2"], "class-conditional"),
    "guidance that is none": (["generate", "-m", "models/cosine", "--guidance", "nan"], "class-conditional"),
    "a test image beyond the last": (["generate", "-m", "models/cosine", "--blend", "0", "9999"], "numbered 0 ... 358"),
    "more images than memory": (["generate", "-m", "models/cosine", "-n", str(10**12)], "out of memory: lower -n"),
    "T beyond all tables": (["schedules", "--timesteps", str(10**12)], "--timesteps"),
    "days that are none": (["gc", "--older-than", "soon"], "--older-than"),
    "a model that is none": (["export-diffusers", "images", "out"], "images/model.json: no such file"),
    "an import of nothing": (["import-diffusers", "nowhere", "hub"], "nowhere: no such folder"),
    "an import of a name that is none": (["import-diffusers", "images", "Hub!"], "use only a-z, 0-9 and _"),
    "a card of no report": (["card"], "report/best.json: no such file"),
    "two wishes": (["promote", "--replace", "--rollback"], "exclude each other"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_line(refused: Refused, case: str) -> None:
    arguments, message = COMMANDS[case]
    assert message in refused(*arguments)


def test_output_that_finds_no_room_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ddpm", "gc", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "no room for the output" in done.stderr


def test_a_command_in_a_subfolder_names_the_folder_above(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "below" / "it").mkdir(parents=True)
    monkeypatch.chdir(here / "below" / "it")
    with pytest.raises(InputError, match=rf"params\.yaml: no such file; run this in {re.escape(str(here))}$"):
        Params.load(Path("params.yaml"))


# Images and archives.


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """Returns a PNG with correct checksums around any `rows`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(path: Path, image: Image.Image, kind: str = "PNG", **options: Any) -> None:
    image.save(path, kind, **options)


def palette(path: Path) -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(path, transparency=0)


def turned(path: Path) -> None:
    """Adds an image to a folder of 8x8 images. The image is 12x8 once the camera's orientation tag is applied."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 12)).save(path, "PNG", exif=exif)


GREY = b"".join(b"\0" + bytes(8) for _ in range(8))
NEW = "images/class 0/9.png"
IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no bytes": (lambda path: path.touch(), "empty file"),
    "zeros": (lambda path: path.write_bytes(bytes(999)), "no PNG or JPEG image"),
    "HTML": (lambda path: path.write_bytes(b"<html>404</html>"), "no PNG or JPEG image"),
    "a GIF": (lambda path: saved(path, Image.new("L", (8, 8)), "GIF"), "no PNG or JPEG image"),
    "a TIFF": (lambda path: saved(path, Image.new("L", (8, 8)), "TIFF"), "no PNG or JPEG image"),
    "a WebP": (lambda path: saved(path, Image.new("RGB", (8, 8)), "WEBP"), "no PNG or JPEG image"),
    "a zip": (lambda path: zipped(path, {"x.png": png(8, 8, GREY)}), "no PNG or JPEG image"),
    "cut off": (lambda path: path.write_bytes(png(8, 8, GREY)[:-20]), "9.png ("),
    "half of its rows": (lambda path: path.write_bytes(png(8, 8, GREY[:36])), "truncated: 36 of 72 bytes of pixels"),
    "no rows": (lambda path: path.write_bytes(png(8, 8, b"")), "9.png ("),
    "no width": (lambda path: path.write_bytes(png(0, 8, b"")), "9.png ("),
    "an impossible depth": (lambda path: path.write_bytes(png(8, 8, GREY, depth=3)), "9.png ("),
    "an impossible colour type": (lambda path: path.write_bytes(png(8, 8, GREY, colour=5)), "9.png ("),
    "an impossible filter": (lambda path: path.write_bytes(png(8, 8, GREY.replace(b"\0" * 9, b"\7" * 9))), "9.png ("),
    "16 bit": (lambda path: path.write_bytes(png(8, 8, bytes(17 * 8), depth=16)), "16 bit per channel"),
    "two billion wide": (lambda path: path.write_bytes(png(2**31 - 1, 1, b"")), "9.png ("),
    "4 GB of black": (lambda path: path.write_bytes(png(2**16, 2**16, b"")), "9.png ("),
    "CMYK": (lambda path: saved(path, Image.new("CMYK", (8, 8)), "JPEG"), "mode CMYK"),
    "colour among grey": (lambda path: saved(path, Image.new("RGB", (8, 8))), "mode RGB instead of L"),
    "grey with alpha": (lambda path: saved(path, Image.new("LA", (8, 8))), "mode LA"),
    "a palette": (lambda path: saved(path, Image.new("P", (8, 8))), "mode P"),
    "a palette with transparency": (palette, "mode P"),
    "another size": (lambda path: saved(path, Image.new("L", (9, 8))), "9x8 instead of 8x8"),
    "another size once turned": (turned, "12x8 instead of 8x8"),
    "animated": (
        lambda path: saved(path, Image.new("L", (8, 8)), save_all=True, append_images=[Image.new("L", (8, 8), 9)]),
        "animated",
    ),
    "a pipe": (os.mkfifo, "not a regular file"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "9.png ("),
}


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def patched(path: Path, members: dict[str, bytes], *changes: tuple[bytes, int, bytes]) -> None:
    """Writes a zip with some bytes replaced.

    Each change names a signature, a distance from that signature, and the new bytes.
    """
    zipped(path, members)
    content = bytearray(path.read_bytes())
    for signature, distance, new in changes:
        start = content.index(signature) + distance
        content[start : start + len(new)] = new
    path.write_bytes(bytes(content))


def link(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("9.png")
        member.create_system, member.external_attr = 3, 0o120777 << 16
        archive.writestr(member, "/etc/passwd")


def twice(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("9.png", png(8, 8, GREY))


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
ONE = {"9.png": png(8, 8, GREY)}
ZIPS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no bytes": (lambda path: path.touch(), "not a readable zip file"),
    "zeros": (lambda path: path.write_bytes(bytes(9999)), "not a readable zip file"),
    "a PNG": (lambda path: path.write_bytes(ONE["9.png"]), "not a readable zip file"),
    "cut off": (lambda path: (zipped(path, ONE), path.write_bytes(path.read_bytes()[:-30])), "not a readable zip file"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "a bomb": (
        lambda path: patched(path, ONE, (CENTRAL, 24, struct.pack("<I", 2**28 + 1))),
        "268,435,457 bytes are too many",
    ),
    "a bomb that lies": (
        lambda path: patched(path, {"9.png": bytes(2**24)}, (CENTRAL, 24, struct.pack("<I", 10))),
        "Bad CRC-32",
    ),
    "an absolute name": (lambda path: zipped(path, {"/9.png": b""}), "escapes its folder"),
    "a name that climbs": (lambda path: zipped(path, {"a/../../9.png": b""}), "escapes its folder"),
    "a drive": (lambda path: zipped(path, {"C:\\9.png": b""}), "escapes its folder"),
    "a name as long as names get": (lambda path: zipped(path, {"x" * 65_000 + ".png": b""}), "empty file"),
    "a line break in a name": (lambda path: zipped(path, {"a\nb/9.png": b""}), "a\\nb/9.png' (empty file)"),
    "a link": (link, "(a link)"),
    "encrypted": (lambda path: patched(path, ONE, (LOCAL, 6, b"\1"), (CENTRAL, 8, b"\1")), "(encrypted)"),
    "an unknown method": (
        lambda path: patched(path, ONE, (LOCAL, 8, b"\x63"), (CENTRAL, 10, b"\x63")),
        "9.png (That compression method is not supported",
    ),
    "a wrong sum": (lambda path: patched(path, ONE, (CENTRAL, 16, b"\1\2\3\4")), "Bad CRC-32"),
    "another name inside": (lambda path: patched(path, ONE, (LOCAL, 30, b"8")), "9.png (File name in directory"),
    "data beyond its end": (lambda path: patched(path, ONE, (CENTRAL, 42, b"\xff\xff\xff\x0f")), "9.png ("),
    "a name twice": (twice, "9.png (two images with this path)"),
    "a name of the folder's": (
        lambda path: zipped(path, {"0.png": png(8, 8, GREY)}),
        "class 0/0.png (two images with this path)",
    ),
}


# Advice for images that are sound. All other images need a repair.
HELP = {
    "data.convert: true converts them": (
        *("a GIF", "a TIFF", "a WebP", "16 bit", "CMYK", "colour among grey", "grey with alpha", "a palette"),
        *("a palette with transparency", "animated"),
    ),
    "data.size and data.fit give them one size": ("another size", "another size once turned"),
}


@pytest.mark.parametrize("case", [*IMAGES, *(f"zip: {case}" for case in ZIPS)])
def test_an_image_or_an_archive(refused: Refused, here: Path, case: str) -> None:
    set_params(("data.source", "image_folder"), ("data.test_fraction", 0.25))
    if case.startswith("zip: "):
        make, message = ZIPS[case.removeprefix("zip: ")]
        make(here / "images/class 0/more.zip")
    else:
        make, message = IMAGES[case]
        make(here / NEW)
    line = refused("prepare")
    assert line.startswith("images: 1 ")
    assert message in line
    help = next((help for help, cases in HELP.items() if case in cases), "repair or remove")
    assert f"; {help}" in line
    assert line.endswith("data.unusable: skip")


# A prepared dataset.


def sign(path: Path, value: Any) -> None:
    """Writes a record with the checksum of its content, as a user would who edits both."""
    if isinstance(value, dict):
        value = {**value, records.CHECKSUM: records.record_digest(value)}
    path.write_text(json.dumps(value))


def of_record(path: str | Path, change: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    def write() -> None:
        about = json.loads(Path(path).read_text())
        change(about)
        sign(Path(path), about)

    return write


def of_dataset(change: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    return of_record("dataset/dataset.json", change)


def array(name: str, make: Callable[[np.ndarray], Any]) -> Callable[[], Any]:
    """Returns a function that changes dataset/NAME."""
    return lambda: np.save(f"dataset/{name}", make(np.load(f"dataset/{name}")))


def content(path: str, make: Callable[[bytes], bytes]) -> Callable[[], Any]:
    """Returns a function that changes a file."""
    return lambda: Path(path).write_bytes(make(Path(path).read_bytes()))


def without(path: str) -> Callable[[], Any]:
    return lambda: Path(path).unlink()


TRAIN, LABELS, ABOUT = "train.npy", "train-labels.npy", "dataset/dataset.json"
DATASETS: dict[str, tuple[Callable[[], Any], str]] = {
    "no folder": (lambda: shutil.rmtree("dataset"), "dataset/dataset.json: no such file"),
    "a file for a folder": (lambda: (shutil.rmtree("dataset"), Path("dataset").touch()), "dataset/dataset.json: not"),
    "no description": (without(ABOUT), "dataset/dataset.json: no such file"),
    "no training images": (without("dataset/train.npy"), "train.npy is missing"),
    "no test images": (without("dataset/test.npy"), "test.npy is missing"),
    "no labels": (without("dataset/test-labels.npy"), "test-labels.npy is missing"),
    "labels of no classes": (of_dataset(lambda about: about.update(classes=None)), "dataset.json has no classes"),
    "empty array": (content("dataset/train.npy", lambda old: b""), "train.npy: "),
    "array cut in its header": (content("dataset/train.npy", lambda old: old[:50]), "train.npy: "),
    "array cut in its data": (content("dataset/train.npy", lambda old: old[:-1]), "train.npy: "),
    "array of text": (content("dataset/train.npy", lambda old: b"hello"), "train.npy: neither a numpy array nor"),
    "array with a shape of its own": (
        content("dataset/train.npy", lambda old: old.replace(b"(1438, 1, 8, 8)", b"(9**9, 1, 8, 8)")),
        "train.npy: ",
    ),
    "array of astronomic shape": (
        content("dataset/train.npy", lambda old: old.replace(b"(1438, 1, 8, 8)", b"(9999999, 9, 9)")),
        "train.npy: ",
    ),
    "an archive for an array": (lambda: zipped(Path("dataset/train.npy"), {"a.npy": b""}), "train.npy holds no array"),
    "another type": (array(TRAIN, lambda old: old.astype(np.float32)), "train.npy holds no array of uint8"),
    "objects": (lambda: np.save("dataset/train.npy", np.array([{}]), allow_pickle=True), "train.npy: Python objects, "),
    "fewer dimensions": (array(TRAIN, lambda old: old[:, 0]), "train.npy has shape (1438, 8, 8), dataset.json says"),
    "other images": (array(TRAIN, lambda old: old.repeat(2, -1)), "train.npy has shape (1438, 1, 8, 16)"),
    "fewer images": (array(TRAIN, lambda old: old[:9]), "train.npy has shape (9, 1, 8, 8)"),
    "fewer labels": (array(LABELS, lambda old: old[:9]), "train-labels.npy has shape (9,), for 1438 images"),
    "labels in rows": (array(LABELS, lambda old: old[:, None]), "train-labels.npy has shape (1438, 1)"),
    "labels beyond the classes": (array(LABELS, lambda old: old + 1), "outside the 10 classes"),
    "labels below zero": (array(LABELS, lambda old: old - 1), "outside the 10 classes"),
    "labels of another type": (array(LABELS, lambda old: old.astype(np.float64)), "holds no array of int64"),
    "description cut off": (content(ABOUT, lambda old: old[:40]), "dataset.json: not readable as JSON"),
    "a list": (content(ABOUT, lambda old: b"[]"), "dataset.json: expected a JSON object"),
    "no JSON": (content(ABOUT, lambda old: b"\xff\xfe"), "dataset.json: not readable as JSON"),
    "NaN": (content(ABOUT, lambda old: old.replace(b"0.", b"NaN, 0.", 1)), "NaN is no number"),
    "brackets without end": (content(ABOUT, lambda old: b"[" * 100_000), "dataset.json: not readable as JSON"),
    "no shape": (of_dataset(lambda about: about.pop("shape")), "dataset.json: shape: missing"),
    "a shape of words": (of_dataset(lambda about: about.update(shape=["1", "8", "8"])), "dataset.json: shape.0"),
    "a negative shape": (
        of_dataset(lambda about: about.update(shape=[-1, 8, 8])),
        "dataset.json: shape: expected C, H, W",
    ),
    "no version": (of_dataset(lambda about: about.update(sha256=None)), "dataset.json: sha256"),
    "counts of words": (of_dataset(lambda about: about.update(counts="many")), "dataset.json: counts"),
    "one count": (of_dataset(lambda about: about["counts"].pop("test")), "test.npy has shape (359, 1, 8, 8)"),
    "another image": (
        array(TRAIN, lambda old: old[::-1]),
        "train.npy: its bytes are not those that dataset.json describes",
    ),
    "labels in another order": (array(LABELS, lambda old: old[::-1]), "train-labels.npy: its bytes are not those"),
    "edited": (content(ABOUT, lambda old: old.replace(b"digits", b"digitS")), "not what its checksum says"),
    "of an older version": (
        content(ABOUT, lambda old: old.replace(records.CHECKSUM.encode(), b"no_checksum")),
        "holds no checksum, so another version of ddpm made it",
    ),
    "flip of words": (of_dataset(lambda about: about.update(flip="no")), "dataset.json: flip"),
}


@pytest.mark.parametrize("case", DATASETS)
def test_a_prepared_dataset(refused: Refused, case: str) -> None:
    spoil, message = DATASETS[case]
    spoil()
    line = refused("train", "cosine")
    assert line.startswith("dataset")
    assert message in line
    assert "dvc repro" in line or "`ddpm prepare` again" in line


# A checkpoint.

WEIGHTS, DESCRIPTION = f"{MODEL}/model.safetensors", f"{MODEL}/model.json"


def of_model(change: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    return of_record(DESCRIPTION, change)


def of_network(**changes: Any) -> Callable[[], Any]:
    return of_model(lambda about: about["network"].update(changes))


def signed(change: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a function that changes the weights, and then updates their checksum as a user would who edits both."""

    def write() -> None:
        change()
        of_model(lambda about: about.update(weights_sha256=records.sha256(Path(WEIGHTS))))()

    return write


def of_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], Any]:
    def write() -> None:
        state = load_file(WEIGHTS)
        change(state)
        save_file(state, WEIGHTS)

    return signed(write)


CHECKPOINTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no folder": (lambda: shutil.rmtree(MODEL), "model.json: no such file"),
    "no description": (without(DESCRIPTION), "model.json: no such file"),
    "no weights": (without(WEIGHTS), "model.safetensors: no such file"),
    "a folder for weights": (lambda: (Path(WEIGHTS).unlink(), Path(WEIGHTS).mkdir()), "checksum"),
    "weights cut off": (content(WEIGHTS, lambda old: old[:-99]), "the checksum of model.safetensors is not the one"),
    "a flipped bit": (content(WEIGHTS, lambda old: old[:-1] + bytes([old[-1] ^ 1])), "the checksum of model.safe"),
    "cut off and signed": (signed(content(WEIGHTS, lambda old: old[:-99])), "not a usable checkpoint"),
    "no bytes, signed": (signed(content(WEIGHTS, lambda old: b"")), "not a usable checkpoint"),
    "zeros, signed": (signed(content(WEIGHTS, lambda old: bytes(99))), "not a usable checkpoint"),
    "a header beyond the file": (
        signed(content(WEIGHTS, lambda old: struct.pack("<Q", 2**62) + old[8:])),
        "not a usable checkpoint",
    ),
    "a zip, signed": (signed(lambda: zipped(Path(WEIGHTS), {"data.pkl": b""})), "not a usable checkpoint"),
    "a weight less": (of_weights(lambda state: state.pop("first.bias")), "first.bias: missing among the weights"),
    "a weight more": (
        of_weights(lambda state: state.update(more=torch.zeros(3))),
        "more: unexpected among the weights",
    ),
    "a weight of another shape": (
        of_weights(lambda state: state.update({"first.bias": torch.zeros(3)})),
        "first.bias: the weights have shape [3], model.json says [16]",
    ),
    "a weight of a larger shape": (
        of_weights(lambda state: state.update({"first.bias": torch.zeros(17)})),
        "first.bias: the weights have shape [17], model.json says [16]",
    ),
    "half precision": (
        of_weights(lambda state: state.update({"first.bias": state["first.bias"].half()})),
        "first.bias: expected finite float32 weights",
    ),
    "whole numbers": (
        of_weights(lambda state: state.update({"first.bias": state["first.bias"].long()})),
        "first.bias: expected finite float32 weights",
    ),
    "NaN": (
        of_weights(lambda state: state.update({"last.bias": state["last.bias"] * torch.nan})),
        "last.bias: expected finite float32 weights",
    ),
    "description cut off": (content(DESCRIPTION, lambda old: old[:99]), "not readable as JSON"),
    "no bytes": (content(DESCRIPTION, lambda old: b""), "not readable as JSON"),
    "a list": (content(DESCRIPTION, lambda old: b"[1]"), "expected a JSON object"),
    "another format": (of_model(lambda about: about.update(format=3)), "checkpoint format 3 is not 2"),
    "edited": (content(DESCRIPTION, lambda old: old.replace(b'"eps"', b'"mu"')), "not what its checksum says"),
    "of another schedule": (of_model(lambda about: about["schedule"].update(name="x")), "the model of schedule 'x'"),
    "no network": (of_model(lambda about: about.pop("network")), "model.json: network: missing"),
    "no schedule": (of_model(lambda about: about.pop("schedule")), "model.json: schedule: missing"),
    "no target": (of_model(lambda about: about.pop("target")), "model.json: target: missing"),
    "no data": (of_model(lambda about: about.pop("data")), "model.json: data: missing"),
    "no checksum": (of_model(lambda about: about.pop("weights_sha256")), "model.json: weights_sha256: missing"),
    "a network of words": (of_model(lambda about: about.update(network="unet")), "not a usable checkpoint"),
    "a list of a schedule": (
        of_model(lambda about: about.update(schedule=[])),
        "model.json: schedule: expected an object",
    ),
    "an unknown target": (of_model(lambda about: about.update(target="score")), "no target 'score'"),
    "an unknown kind": (of_network(kind="transformer"), "no 'transformer' in ddpm/networks; there are dit, unet"),
    "a setting more": (of_network(depth=3), "depth"),
    "other channels": (of_network(channels=24), "the weights have shape"),
    "more blocks": (of_network(blocks=2), "among the weights"),
    "a billion blocks": (of_network(blocks=10**9), "blocks = 1000000000 must lie in 1 ... 64"),
    "no blocks": (of_network(blocks=0), "blocks = 0 must lie in 1 ... 64"),
    "channels beyond what a refusal may take": (of_network(channels=8192), "the weights have shape"),
    "channels beyond memory": (of_network(channels=8 * 10**9), "not a usable checkpoint"),
    "channels beyond integers": (of_network(channels=8 * 10**30), "not a usable checkpoint"),
    "classes beyond memory": (of_network(classes=10**12), "not a usable checkpoint"),
    "words for channels": (of_network(channels="16"), "not a usable checkpoint"),
    "parts of channels": (of_network(channels=16.5), "not a usable checkpoint"),
    "no heads": (of_network(heads=0), "heads = 0 must be 1 or more"),
    "no levels": (of_network(multipliers=[]), "not a usable checkpoint"),
    "negative multipliers": (of_network(multipliers=[1, -2]), "not a usable checkpoint"),
    "null for attention": (of_network(attention=None), "not a usable checkpoint"),
    "images of another width": (of_network(image_size=[8, 16]), "its data are [1, 8, 8], its network takes [1, 8, 16]"),
    "three sides": (of_network(image_size=[8, 8, 8]), "its data are [1, 8, 8], its network takes [1, 8, 8, 8]"),
    "sides in words": (of_network(image_size=["8", 8]), "network.image_size.0: expected an integer, found '8'"),
    "one side in words": (of_network(image_size="8"), "network.image_size: expected an integer, found '8'"),
    "images of another size": (of_network(image_size=16, attention=[8]), "its data are [1, 8, 8], its network takes"),
    "truth for channels": (
        of_model(lambda about: about["data"].update(shape=[True, 8, 8])),
        "data.shape.0: expected an integer, found True",
    ),
    "T beyond memory": (of_model(lambda about: about["schedule"].update(timesteps=10**12)), "is more than 100000"),
    "no T": (of_model(lambda about: about["schedule"].update(timesteps=0)), "steps = 0 must be at least 1"),
    "T in words": (of_model(lambda about: about["schedule"].update(timesteps="100")), "not a usable checkpoint"),
    "an unknown schedule": (of_model(lambda about: about["schedule"].update(schedule="x")), "no schedule 'x'"),
    "a schedule without its beta": (
        of_model(lambda about: about["schedule"].update(schedule="linear", end=7.0)),
        "every beta must lie in (0, 1)",
    ),
    "a shape of words": (of_model(lambda about: about["data"].update(shape="1x8x8")), "data.shape: expected a list"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint(refused: Refused, case: str) -> None:
    spoil, message = CHECKPOINTS[case]
    spoil()
    line = refused("sample", POINT.name)
    assert line.startswith(str(MODEL))
    assert message in line


@pytest.mark.parametrize(("network", "data", "fits"), [(2, 2, True), (2, 1, False), (2, 3, False), (0, 3, True)])
def test_a_conditional_model_has_the_classes_of_its_data(here: Path, network: int, data: int, fits: bool) -> None:
    def change(about: dict[str, Any]) -> None:
        about["network"]["classes"] = network
        about["data"]["classes"] = [str(index) for index in range(data)]

    of_model(change)()
    record = models.read_model_record(MODEL)
    if fits:
        models.check_data(record)
        return
    with pytest.raises(ValueError, match=f"its network has {network} classes, its data have {data}"):
        models.check_data(record)


def test_a_checkpoint_of_another_dataset(refused: Refused) -> None:
    of_network(image_size=16, attention=[8])()
    of_model(lambda about: about["data"].update(shape=[1, 16, 16]))()
    assert "takes images of shape [1, 16, 16], but the dataset holds images of shape [1, 8, 8]" in refused(
        "likelihood", "cosine"
    )


# Sample sets.


def record(**changes: Any) -> bytes:
    """Returns a record of a sample set, with the checksum of its content."""
    about: dict[str, Any] = {
        "point": POINT.name,
        "model": "m",
        "evaluations": 5,
        "settings": {},
        "arrays": {},
        **changes,
    }
    return json.dumps({**about, records.CHECKSUM: records.record_digest(about)}).encode()


def drawn(about: bytes | None = None, **arrays: Any) -> Callable[[], Any]:
    """Returns a function that writes a sample set. Its record describes the arrays, unless `about` replaces the record."""
    full = {"images": np.zeros((8, 1, 8, 8), np.uint8), **arrays}
    kept = {name: value for name, value in full.items() if value is not None}
    right = record(arrays={name: arrays_file._array_digest(value) for name, value in kept.items()})

    def write() -> None:
        np.savez_compressed(SAMPLES, **kept)
        with zipfile.ZipFile(SAMPLES, "a") as archive:
            archive.writestr(samples.RECORD, right if about is None else about)

    return write


def npy_with_shape(shape: str) -> Callable[[], Any]:
    """Returns a function that writes a sample set whose images.npy declares more data than it holds."""
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    images = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(64)
    return lambda: zipped(SAMPLES, {"images.npy": images, samples.RECORD: record()})


SETS: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (without(str(SAMPLES)), "no such sample set"),
    "a folder": (lambda: (SAMPLES.unlink(), SAMPLES.mkdir()), "not a sample set"),
    "no bytes": (content(str(SAMPLES), lambda old: b""), "not a sample set"),
    "text": (content(str(SAMPLES), lambda old: b"hello"), "not a sample set: neither a numpy array nor a zip archive"),
    "cut off": (content(str(SAMPLES), lambda old: old[:-9]), "not a sample set"),
    "cut in half": (content(str(SAMPLES), lambda old: old[: len(old) // 2]), "not a sample set"),
    "a flipped byte": (content(str(SAMPLES), lambda old: old[:200] + bytes([old[200] ^ 255]) + old[201:]), "not a"),
    "one array": (lambda: np.save(SAMPLES.open("wb"), np.zeros(3)), "not a sample set: a single array"),
    "an empty archive": (lambda: zipped(SAMPLES, {}), "not a sample set"),
    "no images": (drawn(images=None), "images.npy"),
    "without a record": (lambda: np.savez(SAMPLES, images=np.zeros((8, 1, 8, 8), np.uint8)), "another version of ddpm"),
    "a record of another point": (drawn(record(point="cosine-ddim-2")), "it holds the images of cosine-ddim-2"),
    "a record of other images": (drawn(record(arrays={"images": "0" * 64})), "its images are not those"),
    "a record of other labels": (
        drawn(
            record(arrays={"images": arrays_file._array_digest(np.zeros((8, 1, 8, 8), np.uint8)), "labels": "0" * 64}),
            labels=np.zeros(8, np.int64),
        ),
        "its labels are not those",
    ),
    "a record that was edited": (drawn(record().replace(b"5", b"4")), "is not what its checksum says"),
    "a record without model": (drawn(record(model=None)), "model: expected a text"),
    "no evaluations": (drawn(record(evaluations=None)), "evaluations: expected an integer"),
    "floats": (
        drawn(images=np.zeros((8, 1, 8, 8), np.float32)),
        "expected uint8 images of shape N,C,H,W, found float32",
    ),
    "three dimensions": (drawn(images=np.zeros((8, 8, 8), np.uint8)), "found uint8 (8, 8, 8)"),
    "none": (drawn(images=np.zeros((0, 1, 8, 8), np.uint8)), "found uint8 (0, 1, 8, 8)"),
    "three": (drawn(images=np.zeros((3, 1, 8, 8), np.uint8)), "a score needs at least 4 of each"),
    "objects": (drawn(images=np.array([{}])), "not a sample set"),
    "of another size": (drawn(images=np.zeros((8, 1, 16, 16), np.uint8)), "[1, 16, 16], the dataset's are [1, 8, 8]"),
    "in colour": (drawn(images=np.zeros((8, 3, 8, 8), np.uint8)), "[3, 8, 8], the dataset's are [1, 8, 8]"),
    "a bomb of another size": (drawn(images=np.zeros((64, 1, 512, 512), np.uint8)), "[1, 512, 512]"),
    "evaluations in a row": (drawn(record(evaluations=[5])), "evaluations: expected an integer"),
    "no evaluation": (drawn(record(evaluations=0)), "evaluations: 0 is less than 1"),
    "half an evaluation": (drawn(record(evaluations=0.5)), "evaluations: expected an integer"),
    "more than it holds": (npy_with_shape("(9, 1, 8, 8)"), "images.npy declares the shape (9, 1, 8, 8)"),
    "a petabyte": (npy_with_shape("(10000000000, 100, 32, 32)"), "images.npy declares the shape"),
    "negative": (npy_with_shape("(-1, -1, 8, 8)"), "not a sample set"),
    "no shape": (npy_with_shape("'eight'"), "not a sample set"),
}


@pytest.mark.parametrize("case", SETS)
def test_a_sample_set(refused: Refused, case: str) -> None:
    spoil, message = SETS[case]
    spoil()
    line = refused("evaluate", POINT.name)
    assert line.startswith(str(SAMPLES))
    assert message in line
    assert "again" in line or "`ddpm sample" in line or "a score needs" in line


# Scores, and the other files that the report reads.


def of_scores(**changes: Any) -> Callable[[], Any]:
    def write() -> None:
        scores = json.loads(METRICS.read_text()) | changes
        sign(METRICS, {key: value for key, value in scores.items() if value is not ...})

    return write


INFLUENCE, LOSSES = str(paths.influence_file(POINT)), str(paths.history_file("cosine"))


def influence(values: np.ndarray) -> Callable[[], Any]:
    """Returns a function that writes other influence values and records them with the scores."""

    def write() -> None:
        np.save(INFLUENCE, values)
        files = {Path(INFLUENCE).name: records.sha256(Path(INFLUENCE))}
        of_scores(files=files)()

    return write


OTHER = "not the file that"  # the rest of the message: "the record describes"
TRAINING, BOUND = str(paths.training_metrics_file("cosine")), str(paths.likelihood_file("cosine"))
REPORTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no scores": (without(str(METRICS)), "metrics: no scores of cosine-ddim-5"),
    "scores cut off": (content(str(METRICS), lambda old: old[:50]), "not readable as JSON"),
    "no bytes": (content(str(METRICS), lambda old: b""), "not readable as JSON"),
    "not UTF-8": (content(str(METRICS), lambda old: b"\xff" + old), "not readable as JSON"),
    "a number": (content(str(METRICS), lambda old: b"3"), "expected a JSON object"),
    "no FID": (of_scores(fid=...), "fid: missing; run `ddpm evaluate cosine-ddim-5` again"),
    "FID null": (of_scores(fid=None), "no sound value of fid"),
    "FID in words": (of_scores(fid="low"), "no sound value of fid"),
    "FID is NaN": (of_scores(fid=NAN), "NaN is no number"),
    "FID beyond all floats": (
        content(str(METRICS), lambda old: old.replace(b'"kid_std": ', b'"kid_std": 1e999, "x": ')),
        "not what its checksum says",
    ),
    "scores of another point": (of_scores(point="cosine-ddim-2"), "holds the scores of cosine-ddim-2"),
    "scores that were edited": (content(str(METRICS), lambda old: old.replace(b"10.", b"1.0")), "its checksum says"),
    "another point's influence": (
        lambda: shutil.copyfile("metrics/cosine-ddim-2.influence.npy", INFLUENCE),
        "its sha256 is not the one recorded with the scores",
    ),
    "a larger hash of the influence": (
        of_scores(files={Path(INFLUENCE).name: "f" * 64}),
        "its sha256 is not the one recorded with the scores",
    ),
    "a smaller hash of the influence": (
        of_scores(files={Path(INFLUENCE).name: "0" * 64}),
        "its sha256 is not the one recorded with the scores",
    ),
    "FID true": (of_scores(fid=True), "no sound value of fid"),
    "FID beyond all integers": (of_scores(fid_high=10**400), "no sound value of fid_high"),
    "FID beyond all scores": (of_scores(fid=1e300, fid_high=1e305), "no sound value of fid, fid_high"),
    "FID below zero": (of_scores(fid=-1.0), "no sound value of fid"),
    "FID above its interval": (of_scores(fid=1000), "no sound value of fid"),
    "FID below its interval": (of_scores(fid=0), "no sound value of fid"),
    "an interval upside down": (of_scores(fid_low=50, fid_high=30), "no sound value of fid"),
    "KID above its interval": (of_scores(kid=9), "no sound value of kid"),
    "KID's deviation below zero": (of_scores(kid_std=-1), "no sound value of kid_std"),
    "a precision above one": (of_scores(precision=1.5), "no sound value of precision"),
    "a confidence without a quantile": (of_scores(confidence=0.9999999999999999), "no sound value of confidence"),
    "a confidence of hardly anything": (of_scores(confidence=1e-300), "no sound value of confidence"),
    "images beyond all files": (of_scores(images=10**30), "no sound value of images"),
    "no samples": (of_scores(samples=...), "samples: missing"),
    "confidence of one": (of_scores(confidence=1.0), "no sound value of confidence"),
    "evaluations in parts": (of_scores(evaluations=2.5), "no sound value of evaluations"),
    "no evaluations": (of_scores(evaluations=0), "no sound value of evaluations"),
    "images in a list": (of_scores(images=[64]), "no sound value of images"),
    "a protocol in a list": (of_scores(reference=[]), "no sound value of reference"),
    "copying in words": (of_scores(copying="a lot"), "no sound value of copying"),
    "another run's influence": (of_scores(images=63), "the influence values beside this file are from another run"),
    "no influence": (without(INFLUENCE), "`ddpm evaluate` writes it beside the scores"),
    "influence of no bytes": (content(INFLUENCE, lambda old: b""), "not the influence values"),
    "influence cut off": (content(INFLUENCE, lambda old: old[:-1]), "not the influence values"),
    "influence of another type": (influence(np.zeros(64)), "expected float32 values"),
    "influence in rows": (influence(np.zeros((8, 8), np.float32)), "expected float32 values"),
    "influence that is NaN": (influence(np.full(64, np.nan, np.float32)), "not all values are finite"),
    "samples of another dataset": (drawn(images=np.zeros((8, 3, 8, 8), np.uint8)), "the dataset's are [1, 8, 8]"),
    "samples cut off": (content(str(SAMPLES), lambda old: old[:-9]), "not a sample set"),
    "training cut off": (content(TRAINING, lambda old: old[:9]), "not readable as JSON"),
    "training without steps": (of_record(TRAINING, lambda about: about.pop("steps")), "steps: missing"),
    "training of another schedule": (
        of_record(TRAINING, lambda about: about.update(schedule="x")),
        "belongs to schedule 'x'",
    ),
    "training that was edited": (content(TRAINING, lambda old: old.replace(b"60", b"61")), "its checksum says"),
    "losses of words": (content(LOSSES, lambda old: old.replace(b"1.0", b"one")), OTHER),
    "losses of another training": (content(LOSSES, lambda old: old.replace(b"1.0", b"2.0")), OTHER),
    "losses cut off": (content(LOSSES, lambda old: old[:-5]), OTHER),
    "no losses": (without(LOSSES), "no such file"),
    "bits in words": (of_record(BOUND, lambda about: about["test"].update(prior="low")), "test.prior"),
    "bits in a list": (of_record(BOUND, lambda about: about.update(test=[])), "cosine.json: test: "),
    "dvc.lock cut off": (lambda: Path("dvc.lock").write_text("stages: {a: [1"), "dvc.lock: not readable as YAML"),
    "dvc.lock of a list": (lambda: Path("dvc.lock").write_text("- a\n"), "dvc.lock: expected DVC's stages"),
    "dvc.lock of a word": (lambda: Path("dvc.lock").write_text("stages: none\n"), "dvc.lock: expected DVC's stages"),
}


@pytest.mark.parametrize("case", REPORTS)
def test_what_a_report_reads(refused: Refused, case: str) -> None:
    spoil, message = REPORTS[case]
    spoil()
    assert message in refused("report")


@pytest.mark.parametrize(
    "case", ["FID above its interval", "FID in words", "no FID", "an interval upside down", "no samples"]
)
def test_scores_are_checked_whoever_reads_them(refused: Refused, case: str) -> None:
    spoil, message = REPORTS[case]
    best = Row.of(POINT, read_scores(Path(), POINT))
    spoil()
    files = [paths.report_dir() / name for name in ("best.json", "points.csv")]
    records.write_record(files[0], Best(best, 1, best.point, 1).to_json())
    write_table(files[1], [best])
    records.write_record(paths.report_dir() / "front.json", {}, files)
    assert message in refused("card")
    with pytest.raises(InputError, match=message):
        PointFiles.read(Path(), POINT)


LONG = "a" * 5000
TOO_LONG: list[list[str]] = [
    ["generate", "--model", LONG],
    ["generate", "--model", str(MODEL), "--out", f"{LONG}.png"],
    ["schedules", "--out", LONG],
    ["card", "--out", LONG],
    ["swiss-roll", "--out", f"{LONG}.png"],
    ["sample", f"{LONG}-ddim-5"],
    ["export-diffusers", LONG, "out"],
    ["export-diffusers", str(MODEL), LONG],
    ["import-diffusers", LONG, "hub"],
    ["import-diffusers", str(PIPELINE), LONG],
]


@pytest.mark.parametrize("arguments", TOO_LONG, ids=lambda arguments: " ".join(arguments)[:30])
def test_a_name_that_no_file_can_have(refused: Refused, arguments: list[str]) -> None:
    assert re.search("too long|no such|at most 64|no point of a sweep|restore it", refused(*arguments))


# A model of diffusers.


def of_pipeline(file: str, **changes: Any) -> Callable[[], Any]:
    return lambda: Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changes))


IMPORTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a width beyond all floats": (of_pipeline(CONFIG, block_out_channels=[10**400, 32]), "block_out_channels = 1000"),
    "a width of 1e30": (of_pipeline(CONFIG, block_out_channels=[10**30, 32]), "a whole number from 1 to 65,536"),
    "a width that is none": (of_pipeline(CONFIG, block_out_channels=[True, 32]), "block_out_channels = True"),
    "many levels": (of_pipeline(CONFIG, block_out_channels=[8] * 99), "expected a list of 1 to 16 widths"),
    "a side of 2^60": (of_pipeline(CONFIG, sample_size=2**60), "sample_size = 1152921504606846976"),
    "a side that is none": (of_pipeline(CONFIG, sample_size=True), "sample_size = True"),
    "very many channels": (of_pipeline(CONFIG, in_channels=10**30, out_channels=10**30), "in_channels = 1000"),
    "very many blocks": (of_pipeline(CONFIG, layers_per_block=10**9), "layers_per_block = 1000000000"),
    "very many groups": (of_pipeline(CONFIG, norm_num_groups=10**30), "norm_num_groups = 1000"),
    "a very wide head": (of_pipeline(CONFIG, attention_head_dim=10**30), "attention_head_dim = 1000"),
    "dropout true": (of_pipeline(CONFIG, dropout=True), "dropout = True"),
    "very many times": (of_pipeline(SCHEDULER, num_train_timesteps=10**12), "num_train_timesteps = 1000000000000"),
    "a prediction in a list": (of_pipeline(SCHEDULER, prediction_type=[]), "prediction_type = []"),
    "a schedule in a list": (of_pipeline(SCHEDULER, beta_schedule=[]), "beta_schedule = []"),
    "a start beyond all floats": (
        of_pipeline(SCHEDULER, beta_schedule="linear", beta_start=10**400),
        "beta_start = 1000",
    ),
    "an epsilon beyond all floats": (of_pipeline(CONFIG, norm_eps=10**400), "norm_eps = 1000"),
    "a shift beyond all floats": (of_pipeline(CONFIG, freq_shift=-(10**400)), "freq_shift = -1000"),
    "very many classes": (of_pipeline(CONFIG, num_class_embeds=10**30), "num_class_embeds = 1000"),
    "very many groups in the middle": (of_pipeline(CONFIG, attn_norm_num_groups=10**30), "attn_norm_num_groups = 1000"),
    "a table beyond all floats": (of_pipeline(SCHEDULER, trained_betas=[10**400]), "trained_betas: expected a list"),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_a_model_of_diffusers(refused: Refused, case: str) -> None:
    spoil, message = IMPORTS[case]
    spoil()
    assert message in refused("import-diffusers", str(PIPELINE), "hub")


# Real processes, which also run the parts of main() around the program.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["prepare"], "- a list\n"), (["prepare"], None), (["sample", "cosine", "--no"], None)],
    ids=str,
)
def test_by_a_process(here: Path, arguments: list[str], text: str | None) -> None:
    if text is None:
        set_params(("data.source", "image_folder"), ("data.path", "nowhere"))
    else:
        (here / "params.yaml").write_text(text)
    before = tree(here)
    done = subprocess.run(
        [sys.executable, "-m", "ddpm", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert one_line(done.stderr)
    assert done.stdout == ""
    assert tree(here) == before


# Random damage anywhere in a valid file. The result must be a success or one line.

CHANCE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW, MANY = settings(CHANCE, max_examples=40), settings(CHANCE, max_examples=5000)


def taken_or_refused(read: Callable[[], Any]) -> None:
    try:
        with bounded():
            read()
    except InputError as error:
        assert str(error).isprintable()
        assert 20 < len(str(error)) < 1000


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Returns the content cut, with a part repeated, or with a part replaced."""
    start, length = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 16))
    return draw(
        st.sampled_from(
            [
                content[:start],
                content[: start + length] + content[start:],
                content[:start] + draw(st.binary(max_size=16)) + content[start + length :],
                content[:start] + bytes([content[start] ^ 1 << length % 8]) + content[start + 1 :],
            ]
        )
    )


def anywhere(values: Any) -> list[tuple[Any, Any]]:
    """Returns (container, key) of every entry of nested mappings and lists."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [pair for key, value in entries for pair in ((values, key), *anywhere(value))]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**30) | st.just(-1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def spoilt(draw: Callable[..., Any], values: Any) -> Any:
    """Returns a copy with one to three entries replaced, removed or renamed."""
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        if not (places := anywhere(values)):
            break
        container, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "remove", "rename"])):
            case "replace":
                container[key] = draw(JUNK)
            case "remove":
                del container[key]
            case "rename" if isinstance(container, dict):
                container[draw(st.text(max_size=8))] = container.pop(key)
    return values


def params_as_bytes(data: st.DataObject, path: Path) -> None:
    path.write_bytes(data.draw(damaged(GOOD)))
    taken_or_refused(lambda: Params.load(path))


def params_as_values(data: st.DataObject, path: Path) -> None:
    """Also runs the checks that come before a training."""
    values = spoilt(data.draw, json.loads(VALID))

    def read() -> None:
        params = Params.check(values, "params.yaml")
        for point in params.points():
            check_point(params, point, noise_schedule(params, point.schedule), learned=False, guidable=False)

    taken_or_refused(read)


def weights_as_bytes(data: st.DataObject, path: Path) -> None:
    """The recorded checksum is updated to the damaged weights, so safetensors itself must notice the damage."""
    Path(WEIGHTS).write_bytes(data.draw(damaged(path.read_bytes())))
    of_model(lambda about: about.update(weights_sha256=records.sha256(Path(WEIGHTS))))()
    taken_or_refused(lambda: checkpoint.load(MODEL))


def model_as_values(data: st.DataObject, path: Path) -> None:
    """Also draws images from the model if the record is accepted."""
    sign(Path(DESCRIPTION), spoilt(data.draw, json.loads(path.read_text())))
    params = Params.load()
    few = params.model_copy(update={"sampling": replace(params.sampling, images=2)})
    taken_or_refused(lambda: sample_point(few, POINT))


def dataset_as_values(data: st.DataObject, path: Path) -> None:
    sign(Path(ABOUT), spoilt(data.draw, json.loads(path.read_text())))
    taken_or_refused(dataset.read_dataset)


def dataset_as_bytes(data: st.DataObject, path: Path) -> None:
    """Damages the first bytes, which are the header of the array."""
    content = path.read_bytes()
    Path("dataset/test-labels.npy").write_bytes(data.draw(damaged(content[:160])) + content[160:])
    taken_or_refused(dataset.read_dataset)


def samples_as_bytes(data: st.DataObject, path: Path) -> None:
    SAMPLES.write_bytes(data.draw(damaged(path.read_bytes())))
    taken_or_refused(lambda: samples.read_samples(SAMPLES))


def scores_as_values(data: st.DataObject, path: Path) -> None:
    sign(METRICS, spoilt(data.draw, json.loads(path.read_text())))
    taken_or_refused(lambda: _read_rows([POINT], Path()))


def pipeline_as_values(data: st.DataObject, path: Path) -> None:
    spoilt_file = Path(*path.parts[-3:])
    for name in (CONFIG, SCHEDULER):
        Path(name).write_text((path.parents[2] / name).read_text())
    spoilt_file.write_text(json.dumps(spoilt(data.draw, json.loads(path.read_text()))))
    taken_or_refused(lambda: import_diffusers(PIPELINE, "hub"))


KINDS: dict[str, tuple[Callable[[st.DataObject, Path], None], str]] = {
    "the bytes of params.yaml": (params_as_bytes, "params.yaml"),
    "the values of params.yaml": (params_as_values, "params.yaml"),
    "the bytes of weights": (weights_as_bytes, WEIGHTS),
    "the values of model.json": (model_as_values, DESCRIPTION),
    "the values of dataset.json": (dataset_as_values, ABOUT),
    "the bytes of labels": (dataset_as_bytes, "dataset/test-labels.npy"),
    "the bytes of samples": (samples_as_bytes, str(SAMPLES)),
    "the values of scores": (scores_as_values, str(METRICS)),
    "the values of a diffusers network": (pipeline_as_values, CONFIG),
    "the values of a diffusers scheduler": (pipeline_as_values, SCHEDULER),
}


def by_chance(kind: str, here: Path, checkout: Path, tmp_path: Path, data: st.DataObject) -> None:
    check, valid = KINDS[kind]
    shutil.copyfile(checkout / "models/cosine/model.json", here / DESCRIPTION)
    check(data, checkout / valid if "params" not in kind else tmp_path / "params.yaml")


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(data=st.data())
def test_by_chance(kind: str, here: Path, checkout: Path, tmp_path: Path, data: st.DataObject) -> None:
    by_chance(kind, here, checkout, tmp_path, data)


@pytest.mark.proof
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
@MANY
@given(data=st.data())
def test_by_much_chance(kind: str, here: Path, checkout: Path, tmp_path: Path, data: st.DataObject) -> None:
    by_chance(kind, here, checkout, tmp_path, data)
