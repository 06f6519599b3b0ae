"""Measures what compiled kernels and bfloat16 change: pixels and FID of the same model from the same noise, in pairs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.harness import TINY, figure
from bench.scores import CACHE
from ddpm.files import paths
from ddpm.files.dataset import read_dataset
from ddpm.files.params import Params
from ddpm.files.samples import read_samples
from ddpm.parameters import Point
from ddpm.scores import fidelity, inception
from ddpm.scores.features import extract
from ddpm.scores.intervals import Estimate, difference, standard_error
from ddpm.stages.prepare import prepare
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train

RECIPE = Path(__file__).parents[1] / "recipes" / "mnist.yaml"
POINT = Point(schedule="cosine", sampler="dpmpp_2m", steps=25)
IMAGES, LAYER = (50, 64) if TINY else (1000, 192)
EXACT = "float32"
# How the same weights are sampled: precision, compile.
SETTINGS = {
    EXACT: ("float32", False),
    "float32, compiled": ("float32", True),
    "bfloat16": ("bfloat16", False),
    "bfloat16, compiled": ("bfloat16", True),
}
GOAL = 2.0  # per cent of FID


def rounding(device: str) -> dict[str, Any]:
    """Trains the MNIST recipe, samples it in each of SETTINGS, and compares with plain float32.

    A second model is trained and sampled in compiled bfloat16, and a third in float32 from another seed, which shows how much
    two trainings differ anyway.
    """
    params = Params.load(RECIPE)
    exactly: dict[str, Any] = {"precision": "float32", "compile": True}
    threads: dict[str, Any] = {"threads": torch.get_num_threads()}
    place: dict[str, Any] = {"device": device}
    base = params.model_copy(
        update={
            "training": replace(params.training, steps=20 if TINY else params.training.steps, **exactly, **threads),
            "sampling": replace(params.sampling, images=IMAGES, batch=min(IMAGES, 250), **threads),
            "compute": replace(params.compute, **place),
        }
    )
    extractor = inception.load(LAYER, CACHE, device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(base, root)
        real = np.array(read_dataset(root).train[:IMAGES])
        reference = fidelity.statistics(extract(extractor, real))

        def drawn(params: Params) -> tuple[NDArray[np.uint8], Estimate]:
            sample_point(params, POINT, root)
            images = np.array(read_samples(root / paths.samples_file(POINT)).images)
            found = fidelity.jackknife(extract(extractor, images), reference)
            return images, Estimate(found.fid, standard_error(found.influence), found.influence)

        def in_setting(precision: str, compiled: bool, *sections: str) -> Params:
            setting: dict[str, Any] = {"precision": precision, "compile": compiled}
            return base.model_copy(update={name: replace(getattr(base, name), **setting) for name in sections})

        def trained(precision: str, compiled: bool, seed: int) -> tuple[NDArray[np.uint8], Estimate]:
            rows = {POINT.schedule: replace(base.schedules[POINT.schedule], seed=seed)}
            here = in_setting(precision, compiled, "training", "sampling").model_copy(update={"schedules": rows})
            train(here, POINT.schedule, root)
            return drawn(here)

        trained("float32", True, 0)
        found = {}
        for name, (precision, compiled) in SETTINGS.items():
            found[name] = drawn(in_setting(precision, compiled, "sampling"))
        others = {
            "trained and sampled in bfloat16, compiled": trained("bfloat16", True, 0)[1],
            "trained from another seed": trained("float32", True, 1)[1],
        }
    exact_images, exact = found.pop(EXACT)
    figures, checks = [], dict[str, Any]({f"FID, {EXACT}": exact.value, "its standard error": exact.error})
    for name, (images, score) in found.items():
        apart = difference(score, exact)
        share = [100 * end / exact.value for end in (apart.value, *apart.interval())]
        figures.append(
            {
                **figure(f"FID in {name}, against plain float32", share, "%"),
                "value": share[0],
                "goal": GOAL,
                "at": "most",
                "met": max(map(abs, share)) <= GOAL,
            }
        )
        gap = np.abs(images.astype(int) - exact_images)
        checks[f"mean and largest difference of pixels (of 255), {name}"] = [float(gap.mean()), int(gap.max())]
    checks |= {f"FID, {name}": score.value for name, score in others.items()}
    return {
        "work": f"{IMAGES} images of {POINT.name} from one model of the MNIST recipe, FID at layer {LAYER}",
        "per_call": "no times; the brackets hold the 95% interval of the paired difference",
        "checks": checks,
        "times": {},
        "figures": figures,
    }
